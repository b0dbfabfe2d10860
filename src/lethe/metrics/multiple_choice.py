"""Multiple-choice accuracy, scored as the evaluation harness does."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.choices import chance, choice_hits
from lethe.inference.loaded_model import LoadedModel
from lethe.types import EvalSet, Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Share of multiple-choice questions whose correct choice is the most probable one.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice. Chance is the
    mean of 1 / number of choices; `per_example` is 1 for a hit and 0 for a miss. None without such questions.
    """

    source: ClassVar[str] = "Gao et al., lm-evaluation-harness, tasks wmdp and mmlu (letter), acc_norm by token (cloze)"
    better: ClassVar[str] = "higher"
    chance: ClassVar[str] = "1 / number of choices"
    needs: ClassVar[str] = "questions with choices"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Accuracy in [0, 1] over the questions with choices."""
        questions = [question for question in data.questions if question.choices]
        if not questions:
            return None
        return mean_scores(choice_hits(subject, questions, data.scoring), "higher", chance=chance(questions))
