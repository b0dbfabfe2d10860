"""Batches of token rows, how corpora are cut into them, and the schedule in which a training meets them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from lethe.data.settings import Batching, Counted
from lethe.errors import EmptyBatchError, InvalidValueError
from lethe.types import Batch, Question, Topic

Row = TypeVar("Row")


def encode_rows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chunk: bool = False,
    limit: int | None = None,
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own BOS and EOS, cut at the right to `max_length` tokens.

    `chunk` cuts a long text into consecutive rows instead of dropping its tail; each row gets BOS and EOS of
    its own. Texts that the tokenizer turns into nothing give no row. `limit` stops after that many rows.
    Raises: InvalidValueError if `max_length` leaves no room beside BOS and EOS.
    """
    rows: list[list[int]] = []
    # A few texts at a time: whole corpora of long texts need gigabytes inside the tokenizer before they are cut.
    for start in range(0, len(texts), 64):
        if limit is not None and len(rows) >= limit:
            break
        encoded = tokenizer(list(texts[start : start + 64]), return_special_tokens_mask=True, verbose=False)
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            rows += _cut(ids, special, max_length, chunk)
    return rows[:limit]


def batches(
    rows: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    count: Counted,
    padding_side: Literal["left", "right"],
    name: str = "corpus",
) -> tuple[Batch, ...]:
    """Consecutive rows as batches, each padded to its own longest row; a last incomplete batch is dropped.

    Masks come from the lengths of the rows, so it does not matter that the padding id (EOS, as published)
    is a real token elsewhere; BOS is a row's first token, and only there.
    Raises: EmptyBatchError, naming the corpus `name`, if no token of a batch counts.
    """
    padding = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(i, int)), 0)
    found = []
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        of_batch = rows[start : start + batch_size]
        width = max(map(len, of_batch))
        ids = torch.full((batch_size, width), padding)
        real = torch.zeros(batch_size, width, dtype=torch.bool)
        mask = torch.full((batch_size, width), count == "all-tokens")
        for i, row in enumerate(of_batch):
            first = width - len(row) if padding_side == "left" else 0
            begins_with_bos = row[:1] == [tokenizer.bos_token_id]
            ids[i, first : first + len(row)] = torch.tensor(row)
            real[i, first : first + len(row)] = True
            mask[i, first + (count == "no-bos" and begins_with_bos) : first + len(row)] = True
        if not mask.any():
            raise EmptyBatchError(
                f"{name}: no token counts in batch {start // batch_size + 1}; its {batch_size} rows hold BOS alone.\n"
                "Remove the texts that this tokenizer turns into nothing."
            )
        found.append(Batch(input_ids=ids, attention_mask=real, mask=mask))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every step of a run trains on; a batch that comes again is the same object, so it is recorded once."""

    topics: tuple[Topic, ...]
    """Each with one batch for each of its steps."""
    retain: tuple[Batch, ...]
    """One batch for each step."""
    steps: int

    def at(self, step: int) -> tuple[Topic, Batch, Batch]:
        """Topic, forget batch and retain batch of a step, counted from 0: topics take turns."""
        topic = self.topics[step % len(self.topics)]
        return topic, topic.batches[step // len(self.topics)], self.retain[step]


@runtime_checkable
class Corpora(Protocol):
    """What is to be forgotten and kept, as a method reads it: TextCorpora or PromptCorpora."""

    reads: ClassVar[str]
    """texts or prompts."""

    def texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Forget texts by topic, and retain texts; of prompts each with its answer."""
        ...

    def questions(self) -> dict[str, tuple[Question, ...]]:
        """The rows that are questions with answers, by set; none of running text."""
        ...

    def topics(self, batching: Batching, rng: torch.Generator) -> tuple[tuple[Topic, ...], tuple[Batch, ...]]:
        """Every row once, in an order drawn from `rng`: topics with their forget batches, and retain batches.

        Raises: EmptyBatchError, InvalidValueError.
        """
        ...

    def schedule(self, batching: Batching, rng: torch.Generator, *, steps: int, accumulate: int = 1) -> Schedule:
        """The batches of every step; `steps` are the optimizer's, and each takes `accumulate` of the schedule.

        Raises: CorpusError if a corpus has too few rows; EmptyBatchError, InvalidValueError.
        """
        ...


def shuffled(rows: Sequence[Row], rng: torch.Generator) -> list[Row]:
    """The same rows in an order drawn from `rng`."""
    return [rows[i] for i in torch.randperm(len(rows), generator=rng).tolist()]


def _cut(ids: list[int], special: list[int], max_length: int, chunk: bool) -> list[list[int]]:
    """Rows of at most `max_length` ids; `special` marks what the tokenizer put around the text."""
    before = sum(1 for _ in itertools.takewhile(bool, special))
    after = sum(1 for _ in itertools.takewhile(bool, reversed(special[before:])))
    room = max_length - before - after
    if room < 1:
        raise InvalidValueError(
            f"'max_length' must be at least {before + after + 1}: the tokenizer adds {before + after} to each row. "
            f"Got {max_length}."
        )
    prefix, body, suffix = ids[:before], ids[before : len(ids) - after], ids[len(ids) - after :]
    starts = range(0, len(body) if chunk else min(len(body), 1), room)
    return [prefix + body[start : start + room] + suffix for start in starts]
