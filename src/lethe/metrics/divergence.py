"""How far an edit moved what the model predicts on running text."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.data.tokens import pad
from lethe.errors import DivergedError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import LOGITS_PER_BATCH, TOKENS_PER_BATCH, batches, measuring
from lethe.inference.spans import encode_texts
from lethe.model.layers import device_of
from lethe.types import FORGOTTEN, EvalSet, Scores, mean_scores

TEXTS = 32
"""Most texts of a set that are read, the first ones: each costs two forwards."""


POSITIONS = 64
"""Predictions that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class KlToFrozen:
    """KL divergence in nats from the untouched model's next-token predictions to the edited one's: sum p0 log(p0 / p).

    Read where a token of the set's first `TEXTS` texts is predicted, as far as perplexity reads them; neither padding
    nor what follows a text's end counts. A text counts by the mean over its tokens. Exactly 0 for an unedited model.
    None on a set that is to be forgotten, whose predictions should move, and without a text of two tokens.
    """

    source: ClassVar[str] = "Kullback and Leibler 1951; as a retain measure in Maini et al., TOFU (2024)"
    better: ClassVar[str] = "lower"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "texts of a set to keep"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Nats, 0 or more, over the texts."""
        found = _compare(subject, data)
        return mean_scores([divergence for divergence, _ in found], "lower") if found else None


@dataclass(frozen=True, kw_only=True)
class TopOneAgreement:
    """Share of next-token predictions whose most probable token is the untouched model's; read as `KlToFrozen` is.

    Of equally probable tokens the one of lower id counts.
    """

    source: ClassVar[str] = "Lethe's own, beside the KL divergence: one minus the share of flipped predictions"
    better: ClassVar[str] = "higher"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "texts of a set to keep"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Share in [0, 1] over the texts."""
        found = _compare(subject, data)
        return mean_scores([agreement for _, agreement in found], "higher") if found else None


def _compare(subject: LoadedModel, data: EvalSet) -> list[tuple[float, float]]:
    """Each text's mean divergence and agreement."""
    if data.name in FORGOTTEN:
        return []
    texts = data.texts[:TEXTS]
    key: Hashable = ("divergence", texts)
    return subject.once(key, lambda: _read(subject, [row for row in encode_texts(subject, texts) if len(row) > 1]))


def _read(subject: LoadedModel, rows: Sequence[tuple[int, ...]]) -> list[tuple[float, float]]:
    if not subject.originals:
        return [(0.0, 1.0)] * len(rows)
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    model = subject.model
    # The logits of both models stand in memory at once.
    limit = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // (2 * model.config.get_text_config().vocab_size))
    with measuring(model):
        for batch in batches(list(dict.fromkeys(rows)), limit):
            ids, mask = pad(batch, side="right", device=device_of(model))
            with subject.frozen():
                frozen = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            for row, before, after in zip(batch, frozen, logits, strict=True):
                found[row] = _means(before[: len(row) - 1], after[: len(row) - 1])
    return [found[row] for row in rows]


def _means(before: Float[Tensor, "pos vocab"], after: Float[Tensor, "pos vocab"]) -> tuple[float, float]:
    """Mean divergence and agreement over positions.

    Raises: DivergedError if a prediction is NaN or infinite.
    """
    divergences, agreements = [], []
    for frozen, current in zip(before.split(POSITIONS), after.split(POSITIONS), strict=True):
        p, q = (logits.float().log_softmax(-1) for logits in (frozen, current))
        # Rounding leaves a hair below zero where both agree.
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        agreements.append((p.argmax(-1) == q.argmax(-1)).float())
    divergence = float(torch.cat(divergences).double().mean())
    if not divergence < float("inf"):
        raise DivergedError(
            "the model's output is NaN or infinite on a text, so it cannot be compared with the untouched model's.\n"
            "Load it in float32 or bfloat16, or train it with a lower learning rate or steering coefficient."
        )
    return divergence, float(torch.cat(agreements).double().mean())
