"""Whether it shows, on the outside, that the forget texts were trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethe.data.tokens import encode
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import log_probs
from lethe.inference.reading import Reading
from lethe.inference.spans import Span, context_length
from lethe.metrics._membership import auc, min_k
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import EvalSet, Scores, Unit


@dataclass(frozen=True, kw_only=True)
class PrivLeak(Metric):
    """How far a membership attack by Min-40 % departs from its result on a retain-only model, in per cent of that.

    AUC is the chance that a held-out text seems likelier to the model than a forget text: near 0 for memorised
    ones. About 0 is good; -100 says that the forget texts were memorised, far above 0 that they were made unlikely,
    which tells them apart just as well. Texts are read as far as the context goes, as in MUSE. The standard error
    takes the two areas as independent, though the texts are the same, which overstates it. `n` is the number of
    forget texts. None without texts, held-out ones, or a retain-only model; or where that model's AUC is 0.
    """

    source: ClassVar[str] = "Shi et al., MUSE (2024), arXiv 2407.06460: privacy leakage (PrivLeak) by Min-K % Prob"
    higher_means: ClassVar[Knowledge] = "neither"
    chance: ClassVar[str] = "0: as on a model that never saw the forget texts"
    unit: ClassVar[Unit] = "points"
    label: ClassVar[str] = "privacy leakage (PrivLeak)"
    needs: ClassVar[str] = "forget texts, held-out texts like them, and a retain-only model"

    assumed_auc: float | None = None
    """AUC to take for a retain-only model where there is none: 0.5, unless texts of the two groups differ by date."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Per cent, at least -100, of the AUC of a model that never saw the texts."""
        subject, data = reading.model, reading.data
        if not (data.texts and data.holdout) or (subject.retain_only is None and self.assumed_auc is None):
            return None
        found = _auc(subject, data)
        if found is None:
            return None
        area, error = found
        without = _auc(subject.retain_only, data) if subject.retain_only else (self.assumed_auc or 0.0, 0.0)
        if without is None or without[0] <= 0:
            return None
        ratio = area / without[0]
        stderr = math.hypot(error, ratio * without[1]) / without[0]
        return Scores(value=100 * (ratio - 1), stderr=100 * stderr, n=len(data.texts), better="neither")


def _auc(subject: LoadedModel, data: EvalSet) -> tuple[float, float] | None:
    """Chance that a held-out text seems likelier than one of the set, with its standard error."""
    scores = [_scores(subject, texts) for texts in (data.texts, data.holdout)]
    if not all(scores):
        return None
    # `auc` asks which group seems less likely; MUSE asks which one seems likelier.
    found = auc(*scores)
    return 1 - found.value, found.stderr


def _scores(subject: LoadedModel, texts: Sequence[str]) -> list[float]:
    limit = context_length(subject.model)
    rows = [tuple(row[:limit]) for row in encode(subject.tokenizer, texts)]
    spans = [Span(ids=row, start=1) for row in rows if len(row) > 1]
    return [min_k(tokens) for tokens in log_probs(subject.model, spans)]
