"""A beginning that rows share is read once: which rows share one so that the model reads the fewest tokens."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lethe.data.tokens import common_length
from lethe.inference.spans import Span

FORWARD_COST = 256
"""What one more forward costs, in tokens read: below this a shared beginning is not worth reading apart."""


Row = tuple[int, ...]


Group = tuple[int, list[Row]]
"""A number of tokens at the beginning, and rows."""


def rows_of(spans: Sequence[Span]) -> dict[Row, list[int]]:
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


def shared_beginnings(rows: Mapping[Row, int]) -> list[Group]:
    """Groups of rows, and the number of tokens at their beginnings that are read apart, once for all who share one.

    Each row comes with the number of its tokens that may be shared. Groups are those with the fewest tokens to read,
    where a forward of its own for beginnings costs `FORWARD_COST` more. A long beginning has a group of its own; short
    ones of equal length are read together, as those of a question's answers. Rows that share nothing are the group of
    length 0, which comes first.
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
    singles: list[Group] = [(0, [ordered[index] for index in root.singles])] * bool(root.singles)
    nested_groups = singles + [(length, ordered[first:end]) for length, first, end in root.groups]
    return min(nested_groups, _pooled(rows), key=_cost)


def _pooled(rows: Mapping[Row, int]) -> list[Group]:
    """Rows by the length of all that they may share, where enough of them share it; the others are of length 0."""
    sharing: dict[Row, list[Row]] = defaultdict(list)
    for row in sorted(rows):
        sharing[row[: rows[row]]].append(row)
    pools: dict[int, list[Row]] = defaultdict(list)
    for beginning, some in sharing.items():
        pools[len(beginning) if len(some) > 1 else 0] += some
    for length, some in list(pools.items()):
        if _cost([(length, some)]) > _cost([(0, some)]):
            pools[0] += pools.pop(length)
    return sorted(pools.items())


def _cost(groups: Sequence[Group]) -> int:
    return sum(
        bool(length) * FORWARD_COST
        + length * len({row[:length] for row in some})
        + sum(len(row) - length for row in some)
        for length, some in groups
    )


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


class SharedLayer(DynamicLayer):
    """One layer's keys and values of beginnings, each seen by some rows of a batch and changed by none."""

    def __init__(self, keys: Tensor, values: Tensor, which: Int[Tensor, " row"] | None = None):
        """With `which` beginning each row has; without it they share the only one, or each has its own."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.shared, self.which = keys, values, (keys, values), which

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of the beginnings and the rows; nothing is kept, so one layer's at a time are in memory."""
        pairs = zip(self.shared, (key_states, value_states), strict=True)
        keys, values = (torch.cat([self._of_rows(old, len(new)), new], dim=-2) for old, new in pairs)
        return keys, values

    def _of_rows(self, old: Tensor, count: int) -> Tensor:
        return old.expand(count, -1, -1, -1) if self.which is None else old[self.which]


def for_rows(layers: Sequence[SharedLayer], which: Sequence[int]) -> list[SharedLayer]:
    """The same beginnings for the rows of a batch, each of which has one of them."""
    first = layers[0]
    keys, values = first.shared
    if len(keys) == 1:
        return [*layers]
    index = torch.tensor(which, device=keys.device)
    # Whoever remembers what was read before tells it by the first layer's keys: there they are written out.
    return [SharedLayer(keys[index], values[index]), *(SharedLayer(*layer.shared, index) for layer in layers[1:])]
