"""Corpora of running text as a training meets them: topics, a retain corpus, and the batches of both."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from lethe.data.batches import Batching, Schedule, batches, encode_rows, shuffled
from lethe.data.text_files import counted
from lethe.errors import CorpusError, InvalidValueError
from lethe.types import Batch, Question, Topic


@dataclass(frozen=True, kw_only=True, eq=False)
class TextCorpora:
    """Texts to forget, by topic, and texts to keep."""

    forget: Mapping[str, Sequence[str]] = field(repr=False)
    retain: Sequence[str] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    def texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Forget texts by topic, and retain texts."""
        return {name: list(texts) for name, texts in self.forget.items()}, list(self.retain)

    def questions(self) -> dict[str, tuple[Question, ...]]:
        """None: running text asks nothing."""
        return {}

    def topics(self, batching: Batching, rng: torch.Generator) -> tuple[tuple[Topic, ...], tuple[Batch, ...]]:
        """Every row once, in an order drawn from `rng`, padded on the right; a corpus's last batch may be smaller.

        Raises: EmptyBatchError, InvalidValueError.
        """

        def of_corpus(name: str, texts: Sequence[str], max_length: int) -> tuple[Batch, ...]:
            rows = encode_rows(shuffled(texts, rng), self.tokenizer, max_length=max_length, chunk=batching.chunk)
            whole = len(rows) - len(rows) % batching.batch_size
            return tuple(
                batch
                for part, size in ((rows[:whole], batching.batch_size), (rows[whole:], len(rows) - whole))
                if part
                for batch in batches(
                    part, self.tokenizer, batch_size=size, count=batching.count, padding_side="right", name=name
                )
            )

        lengths = batching.lengths(len(self.forget))
        topics = tuple(
            Topic(name=name, batches=of_corpus(f"forget corpus {name!r}", texts, max_length))
            for (name, texts), max_length in zip(self.forget.items(), lengths, strict=False)
        )
        return topics, of_corpus("retain corpus", self.retain, lengths[-1])

    def schedule(self, batching: Batching, rng: torch.Generator, *, steps: int, accumulate: int = 1) -> Schedule:
        """The batches of every step; a corpus with too few starts again from its first one, up to `epochs` times.

        Raises: CorpusError if a corpus has too few rows; EmptyBatchError, InvalidValueError.
        """
        for name, value in {"steps": steps, "accumulate": accumulate}.items():
            if value < 1:
                raise InvalidValueError(f"{name!r} must be at least 1. Got {value}.")
        lengths, turns = batching.lengths(len(self.forget)), steps * accumulate

        def of_corpus(name: str, texts: Sequence[str], max_length: int, steps_a_batch: int) -> tuple[Batch, ...]:
            """As many batches as the steps need, repeated where the corpus is too short."""
            needed = math.ceil(turns / steps_a_batch)
            rows = self._rows(batching, texts, max_length, needed * batching.batch_size, rng)
            if len(rows) < batching.batch_size:
                raise CorpusError(
                    f"{name} gives {counted(len(rows), 'row')}, fewer than one batch of {batching.batch_size}.\n"
                    f"Add texts, or lower --batch-size."
                )
            once = batches(
                rows,
                self.tokenizer,
                batch_size=batching.batch_size,
                count=batching.count,
                padding_side=batching.padding_side,
                name=name,
            )
            most = len(once) * batching.epochs
            if most < needed:
                repeated = f", {most} in {batching.epochs} epochs" if batching.epochs > 1 else ""
                accumulated = f" of {accumulate} batches" if accumulate > 1 else ""
                enough_for = most * steps_a_batch // accumulate
                raise CorpusError(
                    f"{name} gives {counted(len(once), 'batch')} of {batching.batch_size} "
                    f"({counted(len(rows), 'row')}){repeated}; "
                    f"{counted(steps, 'step')}{accumulated} over {counted(len(self.forget), 'topic')} need {needed}.\n"
                    f"Lower {f'--steps to {enough_for}' if enough_for else '--accumulate'}, "
                    f"or pass --epochs {math.ceil(needed / len(once))} to repeat it."
                )
            return tuple(itertools.islice(itertools.cycle(once), needed))

        topics = tuple(
            Topic(name=name, batches=of_corpus(f"forget corpus {name!r}", texts, max_length, len(self.forget)))
            for (name, texts), max_length in zip(self.forget.items(), lengths, strict=False)
        )
        steps_a_batch = 1 if batching.shuffle else len(self.forget)
        retain = of_corpus("retain corpus", self.retain, lengths[-1], steps_a_batch)
        return Schedule(
            topics=topics, retain=tuple(retain[turn // steps_a_batch] for turn in range(turns)), steps=turns
        )

    def _rows(
        self, batching: Batching, texts: Sequence[str], max_length: int, limit: int, rng: torch.Generator
    ) -> list[list[int]]:
        if not batching.chunk:
            texts = shuffled(texts, rng) if batching.shuffle else texts
            return encode_rows(texts, self.tokenizer, max_length=max_length, limit=limit)
        # A text gives several rows, so the order is drawn after cutting.
        rows = encode_rows(texts, self.tokenizer, max_length=max_length, chunk=True)
        return (shuffled(rows, rng) if batching.shuffle else rows)[:limit]
