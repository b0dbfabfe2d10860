"""Batches: rows of token ids from texts or prompts, and the schedule in which a training meets them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lethe.data.prompts import with_answer
from lethe.data.settings import Counted, Positions
from lethe.data.text_files import counted
from lethe.data.tokens import encode, pad
from lethe.errors import CorpusError, EmptyBatchError, InvalidValueError
from lethe.types import Batch, Question, Topic


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


def schedule(
    forget: Mapping[str, list[str]],
    retain: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    accumulate: int = 1,
    batch_size: int,
    epochs: int,
    max_lengths: Sequence[int],
    chunk: bool,
    count: Counted,
    padding_side: Literal["left", "right"],
    shuffle: bool,
    rng: torch.Generator,
) -> Schedule:
    """Cut the corpora into the batches that training needs; `forget` has the texts of each topic by name.

    `steps` are the optimizer's; each takes `accumulate` steps of the schedule. `max_lengths` has one entry for each
    topic and a last one for the retain corpus. A corpus with too few batches starts again from its first one, up to
    `epochs` times. With `shuffle` each corpus has an order of its own, and every step a retain batch of its own;
    without (published code) the corpora's order is kept, and one retain batch serves one step of each topic in turn.
    Raises: CorpusError if a corpus has too few rows; EmptyBatchError; InvalidValueError.
    """
    counts = {"topics": len(forget), "steps": steps, "accumulate": accumulate, "batch_size": batch_size}
    for flag, value in {**counts, "epochs": epochs}.items():
        if value < 1:
            raise InvalidValueError(f"{flag!r} must be at least 1. Got {value}.")
    if len(max_lengths) != len(forget) + 1:
        raise InvalidValueError(
            f"'max_lengths' must have {len(forget) + 1} entries, one for each topic and one for the retain corpus. "
            f"Got {len(max_lengths)}."
        )

    def of_corpus(name: str, texts: list[str], max_length: int, steps_a_batch: int) -> tuple[Batch, ...]:
        """As many batches as the steps need, repeated where the corpus is too short."""
        needed = math.ceil(steps * accumulate / steps_a_batch)
        limit = needed * batch_size
        if chunk:  # A text gives several rows, so the order is drawn after cutting.
            rows = _ordered(encode_rows(texts, tokenizer, max_length=max_length, chunk=True), shuffle, rng)[:limit]
        else:
            rows = encode_rows(_ordered(texts, shuffle, rng), tokenizer, max_length=max_length, limit=limit)
        if len(rows) < batch_size:
            raise CorpusError(
                f"{name} gives {counted(len(rows), 'row')}, fewer than one batch of {batch_size}.\n"
                f"Add texts, or lower --batch-size."
            )
        found = batches(rows, tokenizer, batch_size=batch_size, count=count, padding_side=padding_side, name=name)
        if len(found) * epochs < needed:
            repeated = f", {len(found) * epochs} in {epochs} epochs" if epochs > 1 else ""
            accumulated = f" of {accumulate} batches" if accumulate > 1 else ""
            most = len(found) * epochs * steps_a_batch // accumulate
            raise CorpusError(
                f"{name} gives {counted(len(found), 'batch')} of {batch_size} "
                f"({counted(len(rows), 'row')}){repeated}; "
                f"{counted(steps, 'step')}{accumulated} over {counted(len(forget), 'topic')} need {needed}.\n"
                f"Lower {f'--steps to {most}' if most else '--accumulate'}, "
                f"or pass --epochs {math.ceil(needed / len(found))} to repeat it."
            )
        return tuple(itertools.islice(itertools.cycle(found), needed))

    topics = tuple(
        Topic(name=name, batches=of_corpus(f"forget corpus {name!r}", texts, max_length, len(forget)))
        for (name, texts), max_length in zip(forget.items(), max_lengths, strict=False)
    )
    steps_a_batch = 1 if shuffle else len(forget)
    kept = of_corpus("retain corpus", retain, max_lengths[-1], steps_a_batch)
    turns = steps * accumulate
    return Schedule(topics=topics, retain=tuple(kept[step // steps_a_batch] for step in range(turns)), steps=turns)


def _ordered(items: list[Any], shuffle: bool, rng: torch.Generator) -> list[Any]:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()] if shuffle else items


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


def forget_batches(
    prompts: Sequence[Question],
    retain: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: Positions,
    batch_size: int,
    max_length: int,
) -> tuple[Batch, ...]:
    """Forget prompts without their answers; the tokens in `positions` count."""
    rows = _encode([asked.prompt for asked in prompts], tokenizer, max_length)
    kept = _Prefixes(_encode([asked.prompt for asked in retain], tokenizer, max_length))
    first = {
        "last": lambda row: len(row) - 1,
        "differing": lambda row: min(kept.shared(row), len(row) - 1),
        "all": lambda row: 0,
    }[positions]
    return _batches(rows, [first(row) for row in rows], batch_size)


def retain_batches(
    prompts: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: Positions,
    batch_size: int,
    max_length: int,
) -> tuple[Batch, ...]:
    """Retain prompts with their answers; the last batch may be smaller.

    Where forget prompts are steered at their last token, what counts is each prompt's last token, where the decision
    falls, and its answer; else every token but BOS. With all positions the answers are left out (published).
    """
    if positions == "all":
        return whole_batches(
            [asked.prompt for asked in prompts], tokenizer, batch_size=batch_size, max_length=max_length
        )
    texts = [with_answer(asked) for asked in prompts]
    if positions == "differing":
        return whole_batches(texts, tokenizer, batch_size=batch_size, max_length=max_length)
    rows = _encode(texts, tokenizer, 10**6)
    asked_alone = _encode([asked.prompt for asked in prompts], tokenizer, 10**6)
    lasts = [min(len(prompt), len(row)) - 1 for prompt, row in zip(asked_alone, rows, strict=True)]
    cut = [max(0, len(row) - max_length) for row in rows]
    return _batches(
        [row[gone:] for row, gone in zip(rows, cut, strict=True)],
        [max(0, last - gone) for last, gone in zip(lasts, cut, strict=True)],
        batch_size,
    )


def whole_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int
) -> tuple[Batch, ...]:
    """Every text once, all tokens but BOS counting; the last batch may be smaller."""
    rows = _encode(texts, tokenizer, max_length)
    starts = [int(len(row) > 1 and row[0] == tokenizer.bos_token_id) for row in rows]
    return _batches(rows, starts, batch_size)


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids without a closing EOS; a text that is too long loses its beginning, for its end is what is asked."""
    return [row[-max_length:] for row in encode(tokenizer, [text.rstrip(" ") for text in texts])]


def _batches(rows: Sequence[Sequence[int]], firsts: Sequence[int], batch_size: int) -> tuple[Batch, ...]:
    def batch(start: int) -> Batch:
        chunk = rows[start : start + batch_size]
        ids, real = pad(chunk, side="right", device=torch.device("cpu"))
        position = torch.arange(real.shape[1])
        mask = real & (position >= torch.tensor(firsts[start : start + batch_size])[:, None])
        return Batch(input_ids=ids, attention_mask=real, mask=mask)

    return tuple(batch(start) for start in range(0, len(rows), batch_size))


class _Prefixes:
    """All beginnings of some rows."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.root: dict[int, dict] = {}
        for row in rows:
            node = self.root
            for token in row:
                node = node.setdefault(token, {})

    def shared(self, row: Sequence[int]) -> int:
        """Length of the longest beginning of `row` that one of the rows begins with, too."""
        node: Mapping[int, Mapping] = self.root
        for length, token in enumerate(row):
            if token not in node:
                return length
            node = node[token]
        return len(row)
