"""Settings of what is measured: questions, scoring, and what metrics need beside them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lethe.errors import InvalidValueError, check_choices


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured before and after."""

    evaluate: Literal["all", "none"] = "all"
    """Measure before and after with the whole model in memory, or not at all."""
    forget_questions: Path | None = None
    """Questions on what should be forgotten: .jsonl, .json or .csv with question, choices (optional) and answer."""
    adjacent_questions: Path | None = None
    """Questions close to the forget topics that should still be answered."""
    retain_questions: Path | None = None
    """Questions that should still be answered."""
    scoring: Literal["letter", "cloze"] = "letter"
    """Multiple choice by the letters A-D (lm-evaluation-harness), or by each option's mean token log-probability."""
    split: Literal["dev", "test", "all"] = "test"
    """Half of the built-in questions: choose settings on dev, report on test."""
    limit: int | None = None
    """At most this many questions of each set, drawn with a fixed seed."""
    refusals: Path | None = None
    """Wanted refusals, one a line: answers like these count as refusals, and refusal quality is nearness to them."""
    encoder: Path | None = None
    """Folder of a sentence encoder for refusal quality; by default the measured model's own mean hidden state."""
    samples: int = 0
    """Sampled answers to each question, at temperature 1, for the metrics of answers; 0 measures the greedy answer."""
    free_running: bool = False
    """Rank gold tokens along the model's own answer, as LUNAR's code does, instead of teacher-forced."""
    metrics: tuple[str, ...] = ()
    """Metrics that are measured, by their names in `lethe ls metrics`; by default all."""
    keywords: tuple[str, ...] = ()
    """Forget keywords that the trigger metric puts into questions; by default found in the forget corpora."""
    holdout: Path | None = None
    """Texts like the forget corpora that the model was never trained on, for membership attacks; formats as of
    `forget`."""
    nli: Path | None = None
    """Folder of a model of natural language inference, for entailment; without it that is not measured."""
    show_forget: bool = False
    """Write answers to forget questions into the report; without it no text of the forget set is written anywhere."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.limit is not None and self.limit < 1:
            raise InvalidValueError(f"'limit' must be at least 1. Got {self.limit}.")
        if self.samples < 0:
            raise InvalidValueError(f"'samples' must be 0 or more. Got {self.samples}.")
