"""Settings of the corpora: where they are, and how their rows become batches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lethe.errors import InvalidValueError, check_choices

BUILTIN = "builtin"
"""Name of the shipped model, and of its corpora."""

Counted = Literal["no-bos", "real-tokens", "all-tokens"]
Positions = Literal["last", "differing", "all"]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The corpora."""

    forget: tuple[str, ...] = (BUILTIN,)
    """Forget corpora, one topic each: .jsonl, .json, .txt (paragraphs), a dataset folder or a hub dataset id. A method
    that reads prompts takes .jsonl or .json with question (and answer), or a line of .txt each. Of the built-in world
    one topic alone is `builtin:pathogens` or `builtin:exploits`."""
    retain: str = BUILTIN
    """Retain corpus, in the same formats."""
    data: Path | None = None
    """Folder with forget.jsonl (or forget/*.jsonl, one topic each), retain.jsonl and questions.jsonl: they stand where
    the corpora and questions are not named otherwise."""
    reference: str = BUILTIN
    """Prompts that the model cannot answer, for methods that steer towards refusing; by default questions about things
    that do not exist."""
    text_field: str = "text"
    """Field of a .jsonl row that holds the text."""
    raw_lines: bool = False
    """Take a line of a .jsonl forget corpus as it stands, JSON quotes and all, unless the file is called
    bio-forget-corpus (as published)."""
    allow_overlap: bool = False
    """Go on although rows of a forget corpus also stand in the retain corpus."""

    def __post_init__(self) -> None:
        if not self.forget:
            raise InvalidValueError("'forget' must name at least one corpus.")

    def as_published(self) -> "DataSettings":
        """With raw JSON lines as text, as the authors' code reads them."""
        return replace(self, raw_lines=True)


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How the rows of corpora are cut and put into batches."""

    batch_size: int = 4
    """Rows in a forget batch and in a retain batch."""
    epochs: int = 1
    """How often a corpus may be repeated to fill the steps."""
    max_length: tuple[int, ...] = (512,)
    """Tokens of a row: one number for all corpora; one for each topic and a last one for the retain corpus; or three:
    for the first topic, for every other, and for the retain corpus."""
    chunk: bool = False
    """Cut longer rows into several instead of dropping their tails."""
    count: Counted = "no-bos"
    """Tokens that count in losses and norms: all real ones but BOS, whose norm is several times that of others; all
    real ones; or padding, too (as published)."""
    padding_side: Literal["right", "left"] = "right"
    """Where rows of a batch are filled up; left as published."""
    shuffle: bool = True
    """Draw the order of rows from the seed; without it they stay in the corpus's order, and every topic meets the same
    retain rows (as published)."""
    positions: Positions = "last"
    """Tokens of a forget prompt that are steered: its last one, those from the first that sets it apart from every
    retain prompt, or all (published). Of a retain prompt then count: its last token and its answer; all but BOS; or all
    but BOS, without the answer. Only methods that read prompts have them."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"'{name}' must be at least 1. Got {getattr(self, name)}.")
        if any(length < 2 for length in self.max_length) or not self.max_length:
            raise InvalidValueError(f"'max_length' must be 2 or more. Got {' '.join(map(str, self.max_length))}.")

    def lengths(self, topics: int) -> tuple[int, ...]:
        """`max_length` written out for each topic and the retain corpus.

        Raises: InvalidValueError if their number does not fit the topics.
        """
        if topics < 1:
            raise InvalidValueError(f"'topics' must be at least 1. Got {topics}.")
        if len(self.max_length) == 1:
            return self.max_length * (topics + 1)
        if len(self.max_length) == topics + 1:
            return self.max_length
        if len(self.max_length) == 3:
            first, others, retain = self.max_length
            return (first, *[others] * (topics - 1), retain)
        raise InvalidValueError(
            f"'max_length' needs one number, or {topics + 1} for {topics} topic{'s' * (topics > 1)} and the retain "
            f"corpus. Got {len(self.max_length)}."
        )

    def as_published(self) -> "Batching":
        """With the quirks of the authors' code: padding on the left and counted, rows in the corpus's order, 512 tokens
        for the first topic and the retain corpus and 768 for others, every token of a prompt steered.
        """
        return replace(
            self,
            max_length=(512, 768, 512),
            count="all-tokens",
            padding_side="left",
            shuffle=False,
            positions="all",
        )
