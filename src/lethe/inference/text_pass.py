"""One pass over texts that serves every metric of running text: predictions, norms, and how far an edit moved both."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import LOGITS_PER_BATCH, TOKENS_ON_CPU, TOKENS_PER_BATCH, batches, measuring, text_batch
from lethe.inference.prefix_cache import Row
from lethe.model import hooks
from lethe.model.layers import device_of, find_layers
from lethe.model.losses import cosine, token_log_probs
from lethe.types import Batch

POSITIONS = 64
"""Predictions that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class TextReading:
    """What one model makes of a text."""

    log_probs: Float[Tensor, " token"]
    """Of each token but the first, fp32."""
    norms: Float[Tensor, " layer"]
    """Mean Euclidean norm of the hidden states at each layer's output, over real tokens without BOS."""
    cosines: Float[Tensor, " layer"] | None = None
    """Mean cosine to the untouched model's hidden states, over the same tokens; None where it was not compared."""
    moved: tuple[float, float] | None = None
    """Mean KL divergence in nats from the untouched model's predictions, and share of those with its most probable
    token; NaN where the model is broken, None where it was not compared."""


def read_texts(
    subject: LoadedModel, rows: Sequence[Row], *, against_frozen: bool = False, predictions: Collection[Row] = ()
) -> dict[Row, TextReading]:
    """Each row read once: by the model and, with `against_frozen`, by the untouched one beside it.

    Predictions are compared of the rows in `predictions` only, for the logits of both models take memory and time.
    """
    model = subject.model
    # The logits of both models stand in memory at once.
    most = LOGITS_PER_BATCH // ((1 + against_frozen) * model.config.get_text_config().vocab_size)
    most = min(most, TOKENS_ON_CPU if device_of(model).type == "cpu" else TOKENS_PER_BATCH)
    found: dict[Row, TextReading] = {}
    with measuring(model):
        for some in batches(list(dict.fromkeys(rows)), most):
            batch = text_batch(subject, some)
            before: Tensor | None = None
            frozen: list[Tensor] = []
            if against_frozen and subject.originals:
                with subject.frozen():
                    before, frozen = _forward(model, batch, lambda _, h: h)
                before = before if any(row in predictions for row in some) else None
            read = partial(_norms_and_cosines, frozen) if against_frozen else _norms
            logits, states = _forward(model, batch, read)
            means = _means_of_rows(torch.stack(states, dim=1), batch)
            for number, row in enumerate(some):
                asked, count = torch.tensor(row[1:], device=logits.device), len(row) - 1
                moved = None
                if row in predictions:
                    # Without an edit nothing has moved.
                    moved = (0.0, 1.0) if before is None else _moved(before[number, :count], logits[number, :count])
                found[row] = TextReading(
                    log_probs=token_log_probs(logits[number, :count], asked).cpu() if count else torch.zeros(0),
                    norms=means[number, 0],
                    cosines=means[number, 1] if against_frozen else None,
                    moved=moved,
                )
    return found


def _norms(_: int, h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "1 batch pos"]:
    return torch.linalg.vector_norm(h.float(), dim=-1)[None]


def _norms_and_cosines(
    frozen: Sequence[Tensor], layer: int, h: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "2 batch pos"]:
    return torch.stack([*_norms(layer, h), cosine(h, frozen[layer] if frozen else h)])


def _forward(
    model: PreTrainedModel, batch: Batch, read: Callable[[int, Tensor], Tensor]
) -> tuple[Float[Tensor, "batch pos vocab"], list[Tensor]]:
    """The logits, and what `read` makes of each layer's number and output.

    Hooks, because the library's own `output_hidden_states` shows the last layer only after the final norm.
    """
    states: dict[int, Tensor] = {}

    def note(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        states[layer] = read(layer, hooks.hidden_of(output))

    layers = find_layers(model)
    handles = [module.register_forward_hook(partial(note, layer)) for layer, module in enumerate(layers)]
    try:
        # `return_dict` says to a cache of lower layers' states that this call wants every layer to run.
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False, return_dict=True
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, [states[layer] for layer in range(len(layers))]


def _means_of_rows(values: Float[Tensor, "kind layer batch pos"], batch: Batch) -> Float[Tensor, "batch kind layer"]:
    values, mask = values.cpu(), batch.mask.cpu()
    return torch.where(mask, values, 0).sum(-1).movedim(-1, 0) / mask.sum(-1)[:, None, None]


def _moved(before: Float[Tensor, "pos vocab"], after: Float[Tensor, "pos vocab"]) -> tuple[float, float]:
    """Mean divergence and agreement over positions."""
    divergences, agreements = [], []
    for frozen, current in zip(before.split(POSITIONS), after.split(POSITIONS), strict=True):
        p, q = (logits.float().log_softmax(-1) for logits in (frozen, current))
        # Rounding leaves a hair below zero where both agree.
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
        agreements.append((p.argmax(-1) == q.argmax(-1)).float())
    return float(torch.cat(divergences).double().mean()), float(torch.cat(agreements).double().mean())
