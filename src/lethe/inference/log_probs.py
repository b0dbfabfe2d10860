"""What a model predicts where tokens are asked for: log-probabilities, ranks, whole distributions.

Rows are sorted by length and batched by their number of tokens; a beginning that they share is read once, and only
positions whose prediction is asked for reach the head. Results come back in the order of the input and do not depend
on which rows shared a batch.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lethe.data.tokens import has_bos, pad
from lethe.errors import DivergedError, OutOfMemoryError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.prefix_cache import Row, SharedLayer, for_rows, rows_of, shared_beginnings
from lethe.inference.spans import Span
from lethe.model.layers import device_of
from lethe.model.losses import token_log_probs
from lethe.system.machine import explaining_memory
from lethe.types import Batch

TOKENS_PER_BATCH = 4096
"""Most tokens, padding included, that a model reads at a time."""


TOKENS_ON_CPU = 1024
"""Most tokens of a batch on a CPU, where what 4096 leave between two layers is beyond its caches: 1.3 times slower."""


LOGITS_PER_BATCH = 2**28
"""Most logits of one forward: one GiB in fp32, so that a vocabulary of 256 000 takes smaller batches."""


LOGITS_AT_ONCE = 2**24
"""Logits that are looked at together: what is worked out of them takes several times their memory."""


SEEN_PER_BATCH = 8
"""Positions that a batch may attend to, shared ones included, as a multiple of the tokens that it may read."""


Ids = TypeVar("Ids", bound=Sequence[int])
Result = TypeVar("Result")


Read = Callable[[Float[Tensor, "token vocab"], Int[Tensor, " token"]], Float[Tensor, "token ..."]]
"""What is worked out of the logits that predict some tokens, and these tokens: one row for each, whatever is beside."""


def log_probs(
    model: PreTrainedModel, spans: Sequence[Span], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Float[Tensor, " token"]]:
    """Log-probability of each asked token of each span, fp32 on the CPU; see `read_spans`."""
    return read_spans(model, spans, token_log_probs, tokens_per_batch=tokens_per_batch)


def read_spans(
    model: PreTrainedModel,
    spans: Sequence[Span],
    read: Read,
    *,
    wanted: Sequence[Sequence[int]] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Float[Tensor, "token ..."]]:
    """What `read` makes of each span's tokens from `start` on, in fp32 on the CPU.

    With `wanted` it is handed those ids, as far as both go, instead of the span's own. Spans that differ in their last
    token only, as the letters A to D do, cost one row. A batch that does not fit into memory is halved, and so are
    those after it.

    Raises: OutOfMemoryError if not even one row fits; DivergedError if the model gives NaN or infinity.
    """
    rows = rows_of(spans)
    asked = {row: [_asked_ids(spans[i], wanted[i] if wanted else None) for i in places] for row, places in rows.items()}
    reader = _Reader(model, asked, read, tokens_per_batch)
    found: dict[int, Tensor] = {}
    with measuring(model):
        for length, group in shared_beginnings({row: reader.asked_from(row) for row in rows}):
            for row, values in reader.read_group(length, group):
                found.update(zip(rows[row], values, strict=True))
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


def batches(rows: Sequence[Ids], tokens_per_batch: int) -> Iterator[list[Ids]]:
    """The rows, longest first, in batches of at most so many tokens when padded; never less than one row."""
    batch: list[Ids] = []
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


_AskedIds = tuple[int, tuple[int, ...]]
"""Position of the first prediction that is asked for, and the ids that it and those after it are asked about."""


def _asked_ids(span: Span, wanted: Sequence[int] | None) -> _AskedIds:
    own = span.ids[span.start :]
    return span.start - 1, own if wanted is None else tuple(wanted[: len(own)])


class _Reader:
    """Reads groups of rows in batches, longest first."""

    def __init__(
        self, model: PreTrainedModel, asked: Mapping[Row, Sequence[_AskedIds]], read: Read, tokens_per_batch: int
    ):
        self.model, self.asked, self.read = model, asked, read
        on_cpu = device_of(model).type == "cpu"
        self.tokens_per_batch = min(tokens_per_batch, TOKENS_ON_CPU) if on_cpu else tokens_per_batch
        self.seen_per_batch = SEEN_PER_BATCH * tokens_per_batch
        self.vocabulary = model.config.get_text_config().vocab_size
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def asked_from(self, row: Row) -> int:
        """The first position of the row whose prediction is asked for."""
        return min(first for first, _ in self.asked[row])

    def read_group(self, length: int, group: Sequence[Row]) -> Iterator[tuple[Row, list[Tensor]]]:
        """Each row with what was read for each of its spans; their beginnings of that length are read first."""
        sharing: dict[Row, list[Row]] = defaultdict(list)
        for row in group:
            sharing[row[:length]].append(row)
        waiting = list(sharing)
        while waiting:
            some = waiting[: max(1, self.tokens_per_batch // max(1, length))] if length else waiting
            layers = self._halving(partial(self._beginnings, some), some) if length else []
            if layers is not None:
                numbers = {beginning: number for number, beginning in enumerate(some)}
                rows = [row for beginning in some for row in sharing[beginning]]
                yield from self._read_rows(rows, numbers, layers, length if layers else 0)
                waiting = waiting[len(some) :]

    def _read_rows(
        self, rows: Sequence[Row], numbers: Mapping[Row, int], layers: Sequence[SharedLayer], length: int
    ) -> Iterator[tuple[Row, list[Tensor]]]:
        waiting = sorted(rows, key=len, reverse=True)
        while waiting:
            batch = waiting[: self._fitting(waiting, length)]
            seen = for_rows(layers, [numbers[row[:length]] for row in batch]) if layers else []
            values = self._halving(partial(self._forward, batch, seen, length), [row[length:] for row in batch])
            if values is not None:
                yield from zip(batch, values, strict=True)
                waiting = waiting[len(batch) :]

    def _halving(self, forward: Callable[[], Result], rows: Sequence[Row]) -> Result | None:
        """What a forward of some rows gives; None where it does not fit, and the batches after it are half as large."""
        try:
            with explaining_memory(f"scoring a row of {len(rows[0])} tokens.\nUse a smaller dtype or a GPU."):
                return forward()
        except OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside of the handler, where the error no longer holds the failed forward's tensors.
        torch.cuda.empty_cache()
        self.tokens_per_batch = len(rows) * len(rows[0]) // 2
        return None

    def _beginnings(self, rows: Sequence[Row]) -> list[SharedLayer]:
        """Keys and values of some rows of one length; nothing for models that keep something else, such as states."""
        kinds = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return []
        # All keys are kept, beyond a window too: the mask, not the cache, says which of them a position sees.
        cache, length = DynamicCache(), len(rows[0])
        self._logits(torch.tensor(rows, device=device_of(self.model)), cache, torch.tensor([length - 1]))
        kept = [
            SharedLayer(layer.keys, layer.values)
            for layer in cache.layers
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
        ]
        return kept if all(layer.get_seq_length() == length for layer in kept) else []

    def _fitting(self, rows: Sequence[Row], length: int) -> int:
        """How many of the rows, the longest first, make a batch: at least one."""
        asked: set[int] = set()
        for count, row in enumerate(rows):
            asked |= set(range(self.asked_from(row), len(row)))
            tokens, seen = (count + 1) * (len(rows[0]) - length), (count + 1) * len(rows[0])
            too_many = tokens > self.tokens_per_batch or seen > self.seen_per_batch
            if count and (too_many or (count + 1) * len(asked) * self.vocabulary > LOGITS_PER_BATCH):
                return count
        return len(rows)

    def _forward(self, batch: Sequence[Row], layers: list[SharedLayer], length: int) -> list[list[Tensor]]:
        # Padding on the right: causal layers never look there, so no family needs a mask or position ids.
        ids, _ = pad([row[length:] for row in batch], side="right", device=device_of(self.model))
        kept = sorted({position for row in batch for position in range(self.asked_from(row), len(row))})
        logits = self._logits(ids, Cache(layers=[*layers]) if layers else None, torch.tensor(kept) - length)
        place = {position: index for index, position in enumerate(kept)}
        asked = [
            (number, place[first + step], token)
            for number, row in enumerate(batch)
            for first, tokens in self.asked[row]
            for step, token in enumerate(tokens)
        ]
        where = torch.tensor(asked, device=logits.device).view(-1, 3)
        parts = where.split(max(1, LOGITS_AT_ONCE // self.vocabulary))
        found = torch.cat([self.read(logits[part[:, 0], part[:, 1]], part[:, 2]).float().cpu() for part in parts])
        values = iter(found.split([len(tokens) for row in batch for _, tokens in self.asked[row]]))
        return [[next(values) for _ in self.asked[row]] for row in batch]

    def _logits(self, ids: Tensor, cache: Cache | None, kept: Tensor) -> Tensor:
        """Logits of some positions only; a cache takes up the keys and values of all."""
        keeping = {"logits_to_keep": kept.to(ids.device)} if self.selects else {}
        seen = {"past_key_values": cache} if cache is not None else {}
        logits = self.model(input_ids=ids, use_cache=bool(seen), **keeping, **seen).logits
        return logits if self.selects else logits[:, kept.to(logits.device)]
