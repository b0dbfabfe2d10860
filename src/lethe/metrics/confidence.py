"""How sure the model is as it begins to answer, rightly or wrongly."""

from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class AnswerConfidence(Metric):
    """Mean probability of the most probable token where the answer's first token stands.

    The prompt is the one that multiple choice reads: the rendered question for letters, the question's own prompt
    otherwise. None without questions.
    """

    source: ClassVar[str] = "Hendrycks and Gimpel, maximum softmax probability (ICLR 2017), at one token"
    higher_means: ClassVar[Knowledge] = "neither"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Confidence in (0, 1] over the questions."""
        return mean_scores(reading.first_token_confidence, "neither") if reading.data.questions else None
