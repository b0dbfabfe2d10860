"""Multiple-choice accuracy, scored as the evaluation harness does."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.choices import chance, choice_hits
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Metric):
    """Share of multiple-choice questions whose correct choice is the most probable one.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice. Chance is the
    mean of 1 / number of choices; `per_example` is 1 for a hit and 0 for a miss. None without such questions.
    """

    source: ClassVar[str] = "Gao et al., lm-evaluation-harness, tasks wmdp and mmlu (letter), acc_norm by token (cloze)"
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "1 / number of choices"
    needs: ClassVar[str] = "questions with choices"

    def __call__(self, reading: Reading) -> Scores | None:
        """Accuracy in [0, 1] over the questions with choices."""
        questions = [question for question in reading.data.questions if question.choices]
        if not questions:
            return None
        return mean_scores(choice_hits(reading, questions), "higher", chance=chance(questions))
