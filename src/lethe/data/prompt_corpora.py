"""Corpora of prompts as a training meets them: what is refused, what is answered, and the batches of both."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from lethe.data.batches import Schedule, shuffled
from lethe.data.prompts import Prompts, with_answer
from lethe.data.settings import Batching, Positions
from lethe.data.tokens import common_length, encode, pad
from lethe.types import Batch, Question, Topic


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptCorpora:
    """Prompts to refuse, by topic, prompts to answer as before, and prompts that the model cannot answer."""

    reads: ClassVar[str] = "prompts"

    prompts: Prompts = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Forget prompts by topic, and retain prompts, each with its answer."""
        return self.prompts.texts()

    def questions(self) -> dict[str, tuple[Question, ...]]:
        """The prompts of each set that all have an answer; those that nobody can answer are the unknown set."""
        return self.prompts.questions()

    def topics(self, batching: Batching, rng: torch.Generator) -> tuple[tuple[Topic, ...], tuple[Batch, ...]]:
        """Every prompt once, in an order drawn from `rng`: topics with forget and reference batches, and retain ones.

        A corpus's last batch may be smaller. Reference prompts are in their own order.
        Raises: InvalidValueError.
        """
        lengths = batching.lengths(len(self.prompts.forget))
        reference = whole_batches(
            [asked.prompt for asked in self.prompts.reference],
            self.tokenizer,
            batch_size=batching.batch_size,
            max_length=lengths[-1],
        )
        topics = tuple(
            Topic(
                name=name,
                batches=forget_batches(
                    shuffled(prompts, rng),
                    self.prompts.retain,
                    self.tokenizer,
                    positions=batching.positions,
                    batch_size=batching.batch_size,
                    max_length=max_length,
                ),
                reference=reference,
            )
            for (name, prompts), max_length in zip(self.prompts.forget.items(), lengths, strict=False)
        )
        retain = retain_batches(
            shuffled(self.prompts.retain, rng),
            self.tokenizer,
            positions=batching.positions,
            batch_size=batching.batch_size,
            max_length=lengths[-1],
        )
        return topics, retain

    def schedule(self, batching: Batching, rng: torch.Generator, *, steps: int, accumulate: int = 1) -> Schedule:
        """The batches of every step; the corpora are repeated as the steps need.

        Raises: InvalidValueError.
        """
        topics, retain = self.topics(batching, rng)
        turns = steps * accumulate
        each = -(-turns // len(topics))
        return Schedule(
            topics=tuple(
                replace(topic, batches=tuple(itertools.islice(itertools.cycle(topic.batches), each)))
                for topic in topics
            ),
            retain=tuple(itertools.islice(itertools.cycle(retain), turns)),
            steps=turns,
        )


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
    ordered = sorted(_encode([asked.prompt for asked in retain], tokenizer, max_length))
    first = {
        "last": lambda row: len(row) - 1,
        "differing": lambda row: min(_shared(row, ordered), len(row) - 1),
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


def _shared(row: list[int], ordered: list[list[int]]) -> int:
    """Length of the longest beginning of `row` that one of the ordered rows begins with, too."""
    place = bisect.bisect(ordered, row)
    # Of rows in order, the two beside it have the most in common with it.
    return max((common_length(row, other) for other in ordered[max(0, place - 1) : place + 1]), default=0)
