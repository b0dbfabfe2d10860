"""Whether the model can be told from one that never saw the forget set."""

from dataclasses import dataclass
from typing import Any, ClassVar

from scipy.stats import ks_2samp

from lethe.inference.reading import Reading
from lethe.metrics._likelihood import log_truth_ratios
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores


@dataclass(frozen=True, kw_only=True)
class ForgetQuality(Metric):
    """p-value of the Kolmogorov-Smirnov test between the truth ratios of the model and of a retain-only model.

    Two-sided and on the log of the ratios, to which the test is blind. Above 0.05 the two are not told apart, so
    higher is better forgotten (`Scores.better` is the retain sense, "lower"); the more questions, the smaller a
    difference that is found. A p-value has no standard error. Measured on sets to forget alone; None without
    wrong answers or without a retain-only model.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024), arXiv 2401.06121, section 2.2.2: forget quality"
    higher_means: ClassVar[Knowledge] = "less"
    chance: ClassVar[str] = "uniform in [0, 1] for a model that never saw the forget set: above 0.05 in 95 of 100"
    hint: ClassVar[str] = "higher: as if never trained on it"
    needs: ClassVar[str] = "a forget set whose questions have wrong answers, and a retain-only model"

    def __call__(self, reading: Reading) -> Scores | None:
        """p-value in [0, 1] over the forget questions."""
        retain_only = reading.model.retain_only
        if retain_only is None or reading.data.role != "forget":
            return None
        found, wanted = (log_truth_ratios(one) for one in (reading, Reading(retain_only, reading.data)))
        if not found:
            return None
        test: Any = ks_2samp(found, wanted)
        return Scores(value=float(test.pvalue), stderr=0.0, n=len(found), better="lower")
