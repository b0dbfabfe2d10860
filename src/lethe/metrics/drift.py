"""How an edit moved the hidden states, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.data.tokens import has_bos
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, measuring, text_batch
from lethe.inference.spans import encode_texts
from lethe.model import hooks
from lethe.model.layers import find_layers
from lethe.model.losses import cosine
from lethe.types import Batch, EvalSet, Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class ActivationNorm:
    """Mean Euclidean norm of the hidden state at each layer's output; its value is the mean over layers.

    Read on the set's texts, or on its prompts if it has none, over real tokens without BOS. A text counts by the
    mean over its tokens (`per_example`, also a mean over layers). None without a token to read.
    """

    source: ClassVar[str] = "Li et al., The WMDP Benchmark (2024): activation norms of RMU on forget and retain text"
    better: ClassVar[str] = "neither"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "texts or questions"

    texts: int = 64
    """Most texts that are read, the first ones."""

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Norm >= 0 of the hidden states."""

        def norms(batch: Batch) -> list[Tensor]:
            return _read_layers(subject.model, batch, lambda _, h: torch.linalg.vector_norm(h.float(), dim=-1))

        return _score(subject, _rows(subject, data, self.texts), norms)


@dataclass(frozen=True, kw_only=True)
class CosineToFrozen:
    """Mean cosine between the hidden states of the edited and the untouched model, read as `ActivationNorm` does.

    Exactly 1 at every layer for an unedited model, and at every layer before the first edited one.
    """

    source: ClassVar[str] = "Li et al., The WMDP Benchmark (2024): what RMU's retain loss is to keep in place"
    better: ClassVar[str] = "neither"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "texts or questions"

    texts: int = 64
    """Most texts that are read, the first ones."""

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Cosine in [-1, 1] to the untouched model."""

        def cosines(batch: Batch) -> list[Tensor]:
            with subject.frozen():
                frozen = _read_layers(subject.model, batch, lambda _, h: h)
            return _read_layers(subject.model, batch, lambda layer, h: cosine(h, frozen[layer]))

        return _score(subject, _rows(subject, data, self.texts), cosines)


def _rows(subject: LoadedModel, data: EvalSet, count: int) -> list[tuple[int, ...]]:
    texts = data.texts or tuple(question.prompt for question in data.questions)
    rows = encode_texts(subject, texts[:count])
    return [row for row in rows if len(row) > has_bos(subject.tokenizer, row)]


def _score(
    subject: LoadedModel,
    rows: list[tuple[int, ...]],
    measure: Callable[[Batch], list[Float[Tensor, "batch pos"]]],
) -> Scores | None:
    """Scores of what `measure` reads from each token, layer by layer."""
    if not rows:
        return None
    means: dict[tuple[int, ...], Float[Tensor, " layer"]] = {}
    with measuring(subject.model):
        for batch_rows in batches(list(dict.fromkeys(rows)), TOKENS_PER_BATCH):
            batch = text_batch(subject, batch_rows)
            values = torch.stack([layer.cpu() for layer in measure(batch)])
            mask = batch.mask.cpu()
            by_row = torch.where(mask, values, 0).sum(-1).T / mask.sum(-1)[:, None]
            means.update(zip(batch_rows, by_row, strict=True))
    by_text = torch.stack([means[row] for row in rows]).double()
    scores = mean_scores(by_text.mean(1).tolist(), "neither")
    return replace(scores, by_layer=tuple(by_text.mean(0).tolist()))


def _read_layers(model: PreTrainedModel, batch: Batch, read: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """What `read` makes of each layer's number and output; the head does not run.

    Hooks, because the library's own `output_hidden_states` shows the last layer only after the final norm.
    """
    found: dict[int, Tensor] = {}

    def note(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        found[layer] = read(layer, hooks.hidden_of(output))

    layers = find_layers(model)
    handles = [module.register_forward_hook(partial(note, layer)) for layer, module in enumerate(layers)]
    try:
        model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in range(len(layers))]
