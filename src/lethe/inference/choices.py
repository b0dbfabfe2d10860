"""Multiple choice as the evaluation harness scores it, for everything that asks questions with choices."""

from collections.abc import Sequence

from lethe.inference.reading import Reading
from lethe.inference.spans import answer_spans, prompt_and_answers
from lethe.types import Question


def choice_hits(reading: Reading, questions: Sequence[Question]) -> list[float]:
    """For each question 1.0 if its answer is the most probable choice, else 0.0.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice. A prompt beyond the
    model's context loses tokens on the left.

    Raises: QuestionError if an answer alone is beyond it; DivergedError, OutOfMemoryError.
    """
    scoring = reading.data.scoring
    asked = [prompt_and_answers(question, scoring) for question in questions]
    scored = iter(reading.log_probs(answer_spans(reading.model, asked)))
    hits = []
    for question, (_, answers) in zip(questions, asked, strict=True):
        choices = [next(scored) for _ in answers]
        totals = [float(tokens.mean() if scoring == "cloze" else tokens.sum()) for tokens in choices]
        hits.append(float(totals.index(max(totals)) == question.answer_index))
    return hits


def chance(questions: Sequence[Question]) -> float:
    """Share of hits that guessing gives: the mean of 1 / number of choices."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
