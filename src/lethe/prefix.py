"""Log-probabilities of the last tokens of many rows: a beginning that rows share is read once.

Which rows share one is worked out so that the model reads the fewest tokens. Only positions whose prediction is asked
for reach the head. Results come back in the order of the input and do not depend on what shared a batch.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lethe import decoder
from lethe.losses import token_log_probs
from lethe.scoring import LOGITS_PER_BATCH, TOKENS_PER_BATCH, Span, measuring, pad
from lethe.types import DivergedError, OutOfMemoryError

FORWARD_COST = 256
"""What one more forward costs, in tokens read: below this a shared beginning is not worth reading apart."""
SEEN_PER_BATCH = 8
"""Positions that a batch may attend to, shared ones included, as a multiple of the tokens it may read."""

Row = tuple[int, ...]


def shared_log_probs(
    model: PreTrainedModel, spans: Sequence[Span], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Float[Tensor, " token"]]:
    """Log-probability of each asked token of each span, fp32 on the CPU.

    A batch that does not fit into memory is halved, and so are those after it.

    Raises: OutOfMemoryError if a single row does not fit; DivergedError if the model gives NaN or infinity.
    """
    rows: dict[Row, list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        rows[span.ids[:-1]].append(index)
    first_asked = {row: min(spans[index].start - 1 for index in indices) for row, indices in rows.items()}
    reader = _Reader(model, tokens_per_batch)
    found: dict[int, Tensor] = {}
    with measuring(model):
        for length, group in shared_prefixes(first_asked):
            for row, offset, log_probs in reader.read(group, length, first_asked, rows, spans):
                for index in rows[row]:
                    span = spans[index]
                    at = range(span.start - 1 - offset, len(row) - offset)
                    found[index] = torch.stack([log_probs[where, span.ids[where + offset + 1]] for where in at])
    return _finite([found[index] for index in range(len(spans))])
