"""Multiple-choice accuracy, scored as the evaluation harness does."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.protocols import Subject
from lethe.scoring import log_probs, mean_scores, pair_spans, prompt_and_answers
from lethe.types import EvalSet, Scores


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Share of multiple-choice questions whose correct choice is the most probable one.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice. Chance is the
    mean of 1 / number of choices; `per_example` is 1 for a hit and 0 for a miss. None without such questions.
    """

    source: ClassVar[str] = "Gao et al., lm-evaluation-harness, tasks wmdp and mmlu (letter), acc_norm by token (cloze)"

    def __call__(self, subject: Subject, data: EvalSet) -> Scores | None:
        """Accuracy in [0, 1] over the questions with choices."""
        questions = [question for question in data.questions if question.choices]
        if not questions:
            return None
        asked = [prompt_and_answers(question, data.scoring) for question in questions]
        pairs = [(prompt, answer) for prompt, answers in asked for answer in answers]
        scored = iter(log_probs(subject.model, pair_spans(subject, pairs)))
        hits = []
        for question in questions:
            choices = [next(scored) for _ in question.choices]
            totals = [float(tokens.mean() if data.scoring == "cloze" else tokens.sum()) for tokens in choices]
            hits.append(float(totals.index(max(totals)) == question.answer_index))
        chance = sum(1 / len(question.choices) for question in questions) / len(questions)
        return mean_scores(hits, "higher", chance=chance)
