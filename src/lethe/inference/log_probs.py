"""Batched reading of a model that several metrics share: log-probabilities of continuations, ranks, answers.

Rows are sorted by length and batched by their number of tokens; results come back in the order of the input and do
not depend on which rows shared a batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.data.tokens import has_bos, pad
from lethe.errors import DivergedError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.spans import Span
from lethe.model.layers import device_of
from lethe.model.losses import token_log_probs
from lethe.types import Batch

TOKENS_PER_BATCH = 4096
"""Most tokens, padding included, that a model reads at a time."""


LOGITS_PER_BATCH = 2**28
"""Most logits of one forward: one GiB in fp32, so that a vocabulary of 256 000 takes smaller batches."""


Row = TypeVar("Row", bound=Sequence[int])


def read_spans(
    model: PreTrainedModel,
    spans: Sequence[Span],
    read: Callable[[Float[Tensor, "token vocab"], Int[Tensor, " token"]], Tensor],
    *,
    wanted: Sequence[Sequence[int]] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Tensor]:
    """What `read` makes of the logits that predict each span's ids from `start` on, and these ids, in fp32 on the CPU.

    With `wanted` it is handed those ids, of any number, instead of the span's own.
    Spans that differ in their last token only, as the letters A to D do, cost one row.

    Raises: DivergedError if the model gives NaN or infinity.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        rows[span.ids[:-1]].append(index)
    found: dict[int, Tensor] = {}
    device = device_of(model)
    vocabulary = model.config.get_text_config().vocab_size
    with measuring(model):
        for batch in batches(list(rows), min(tokens_per_batch, LOGITS_PER_BATCH // vocabulary)):
            # Padding on the right: causal layers never look there, so no family needs position ids.
            ids, mask = pad(batch, side="right", device=device)
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            for row, row_logits in zip(batch, logits, strict=True):
                for index in rows[row]:
                    span = spans[index]
                    asked = torch.tensor(wanted[index] if wanted else span.ids[span.start :], device=logits.device)
                    found[index] = read(row_logits[span.start - 1 : len(row)], asked).float().cpu()
    return finite([found[index] for index in range(len(spans))])


def finite(results: list[Tensor]) -> list[Tensor]:
    """What was read of each row, as it is.

    Raises: DivergedError if there is NaN or infinity in it.
    """
    broken = sum(not bool(result.isfinite().all()) for result in results)
    if broken:
        raise DivergedError(
            f"the model's output is NaN or infinite on {broken} of {len(results)} rows, so it cannot be scored.\n"
            "Load it in float32 or bfloat16, or train it with a lower learning rate or steering coefficient."
        )
    return results


def log_probs(
    model: PreTrainedModel, spans: Sequence[Span], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Tensor]:
    """Log-probability of each asked token of each span, fp32 [token] on the CPU."""
    return read_spans(model, spans, token_log_probs, tokens_per_batch=tokens_per_batch)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; each module's own mode is put back on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def batches(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[list[Row]]:
    """The rows, longest first, in batches of at most so many tokens when padded; never less than one row."""
    batch: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def text_batch(subject: LoadedModel, rows: Sequence[Sequence[int]]) -> Batch:
    """Token rows as a batch on the model's device, padded on the right; all but BOS and padding counts."""
    ids, real = pad(rows, side="right", device=device_of(subject.model))
    mask = real.clone()
    for index, row in enumerate(rows):
        mask[index, 0] = not has_bos(subject.tokenizer, row)
    return Batch(input_ids=ids, attention_mask=real, mask=mask)
