"""What was measured once: a run folder, or a file that `lethe eval --out` wrote, read for comparing."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError
from lethe.report.record import WRONG, by_question, hashes, read_json, read_run, scores, with_examples
from lethe.suites.protocol import with_model
from lethe.types import EvalSet, Scores

ASKED = (
    "data", "forget", "retain", "text_field", "reference", "forget_questions", "adjacent_questions",
    "retain_questions", "split", "limit",
)  # fmt: skip
"""Settings of a run that say which questions and texts it was measured on."""


NAME = "Name run folders (--out of lethe unlearn) or files of lethe eval --out."
"""What to do when something else was named."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run folder, or a file that `lethe eval --out` wrote."""

    path: Path
    model: str
    after: dict[str, Scores]
    """By `metric/set`; with values by question where these were kept."""
    before: dict[str, Scores] = field(default_factory=dict)
    settings: dict[str, Any] | None = None
    """Method and config of a run, without seed and folder; None for a result of `lethe eval`."""
    seed: int | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    """Of a run, its settings of ASKED."""
    measured_on: dict[str, str] = field(default_factory=dict)
    """Hash of what each score was measured on, by `metric/set`, where it was written."""


def read(path: Path) -> Measured:
    """What was measured, from a run folder or a file of `lethe eval --out`.

    Raises: RunFolderError if it is missing, incomplete, unreadable, or holds no score.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise RunFolderError(f"there is neither a run folder nor a file at {path}.\n{NAME}")
    content = read_json(path, NAME)
    if not isinstance(content, dict) or not isinstance(content.get("scores"), dict):
        raise RunFolderError(f"{path} is no result of lethe eval: it has no 'scores'.\n{NAME}")
    try:
        found = by_question(scores(content["scores"]), content.get("per_example", {}))
        measured_on = hashes(content)
    except WRONG:
        raise RunFolderError(f"{path} is not as lethe eval writes it: a value is missing or wrong.") from None
    if not found:
        raise RunFolderError(f"{path} holds no score: nothing was measured.\n{NAME}")
    return Measured(path=path, model=str(content.get("model", "")), after=found, measured_on=measured_on)


def same_questions(one: Measured, other: Measured, name: str) -> bool:
    """Whether two scores are known to be measured on the same questions in the same order."""
    hashes = one.measured_on.get(name), other.measured_on.get(name)
    if None not in hashes:
        return hashes[0] == hashes[1]
    # Written before hashes were. The questions of a suite that brings a model are asked of that model only.
    is_same_suite = with_model(one.model) == with_model(other.model)
    return one.settings is not None and one.asked == other.asked and is_same_suite


def _read_folder(path: Path) -> Measured:
    run = read_run(path)
    if not run.after:
        raise RunFolderError(
            f"{path} was not measured (--evaluate none).\n"
            f"Measure it: lethe eval {path} --out scores.json, and compare that file."
        )
    run = with_examples(run, path)
    plain = {key: value for key, value in run.config.items() if key not in ("out", "seed")}
    return Measured(
        path=path,
        model=run.model,
        before=run.before,
        after=run.after,
        settings={"model": run.model, "method": run.method["name"], "fields": run.method["fields"], "config": plain},
        seed=run.config.get("seed"),
        asked={name: run.config.get(name) for name in ASKED},
        measured_on=run.measured_on,
    )


def measured_on(scores: Iterable[str], sets: Sequence[EvalSet]) -> dict[str, str]:
    """For each score a hash of the questions and texts behind it.

    Equal hashes mean the same questions in the same order, so scores of two models may be paired by question.
    """
    content = {
        data.name: repr((data.name, data.questions, data.texts, data.scoring, data.passages, data.holdout))
        for data in sets
    }
    everything = "".join(content.values())
    return {
        name: hashlib.sha256(content.get(name.partition("/")[2], everything).encode()).hexdigest() for name in scores
    }
