"""Forgetting and retaining in one number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lethe.metrics.protocol import Combination, Knowledge
from lethe.types import Scores, Unit


@dataclass(frozen=True, kw_only=True)
class DeviationScore(Combination):
    """Distance to the ideal of nothing right on the forget set and all on the retain set, in ROUGE-1 recall: 0 to 141.

    100 * sqrt(forget^2 + (1 - retain)^2), with the standard error by the delta method.
    """

    source: ClassVar[str] = "Shen et al., LUNAR (2025), arXiv 2502.07218: deviation score"
    higher_means: ClassVar[Knowledge] = "less"
    unit: ClassVar[Unit] = "points"
    needs: ClassVar[str] = "rouge1_recall of a forget set and of a retain set"

    def combine(self, scores: Mapping[str, Scores]) -> Scores | None:
        """The distance; None where one of the two recalls was not measured."""
        forget, retain = scores.get("rouge1_recall/forget"), scores.get("rouge1_recall/retain")
        if forget is None or retain is None:
            return None
        across, down = forget.value, 1 - retain.value
        distance = math.hypot(across, down)
        # At the ideal itself there is no slope: no direction counts less than fully there.
        slopes = (across / distance, down / distance) if distance else (1.0, 1.0)
        stderr = math.hypot(slopes[0] * forget.stderr, slopes[1] * retain.stderr)
        return Scores(value=100 * distance, stderr=100 * stderr, n=forget.n + retain.n, better="lower")
