"""Where the correct answer's tokens stand among those that the model finds probable."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.answers import gold_ranks
from lethe.inference.loaded_model import LoadedModel
from lethe.types import EvalSet, Scores, mean_scores

SOURCE = "Shen et al., LUNAR (2025), arXiv 2502.07218: MRR and top hit ratio; free-running only by its code"


@dataclass(frozen=True, kw_only=True)
class MeanReciprocalRank:
    """Mean of 1 / rank over the tokens of the correct answer, each predicted from the correct ones before it.

    With `data.free_running` it is the rank at the same step of the model's own greedy answer, as LUNAR's code
    does; tokens beyond that answer's end count 0. The best of the gold answer and the accepted ones counts. None
    without a free-form question.
    """

    source: ClassVar[str] = SOURCE
    better: ClassVar[str] = "higher"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Reciprocal rank in [0, 1] over the free-form questions."""
        found = _ranks(subject, data)
        values = [max(_mean([1 / rank for rank in ranks]) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


@dataclass(frozen=True, kw_only=True)
class TopHitRatio:
    """Share of the correct answer's tokens whose rank is at most `top`; otherwise as `MeanReciprocalRank`."""

    source: ClassVar[str] = SOURCE
    better: ClassVar[str] = "higher"
    chance: ClassVar[str] = "top / the vocabulary's size"
    needs: ClassVar[str] = "free-form questions"

    top: int = 100
    """Last rank that counts as found."""

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Share in [0, 1] over the free-form questions."""
        found = _ranks(subject, data)
        values = [max(_mean([float(rank <= self.top) for rank in ranks]) for ranks in question) for question in found]
        return mean_scores(values, "higher") if values else None


def _ranks(subject: LoadedModel, data: EvalSet) -> list[list[list[float]]]:
    found = gold_ranks(subject, data, free_running=data.free_running)
    return [[ranks.tolist() for ranks in question] for question in found if question]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
