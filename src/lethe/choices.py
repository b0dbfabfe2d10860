"""Multiple choice as the evaluation harness scores it, for every metric that asks questions with choices."""

from collections.abc import Sequence
from typing import Literal

from lethe.protocols import Subject
from lethe.scoring import log_probs, pair_spans, prompt_and_answers
from lethe.types import Question


def choice_hits(subject: Subject, questions: Sequence[Question], scoring: Literal["letter", "cloze"]) -> list[float]:
    """For each question 1.0 if its answer is the most probable choice, else 0.0.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice.
    """
    asked = [prompt_and_answers(question, scoring) for question in questions]
    pairs = [(prompt, answer) for prompt, answers in asked for answer in answers]
    scored = iter(log_probs(subject.model, pair_spans(subject, pairs)))
    hits = []
    for question in questions:
        choices = [next(scored) for _ in question.choices]
        totals = [float(tokens.mean() if scoring == "cloze" else tokens.sum()) for tokens in choices]
        hits.append(float(totals.index(max(totals)) == question.answer_index))
    return hits


def chance(questions: Sequence[Question]) -> float:
    """Share of hits that guessing gives: the mean of 1 / number of choices."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
