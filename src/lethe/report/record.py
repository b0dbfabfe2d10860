"""Reading one finished run folder into plain values."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError
from lethe.types import RUN_FORMAT, HistoryRow, Role, Scores, Unit

ROLES: dict[str, Role] = {"forget": "forget", "earlier": "forget", "adjacent": "keep", "retain": "keep"}
"""Of sets in records that were written before roles were."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What report.json says about one finished run."""

    name: str
    """Name of the run folder."""
    command: str
    model: str
    method: dict[str, Any]
    """`name`, `source`, `fields`."""
    config: dict[str, Any]
    before: dict[str, Scores]
    """`metric/set` to its score; empty when evaluation was skipped."""
    after: dict[str, Scores]
    history: tuple[HistoryRow, ...]
    environment: dict[str, Any]
    timing: dict[str, dict[str, float]]
    """Phase to `seconds` and `peak_mb`."""
    patch: dict[str, Any]
    """`file`, `sha256`, `tensors`, `bytes`, `share_of_model`."""
    samples: tuple[dict[str, str], ...]
    """`set`, `prompt`, `gold`, `before`, `after`."""
    warnings: tuple[str, ...]
    solution: tuple[dict[str, Any], ...] = ()
    """Per matrix, what a solver without steps says: losses, lambda, tokens, seconds."""
    layer_search: dict[str, Any] | None = None
    """`coefficient`, `layers` (rows of scores), `chosen`; None where the layer was given."""
    measured_on: dict[str, str] = field(default_factory=dict)
    """Hash of what each score was measured on, by `metric/set`, where it was written."""

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Layers that hold an edited tensor, by the first number in each tensor's name."""
        numbers = (re.search(r"\.(\d+)\.", name) for name in self.patch["tensors"])
        return tuple(sorted({int(number[1]) for number in numbers if number}))


def read_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises: RunFolderError if the folder is missing, incomplete, damaged, or of a newer format.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise RunFolderError(_why_no_report(folder))
    return as_run(read_json(path, _REDO), path)


def read_json(path: Path, fix: str) -> Any:
    """The content of a JSON file.

    Raises: RunFolderError if it cannot be read or is none, ending in `fix`: what to do then.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path} is no text: byte {error.start} is not UTF-8.\n{fix}") from None
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).\n{fix}") from None
    except (RecursionError, ValueError):
        raise RunFolderError(f"{path} is nested too deeply, or holds too long a number.\n{fix}") from None


def read_examples(folder: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """A run's values by question: by `before` and `after`, then by `metric/set`; empty where they were not kept.

    Raises: RunFolderError if per_example.json is damaged.
    """
    path = folder / "per_example.json"
    if not path.is_file():
        return {"before": {}, "after": {}}
    fix = "Delete it to go on without values by question."
    content = read_json(path, fix)
    try:
        return {when: examples(content[when]) for when in ("before", "after")}
    except WRONG:
        raise RunFolderError(f"{path} is not as Lethe writes it.\n{fix}") from None


def examples(rows: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Values by question, by `metric/set`, from JSON.

    Raises: one of WRONG if they are something else.
    """
    return {str(name): tuple(_number(value) for value in values) for name, values in rows.items()}


def as_run(report: Any, path: Path) -> Run:
    """The run that the content of a report.json describes; `path` is where it stands or will stand.

    Raises: RunFolderError if it is not as Lethe writes it, or of a newer format.
    """
    version = report.get("format") if isinstance(report, dict) else None
    if not isinstance(version, int):
        raise RunFolderError(f"{path} is not a report of Lethe: it has no 'format' number.\n{_REDO}")
    if version > RUN_FORMAT:
        raise RunFolderError(
            f"{path} was written by a newer Lethe (format {version}; this one reads {RUN_FORMAT}).\n"
            "Upgrade: pip install --upgrade lethe-unlearn"
        )
    try:
        return _run(path.resolve().parent.name, report)
    except KeyError as error:
        raise RunFolderError(f"{path} is not as Lethe writes it: it lacks {error}.\n{_REDO}") from None
    except WRONG:
        # The error's own text may quote the file, which may hold forget text.
        raise RunFolderError(f"{path} is not as Lethe writes it: a value is of the wrong kind.\n{_REDO}") from None


WRONG = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
"""What reading values of JSON raises where they are not as Lethe writes them."""


_REDO = "Delete it and run the same command again to write it anew."


def _why_no_report(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no run folder at {folder}.\nGive the folder that was passed as --out."
    if (folder / "sweep.yaml").is_file():
        return f"{folder} is a sweep, and its runs are in folders of their own.\nName those: {folder / 'cells' / '*'}"
    if not (folder / "config.yaml").is_file():
        return (
            f"{folder} is not a run folder: it has neither report.json nor config.yaml.\n"
            "Give the folder that was passed as --out."
        )
    return f"the run is not complete: {folder} has no report.json.\nRun the same command again to resume."


def _run(name: str, report: dict[str, Any]) -> Run:
    return Run(
        name=name,
        command=str(report["command"]),
        model=str(report["model"]),
        method={key: report["method"][key] for key in ("name", "source", "fields")},
        config=dict(report["config"]),
        before=scores(report["before"]),
        after=scores(report["after"]),
        history=tuple(_history_row(row) for row in report["history"]),
        environment=dict(report["environment"]),
        timing={
            phase: {key: _number(spent[key]) for key in ("seconds", "peak_mb")}
            for phase, spent in report["timing"].items()
        },
        patch={
            "file": str(report["patch"]["file"]),
            "sha256": str(report["patch"]["sha256"]),
            "tensors": tuple(str(name) for name in report["patch"]["tensors"]),
            "bytes": _number(report["patch"]["bytes"]),
            "share_of_model": _number(report["patch"]["share_of_model"]),
        },
        samples=tuple(
            {key: str(sample[key]) for key in ("set", "prompt", "gold", "before", "after")}
            for sample in report["samples"]
        ),
        warnings=tuple(str(warning) for warning in report["warnings"]),
        solution=tuple(dict(facts) for facts in report.get("solution", ())),
        layer_search=report.get("layer_search"),
        measured_on=hashes(report),
    )


def hashes(content: Mapping[str, Any]) -> dict[str, str]:
    """Hash of what each score was measured on, by `metric/set`; empty where none was written.

    Raises: one of WRONG if they are something else.
    """
    return {str(name): str(text) for name, text in dict(content.get("measured_on", {})).items()}


def scores(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Scores]:
    """Scores by `metric/set`, from JSON.

    Raises: one of WRONG if they are something else.
    """
    return {
        name: Scores(
            value=_number(row["value"]),
            stderr=_number(row["stderr"]),
            n=int(row["n"]),
            better=row["better"],
            chance=None if row.get("chance") is None else float(row["chance"]),
            by_layer=tuple(_number(value) for value in row.get("by_layer", ())),
            unit=row["unit"] if "unit" in row else _likely_unit(row),
            label=str(row.get("label", "")),
            hint=str(row.get("hint", "")),
            role=row["role"] if "role" in row else ROLES.get(name.partition("/")[2]),
        )
        for name, row in rows.items()
    }


def _likely_unit(row: Mapping[str, Any]) -> Unit:
    """Of a score that was written before units were."""
    return "share" if row["better"] == "higher" and 0 <= _number(row["value"]) <= 1 else ""


def _history_row(row: dict[str, Any]) -> HistoryRow:
    found = HistoryRow.of(row)
    numbers = {name: _number(getattr(found, name)) for name in ("forget_loss", "retain_loss", "seconds", "peak_mb")}
    measures = {name: _number(value) for name, value in found.measures.items()}
    return replace(found, step=int(found.step), topic=str(found.topic), measures=measures, **numbers)


def _number(value: int | float | None) -> float:
    """JSON has no NaN of its own, so writers may put null for a number that does not exist."""
    return math.nan if value is None else float(value)
