"""The command `lethe eval`: a model, or the edited one of a run, on sets, an exam or tasks of the harness."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from lethe.__version__ import __version__
from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, note, print_json, show
from lethe.cli.tables import Table, by_metric, chance
from lethe.errors import InvalidValueError, SaveError, UsageError

if TYPE_CHECKING:
    import lethe.evaluation.score_cache

UNUSED_BY_SUITE = (
    "forget", "retain", "text_field", "forget_questions", "adjacent_questions", "retain_questions", "split", "keywords",
)  # fmt: skip
"""Flags of sets that a suite brings itself."""


@dataclass(frozen=True, kw_only=True)
class _Sets:
    """Metrics on sets of questions and texts; of a run, its own sets unless others are named."""

    suite: str | None = None
    """Published benchmark, and its split: tofu, tofu:forget05; --data is the folder of its files."""
    data: Path | None = None
    """Folder with forget.jsonl, retain.jsonl and questions.jsonl, or with the files of --suite."""
    forget: tuple[str, ...] = ()
    """Forget corpora whose texts are measured."""
    retain: str | None = None
    """Retain corpus."""
    text_field: str | None = None
    """Field of a .jsonl row that holds the text; by default text."""
    forget_questions: Path | None = None
    """Questions on what should be forgotten."""
    adjacent_questions: Path | None = None
    """Questions close to the forget topics."""
    retain_questions: Path | None = None
    """Questions that should still be answered."""
    holdout: Path | None = None
    """Texts like the forget corpora that the model was never trained on, for membership attacks."""
    nli: Path | None = None
    """Folder of a model of natural language inference, for entailment."""
    retain_only: str | None = None
    """Model that was trained without the forget set: a folder or hub id."""
    scoring: Literal["letter", "cloze"] | None = None
    """Multiple choice by letters or by each option's text; of an exam, too."""
    split: Literal["dev", "test", "all"] | None = None
    """Half of the built-in questions."""
    limit: int | None = None
    """At most this many questions and passages of each set; of each subject of an exam and task of the harness, its
    first ones."""
    samples: int | None = None
    """Sampled answers to each question, at temperature 1; by default one greedy answer."""
    free_running: bool = False
    """Rank gold tokens along the model's own answer instead of teacher-forced."""
    refusals: Path | None = None
    """Wanted refusals, one a line."""
    encoder: Path | None = None
    """Folder of a sentence encoder for refusal quality."""
    keywords: tuple[str, ...] = ()
    """Forget keywords that the trigger metric puts into questions."""


@dataclass(frozen=True, kw_only=True)
class _Tests:
    """An exam, and tasks of lm-evaluation-harness; with these, metrics are measured only if sets are named as well."""

    exam: str | None = None
    """WMDP, MMLU or one like them: a file (.csv, .jsonl, .json, .parquet), a folder of such, or a hub dataset."""
    subjects: tuple[str, ...] = ()
    """Subjects of the exam; by default all."""
    shuffle: int | None = None
    """Seed: sit the exam once more with the options of every question in another order."""
    harness: tuple[str, ...] = ()
    """Tasks and groups of lm-evaluation-harness, run on the model in memory: wmdp,mmlu."""
    include: tuple[Path, ...] = ()
    """Folders with task files of your own."""
    batch_size: int | None = None
    """Rows of a batch of the harness; by default 8."""
    shots: int | None = None
    """Solved examples before each question; by default none, and each task of the harness has its own number."""
    metrics: tuple[str, ...] = ()
    """Metrics on the sets, by their names in `lethe ls metrics`; by default all."""
    chat: bool = False
    """Put questions of --exam, --harness or --suite tofu in the model's chat template."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is written."""

    out: Path | None = None
    """JSON file for the scores with their values by question; no text of a question or an answer."""
    cache: Path | None = None
    """Folder of scores measured before; by default in the user's cache directory."""
    no_cache: bool = False
    """Measure everything again, and keep nothing."""
    keep_text: Path | None = None
    """File for prompts and answers, those of forget sets too, that only you can read."""


def evaluate(
    target: Positional[str],
    sets: _Sets = _Sets(),
    tests: _Tests = _Tests(),
    kept: _Kept = _Kept(),
    device: Annotated[str, arg(help="cpu, cuda, mps or auto.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], arg(help="Number type of the weights.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model, or the edited model of a run, on questions and texts, an exam, or tasks of the harness.

    Args:
        target: A run folder, or `builtin`, a model folder or a hub id.
    """
    _check(sets, tests, kept)
    named = _given(sets)

    from lethe.runs import evaluate as measuring
    from lethe.system.atomic_files import write_json, write_private

    with progress_bars.Bars() as progress:
        cache = _cache(kept, progress)
        asked = {**named, **_given(tests), "harness": _tasks(tests), "device": device, "dtype": dtype}
        found = measuring.evaluate(
            target, **asked, cache=cache, keep_text=kept.keep_text is not None, progress=progress
        )
    if cache.reused:
        note(
            f"measured before: {cache.reused}/{cache.asked} parts, read from {cache.folder} (--no-cache measures again)"
        )
    if found.not_measured:
        needs = (f"{name} (needs {flags})" for name, flags in found.not_measured.items())
        note(f"not measured: {', '.join(needs)}")
    summary = {
        "lethe": __version__,
        "model": target,
        "scores": {name: one.summary() for name, one in found.scores.items()},
        "not_measured": found.not_measured,
        **found.about,
    }
    if kept.out is not None:
        written = {
            **summary,
            "per_example": {name: one.per_example for name, one in found.scores.items()},
            "measured_on": found.measured_on,
            "settings": {**named, **_given(tests)},
            "weights": found.weights,
            "environment": found.environment,
        }
        write_json(kept.out, written)
    if kept.keep_text is not None:
        note(f"prompts and answers: {write_private(kept.keep_text, found.texts)} (only you can read it)")
    if as_json:
        print_json(summary)
        return
    show(_scores(found.scores))
    for name, facts in found.about.items():
        for line in _about_letters(name.replace("_", " "), facts):
            show(line)
    if kept.out is not None:
        show(f"scores: {kept.out}")


EVAL = Command(
    run=evaluate,
    examples=(
        "lethe eval builtin --split dev",
        "lethe eval runs/a",
        "lethe eval ./my-model --retain-questions mine.jsonl",
        "lethe eval runs/a --exam ./mmlu --shots 5 --shuffle 0 --out mmlu.json",
        "lethe eval runs/a --harness wmdp,mmlu --batch-size 16",
        "lethe eval runs/a --suite tofu:forget05 --data ./tofu --retain-only ./retain95",
    ),
)


def _scores(scores: "Mapping[str, lethe.types.Scores]") -> Table:
    """Scores of one model."""
    from lethe.report.words import metric_and_set, with_error

    table = Table("", ("metric", "set", "value", "n", "chance"), ("value", "n", "chance"))
    for name, score in by_metric(scores).items():
        metric, data = metric_and_set(name)
        table.add(metric, data, with_error(score), str(score.n), chance(score))
    return table


def _cache(kept: _Kept, progress: progress_bars.Bars) -> "lethe.evaluation.score_cache.ScoreCache":
    """Where scores are kept; a default place that cannot be written costs a warning."""
    from lethe.evaluation.score_cache import ScoreCache, default_folder

    folder = None if kept.no_cache else kept.cache or default_folder()
    try:
        return ScoreCache(folder, progress.warn)
    except SaveError:
        if kept.cache is not None:
            raise
        progress.warn(f"{folder} cannot be written, so scores are not kept; name another folder with --cache.")
        return ScoreCache(None, progress.warn)


def _check(sets: _Sets, tests: _Tests, kept: _Kept) -> None:
    """Raises: UsageError for a flag that would do nothing, or a file that cannot be written; InvalidValueError."""
    from lethe.system.atomic_files import require_place

    if tests.exam is not None and not tests.exam.strip():
        raise UsageError("--exam names nothing.\nGive a file, a folder or a hub dataset.")
    if tests.harness and not _tasks(tests):
        raise UsageError("--harness names no task.\nGive at least one, as in --harness wmdp,mmlu.")
    lacking = {
        "--subjects": (tests.subjects, tests.exam, "--exam"),
        "--shuffle": (tests.shuffle is not None, tests.exam, "--exam"),
        "--include": (tests.include, tests.harness, "--harness"),
        "--batch-size": (tests.batch_size is not None, tests.harness, "--harness"),
        "--shots": (tests.shots is not None, tests.exam or tests.harness, "--exam or --harness"),
        "--chat": (tests.chat, tests.exam or tests.harness or sets.suite, "--exam, --harness or --suite"),
    }
    for flag, (is_given, needed, other) in lacking.items():
        if is_given and not needed:
            raise UsageError(f"{flag} does nothing without {other}.\nPass {other}, or leave {flag} out.")
    unused = [f"--{name.replace('_', '-')}" for name in UNUSED_BY_SUITE if name in _given(sets)] if sets.suite else []
    if unused:
        raise UsageError(
            f"--suite brings its own sets, so {', '.join(unused)} would do nothing.\n"
            "Measure the suite and your own sets by two commands."
        )
    if kept.cache is not None and kept.no_cache:
        raise UsageError("--cache and --no-cache contradict each other.\nLeave one of them out.")
    for name, value, least in (
        ("limit", sets.limit, 1),
        ("shots", tests.shots, 0),
        ("batch_size", tests.batch_size, 1),
    ):
        if value is not None and value < least:
            raise InvalidValueError(f"'{name}' must be at least {least}. Got {value}.")
    named = (
        *sets.forget, sets.retain, sets.forget_questions, sets.adjacent_questions, sets.retain_questions, sets.holdout,
        sets.refusals, tests.exam,
    )  # fmt: skip
    inputs = [Path(name).expanduser() for name in named if name is not None]
    require_place(kept.out, inputs)
    require_place(kept.keep_text, [*inputs, *([] if kept.out is None else [kept.out])])
    if kept.out is not None and kept.out == kept.keep_text:
        raise UsageError(f"--out and --keep-text both name {kept.out}.\nName two files.")


def _tasks(tests: _Tests) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for word in tests.harness for name in word.split(",") if name))


def _about_letters(name: str, facts: Mapping[str, Any]) -> list[str]:
    """How often one letter was picked, and what keeps the accuracy from being read as knowledge."""
    most = math.log2(facts["choices"])
    lines = [
        f"{name}: the most frequent letter is picked in {100 * facts['top_share']:.1f} % of {facts['questions']} "
        f"questions; entropy {facts['entropy_bits']:.2f} of {most:.2f} bits."
    ]
    lines += [f"{name}: {bias}" for bias in facts["biases"]]
    if facts["cut_prompts"]:
        lines.append(
            f"{name}: {facts['cut_prompts']} of {facts['questions']} prompts are beyond the model's context and lost "
            "their beginning, as in the harness: these questions were not put in full."
        )
    return lines


def _given(flags: _Sets | _Tests) -> dict[str, Any]:
    """Those flags that differ from doing nothing."""
    return {key: value for key, value in dataclasses.asdict(flags).items() if value not in (None, (), False)}
