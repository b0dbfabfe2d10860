"""How much of the correct answer the model reproduces by itself."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lethe.inference.reading import Reading
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class ExtractionStrength(Metric):
    """1 - k/T, with k the fewest of the answer's T tokens that must be given so that the model greedily says the rest.

    Read in one pass: the rest is said if each of its tokens is the model's choice after the correct ones before it. 1
    is an answer reproduced from the question alone, 0 one whose last token is wrong. EOS does not count. The best
    of the gold answer and the accepted ones counts. None without a free-form question.
    """

    source: ClassVar[str] = (
        "Wang et al. 2024, arXiv 2406.09179; teacher-forced as in open-unlearning, but 0 (there 1/T) if nothing matches"
    )
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Strength in [0, 1] over the free-form questions."""
        found = [question for question in reading.gold_ranks() if question]
        values = [max(_extraction_strength(ranks) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


@dataclass(frozen=True, kw_only=True)
class ExactMemorisation(Metric):
    """Share of the answer's tokens that are the model's choice after the correct ones before them.

    EOS does not count. The best of the gold answer and the accepted ones counts. None without a free-form question.
    """

    source: ClassVar[str] = "Tirumala et al. 2022, arXiv 2205.10770: exact memorization; teacher-forced"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in [0, 1] over the free-form questions."""
        found = [question for question in reading.gold_ranks() if question]
        values = [max(float((ranks == 1).double().mean()) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


def _extraction_strength(ranks: Float[Tensor, " token"]) -> float:
    said = int((ranks == 1).flip(0).cumprod(0).sum())
    return said / len(ranks)
