"""Whether the model prefers the truth to wrong answers of the same form."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics._likelihood import log_truth_ratios
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class TruthRatio(Metric):
    """From R, the probability of wrong answers over that of the paraphrased correct one, each by its own length.

    Wrong answers are averaged by their losses, a geometric mean of probabilities, as the codes do; the paper's formula
    averages probabilities. Where there is no paraphrase the answer stands in for it. On a forget set it is the mean
    of min(R, 1/R): 1 is a model that holds truth and error for equally likely, so higher is better forgotten
    (`Scores.better` is the retain sense, "lower"). On other sets it is the mean of max(0, 1 - R): 1 is a model that
    finds errors impossible. None without questions that have wrong answers.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024), arXiv 2401.06121, section 2.2.1: truth ratio; losses averaged"
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "1 on a forget set, 0 elsewhere: truth and error equally likely"
    needs: ClassVar[str] = "questions with wrong answers (perturbed_answer), and at best a paraphrase"

    def __call__(self, reading: Reading) -> Scores | None:
        """Ratio in [0, 1] over the questions with wrong answers."""
        found = log_truth_ratios(reading)
        if not found:
            return None
        if reading.data.role == "forget":
            return mean_scores([math.exp(-abs(ratio)) for ratio in found], "lower")
        return mean_scores([1 - math.exp(min(ratio, 0.0)) for ratio in found], "higher")
