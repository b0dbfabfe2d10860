"""Log-probabilities of the last tokens of many rows: a beginning that rows share is read once.

Which rows share one is worked out so that the model reads the fewest tokens. Only positions whose prediction is asked
for reach the head. Results come back in the order of the input and do not depend on what shared a batch.
"""

import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lethe.data.tokens import common_length, pad
from lethe.errors import OutOfMemoryError
from lethe.inference.log_probs import LOGITS_PER_BATCH, TOKENS_PER_BATCH, finite, measuring
from lethe.inference.spans import Span
from lethe.model.layers import device_of
from lethe.system.machine import explaining_memory

FORWARD_COST = 256
"""What one more forward costs, in tokens read: below this a shared beginning is not worth reading apart."""


TOKENS_ON_CPU = 1024
"""Most tokens of a batch on a CPU, where what 4096 leave between two layers is beyond its caches: 1.3 times slower."""


SEEN_PER_BATCH = 8
"""Positions that a batch may attend to, shared ones included, as a multiple of the tokens that it may read."""


Row = tuple[int, ...]


def shared_log_probs(
    model: PreTrainedModel, spans: Sequence[Span], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Float[Tensor, " token"]]:
    """Log-probability of each asked token of each span, fp32 on the CPU.

    A batch that does not fit into memory is halved, and so are those after it.

    Raises: OutOfMemoryError if not even one row fits; DivergedError if the model gives NaN or infinity.
    """
    rows = _rows(spans)
    asking = {row: [spans[index] for index in indices] for row, indices in rows.items()}
    reader = _Reader(model, asking, tokens_per_batch)
    found: dict[int, Tensor] = {}
    with measuring(model):
        for length, group in shared_beginnings({row: reader.asked_from(row) for row in rows}):
            for row, values in reader.read(length, group):
                found.update(zip(rows[row], values, strict=True))
    return finite([found[index] for index in range(len(spans))])


def _rows(spans: Sequence[Span]) -> dict[Row, list[int]]:
    """The rows to read, each with the places of the spans that it answers.

    A row that is the beginning of another is not read: in many vocabularies " A" is one token and " B" is two, and
    the answers to a question would cost two rows.
    """
    rows: dict[Row, list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        rows[span.ids[:-1]].append(index)
    first = {row: min(spans[index].start for index in indices) for row, indices in rows.items()}
    kept: dict[Row, list[int]] = {}
    longer: Row = ()
    # From the last to the first: a row stands right behind those that it is the beginning of.
    for row in sorted(rows, reverse=True):
        # What is asked for first stays so: the longer row shares as many tokens as before.
        if longer[: len(row)] == row and first[longer] <= first[row]:
            kept[longer] += rows[row]
        else:
            longer, kept[row] = row, rows[row]
    return kept


def shared_beginnings(rows: Mapping[Row, int]) -> list[tuple[int, list[Row]]]:
    """Groups of rows, and the number of tokens at their beginning that is to be read once for all of the group.

    Each row comes with the number of its tokens that may be shared. Groups are those with the fewest tokens to read,
    where a beginning of its own forward costs `FORWARD_COST` more. Rows that share nothing are the group of length 0,
    which comes first.
    """
    ordered = sorted(rows)
    total = [0, *itertools.accumulate(map(len, ordered))]
    # Intervals of rows with equal beginnings, nested in each other, found in one pass over neighbours.
    nested = [_Interval(length=0, first=0)]
    for last, (row, following) in enumerate(itertools.zip_longest(ordered, ordered[1:])):
        length = min(common_length(row, following), rows[row], rows[following]) if following is not None else 0
        done = _Interval(length=0, first=last, cost=len(row), singles=[last])
        while nested[-1].length > length:
            top = nested.pop()
            top.take(done)
            count, tokens = last + 1 - top.first, total[last + 1] - total[top.first]
            together = FORWARD_COST + top.length + tokens - count * top.length
            if together < top.cost:
                top.cost, top.singles, top.groups = together, [], [(top.length, top.first, last + 1)]
            done = top
        if nested[-1].length < length:
            nested.append(_Interval(length=length, first=done.first))
        nested[-1].take(done)
    root = nested[0]
    singles = [(0, [ordered[index] for index in root.singles])] * bool(root.singles)
    return singles + [(length, ordered[first:end]) for length, first, end in root.groups]


@dataclass
class _Interval:
    """Neighbouring rows with a common beginning, and the cheapest way found to read them."""

    length: int
    first: int
    cost: int = 0
    singles: list[int] = field(default_factory=list)
    groups: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, inner: "_Interval") -> None:
        self.cost += inner.cost
        self.singles += inner.singles
        self.groups += inner.groups


class _Shared(DynamicLayer):
    """One layer's keys and values of a beginning, seen by every row of a batch and changed by none."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of the beginning and the rows; nothing is kept, so one layer's at a time are in memory."""
        parts = ((self.keys, key_states), (self.values, value_states))
        keys, values = (
            torch.cat([old.expand(len(new), -1, -1, -1), new], dim=-2) for old, new in parts if old is not None
        )
        return keys, values


class _Reader:
    """Reads groups of rows in batches, longest first."""

    def __init__(self, model: PreTrainedModel, spans: Mapping[Row, Sequence[Span]], tokens_per_batch: int):
        self.model, self.spans = model, spans
        on_cpu = device_of(model).type == "cpu"
        self.tokens_per_batch = min(tokens_per_batch, TOKENS_ON_CPU) if on_cpu else tokens_per_batch
        self.seen_per_batch = SEEN_PER_BATCH * tokens_per_batch
        self.vocabulary = model.config.get_text_config().vocab_size
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def asked_from(self, row: Row) -> int:
        """The first position of the row whose prediction is asked for."""
        return min(span.start for span in self.spans[row]) - 1

    def read(self, length: int, group: Sequence[Row]) -> Iterator[tuple[Row, list[Tensor]]]:
        """Each row with the log-probabilities asked for by each of its spans."""
        layers = self._beginning(group[0][:length]) if length else None
        length = length if layers else 0
        waiting = sorted(group, key=len, reverse=True)
        while waiting:
            batch = waiting[: self._fitting(waiting, length)]
            values = None
            try:
                with explaining_memory(f"scoring a row of {len(batch[0])} tokens.\nUse a smaller dtype or a GPU."):
                    values = self._forward(batch, layers, length)
            except OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if values is None:
                # Outside of the handler, where the error no longer holds the failed forward's tensors.
                torch.cuda.empty_cache()
                self.tokens_per_batch = len(batch) * (len(batch[0]) - length) // 2
                continue
            yield from zip(batch, values, strict=True)
            waiting = waiting[len(batch) :]

    def _beginning(self, ids: Row) -> list[_Shared] | None:
        """Keys and values of the beginning; None for models that keep something else, such as states."""
        kinds = {type(layer) for layer in DynamicCache(config=self.model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        # All keys are kept, beyond a window too: the mask, not the cache, says which of them a position sees.
        cache = DynamicCache()
        self._logits(torch.tensor([ids], device=device_of(self.model)), cache, torch.tensor([len(ids) - 1]))
        kept = [
            _Shared(layer.keys, layer.values)
            for layer in cache.layers
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
        ]
        return kept if all(layer.get_seq_length() == len(ids) for layer in kept) else None

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

    def _forward(self, batch: Sequence[Row], layers: list[_Shared] | None, length: int) -> list[list[Tensor]]:
        # Padding on the right: causal layers never look there, so no family needs a mask or position ids.
        ids, _ = pad([row[length:] for row in batch], side="right", device=device_of(self.model))
        kept = sorted({position for row in batch for position in range(self.asked_from(row), len(row))})
        logits = self._logits(ids, Cache(layers=[*layers]) if layers else None, torch.tensor(kept) - length)
        place = {position: index for index, position in enumerate(kept)}
        spots: dict[tuple[int, int], int] = {}
        asked: list[tuple[int, int]] = []
        for number, row in enumerate(batch):
            for span in self.spans[row]:
                for position in range(span.start, len(span.ids)):
                    spot = spots.setdefault((number, place[position - 1]), len(spots))
                    asked.append((spot, span.ids[position]))
        where = torch.tensor(list(spots), device=logits.device)
        found = _log_probs(logits[where[:, 0], where[:, 1]], torch.tensor(asked, device=logits.device))
        values = iter(found.cpu().split([len(span.ids) - span.start for row in batch for span in self.spans[row]]))
        return [[next(values) for _ in self.spans[row]] for row in batch]

    def _logits(self, ids: Tensor, cache: Cache | None, kept: Tensor) -> Tensor:
        """Logits of some positions only; a cache takes up the keys and values of all."""
        keeping = {"logits_to_keep": kept.to(ids.device)} if self.selects else {}
        seen = {"past_key_values": cache} if cache is not None else {}
        logits = self.model(input_ids=ids, use_cache=bool(seen), **keeping, **seen).logits
        return logits if self.selects else logits[:, kept.to(logits.device)]


def _log_probs(logits: Float[Tensor, "spot vocab"], which: Int[Tensor, "asked 2"]) -> Float[Tensor, " asked"]:
    """In fp32, the log-probability of each token id (second column) at its spot (first column)."""
    logits = logits.float()
    return logits[which[:, 0], which[:, 1]] - logits.logsumexp(-1)[which[:, 0]]
