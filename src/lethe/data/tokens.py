"""Texts as rows of token ids, and rows as one padded tensor.

Few-shot prompts differ in their last words only, so tokenising each whole does the same work again and again: that was
half of the time of an exam on a small model.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TEXTS_PER_CALL = 256
"""A tokenizer keeps offsets, masks and strings of all texts of a call: a hundred bytes and more for each token."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own BOS and without a closing EOS; or of the bare text."""
    rows = []
    for first in range(0, len(texts), TEXTS_PER_CALL):
        rows += tokenizer(
            list(texts[first : first + TEXTS_PER_CALL]),
            add_special_tokens=special,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    eos = tokenizer.eos_token_id
    return [row[:-1] if special and len(row) > 1 and row[-1] == eos else row for row in rows]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of equal items at the beginning."""
    # Slices are compared in C, which matters for few-shot prompts: they share thousands of tokens.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def has_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the row opens with BOS."""
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def pad(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids padded to the longest row, and True where they are real."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = True
    return ids.to(device), mask.to(device)
