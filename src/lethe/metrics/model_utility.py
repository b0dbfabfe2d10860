"""What is left of everything that should stay, in one number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from lethe.metrics.protocol import Combination
from lethe.types import Scores, Unit

PARTS = ("answer_probability", "rouge_l_recall", "truth_ratio")


SETS = ("retain", "real_authors", "world_facts")


@dataclass(frozen=True, kw_only=True)
class ModelUtility(Combination):
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on the retain set, real authors and world facts.

    0 if one of the nine is 0. The standard error is by the delta method, as if the nine were independent. None where
    one was not measured.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024), arXiv 2401.06121, section 2.2.1: model utility"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "TOFU's sets retain, real_authors and world_facts"

    def combine(self, scores: Mapping[str, Scores]) -> Scores | None:
        """Utility in [0, 1]; None where one of the nine was not measured."""
        found = [scores.get(f"{part}/{data}") for part, data in product(PARTS, SETS)]
        parts = [score for score in found if score is not None]
        if len(parts) < len(found):
            return None
        n = sum(score.n for score in parts)
        if min(score.value for score in parts) <= 0:
            return Scores(value=0.0, stderr=0.0, n=n, better="higher")
        mean = len(parts) / math.fsum(1 / score.value for score in parts)
        stderr = math.hypot(*((mean / score.value) ** 2 * score.stderr / len(parts) for score in parts))
        return Scores(value=mean, stderr=stderr, n=n, better="higher")
