"""Where the correct answer's tokens stand among those that the model finds probable."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores

SOURCE = "Shen et al., LUNAR (2025), arXiv 2502.07218: MRR and top hit ratio; free-running only by its code"


@dataclass(frozen=True, kw_only=True)
class MeanReciprocalRank(Metric):
    """Mean of 1 / rank over the tokens of the correct answer, each predicted from the correct ones before it.

    With `free_running` it is the rank at the same step of the model's own greedy answer, as LUNAR's code
    does; tokens beyond that answer's end count 0. The best of the gold answer and the accepted ones counts. None
    without a free-form question.
    """

    source: ClassVar[str] = SOURCE
    needs: ClassVar[str] = "free-form questions"

    free_running: bool = False
    """Rank tokens along the model's own greedy answer, as LUNAR's code does, instead of after the correct ones."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Reciprocal rank in [0, 1] over the free-form questions."""
        found = _ranks(reading, self.free_running)
        values = [max(_mean([1 / rank for rank in ranks]) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


@dataclass(frozen=True, kw_only=True)
class TopHitRatio(Metric):
    """Share of the correct answer's tokens whose rank is at most `top`; otherwise as `MeanReciprocalRank`."""

    source: ClassVar[str] = SOURCE
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "top / the vocabulary's size"
    needs: ClassVar[str] = "free-form questions"

    free_running: bool = False
    """Rank tokens along the model's own greedy answer, as LUNAR's code does, instead of after the correct ones."""
    top: int = 100
    """Last rank that counts as found."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in [0, 1] over the free-form questions."""
        found = _ranks(reading, self.free_running)
        values = [max(_mean([float(rank <= self.top) for rank in ranks]) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


def _ranks(reading: Reading, free_running: bool) -> list[list[list[float]]]:
    found = reading.gold_ranks(free_running=free_running)
    return [[ranks.tolist() for ranks in question] for question in found if question]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
