"""The record of a finished run: report.json and the values by question beside it, written and read by one class."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError
from lethe.system.atomic_files import read_number
from lethe.types import RUN_FORMAT, HistoryRow, Role, Scores, Unit

ROLES: dict[str, Role] = {"forget": "forget", "earlier": "forget", "adjacent": "keep", "retain": "keep"}
"""Of sets in records that were written before roles were."""


WRONG = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
"""What reading values of JSON raises where they are not as Lethe writes them."""


_REDO = "Delete it and run the same command again to write it anew."


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that is known of one finished run; all of its pages are made of this alone."""

    name: str
    """Name of the run folder; stands in no file."""
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
    """`file`, `sha256`, `bytes`, `tensors` (their names), `share_of_model`."""
    samples: tuple[dict[str, str], ...]
    """`set`, `prompt`, `gold`, `before`, `after`."""
    warnings: tuple[str, ...]
    measured_on: dict[str, str] = field(default_factory=dict)
    """Hash of what each score was measured on, by `metric/set`, where it was written."""
    solution: tuple[dict[str, Any], ...] = ()
    """Per matrix, what a solver without steps says: losses, lambda, tokens, seconds."""
    reference_refusal_rate: float | None = None
    """Share of reference prompts that the untouched model refuses; None for a method that reads none."""
    layer_search: dict[str, Any] | None = None
    """`coefficient`, `layers` (rows of scores), `chosen`; None where the layer was given."""

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Layers that hold an edited tensor, by the first number in each tensor's name."""
        matches = (re.search(r"\.(\d+)\.", name) for name in self.patch["tensors"])
        return tuple(sorted({int(match[1]) for match in matches if match}))

    def to_json(self) -> dict[str, Any]:
        """The content of report.json, without the values by question."""
        content = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "name"}
        for when in ("before", "after"):
            content[when] = {name: score.summary() for name, score in content[when].items()}
        return {"format": RUN_FORMAT, **content, "history": [row.as_dict() for row in self.history]}

    def examples_to_json(self) -> dict[str, dict[str, Sequence[float]]]:
        """The content of per_example.json: by `before` and `after`, then by `metric/set`."""
        return {
            when: {name: score.per_example for name, score in scores.items()}
            for when, scores in (("before", self.before), ("after", self.after))
        }

    @classmethod
    def from_json(cls, content: Any, path: Path) -> "RunRecord":
        """What `to_json` wrote, as it stands at `path`; unknown keys are left out.

        Raises: RunFolderError if it is not as Lethe writes it, or of a newer format.
        """
        version = content.get("format") if isinstance(content, dict) else None
        if not isinstance(version, int):
            raise RunFolderError(f"{path} is not a report of Lethe: it has no 'format' number.\n{_REDO}")
        if version > RUN_FORMAT:
            raise RunFolderError(
                f"{path} was written by a newer Lethe (format {version}; this one reads {RUN_FORMAT}).\n"
                "Upgrade: pip install --upgrade lethe-unlearn"
            )
        try:
            return _record(path.resolve().parent.name, content)
        except KeyError as error:
            raise RunFolderError(f"{path} is not as Lethe writes it: it lacks {error}.\n{_REDO}") from None
        except WRONG:
            # The error's own text may quote the file, which may hold forget text.
            raise RunFolderError(f"{path} is not as Lethe writes it: a value is of the wrong kind.\n{_REDO}") from None


def read_run(folder: Path) -> RunRecord:
    """The run that a folder holds.

    Raises: RunFolderError if the folder is missing, incomplete, damaged, or of a newer format.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise RunFolderError(_why_no_report(folder))
    return RunRecord.from_json(read_json(path, _REDO), path)


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


def with_examples(record: RunRecord, folder: Path) -> RunRecord:
    """The record of a run folder with its values by question, where they were kept.

    Raises: RunFolderError if per_example.json is damaged.
    """
    path = folder / "per_example.json"
    if not path.is_file():
        return record
    fix = "Delete it to go on without values by question."
    content = read_json(path, fix)
    try:
        before, after = (
            by_question(scores, content[when]) for when, scores in (("before", record.before), ("after", record.after))
        )
    except WRONG:
        raise RunFolderError(f"{path} is not as Lethe writes it.\n{fix}") from None
    return dataclasses.replace(record, before=before, after=after)


def by_question(scores: Mapping[str, Scores], values: Mapping[str, Any]) -> dict[str, Scores]:
    """Scores with their values by question, from JSON.

    Raises: one of WRONG if they are something else.
    """
    read = {name: tuple(map(read_number, row)) for name, row in values.items()}
    return {name: dataclasses.replace(score, per_example=read.get(name, ())) for name, score in scores.items()}


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
            value=read_number(row["value"]),
            stderr=read_number(row["stderr"]),
            n=int(row["n"]),
            better=row["better"],
            chance=None if row.get("chance") is None else float(row["chance"]),
            by_layer=tuple(read_number(value) for value in row.get("by_layer", ())),
            unit=row["unit"] if "unit" in row else _likely_unit(row),
            label=str(row.get("label", "")),
            hint=str(row.get("hint", "")),
            role=row["role"] if "role" in row else ROLES.get(name.partition("/")[2]),
        )
        for name, row in rows.items()
    }


def _likely_unit(row: Mapping[str, Any]) -> Unit:
    """Of a score that was written before units were."""
    return "share" if row["better"] == "higher" and 0 <= read_number(row["value"]) <= 1 else ""


def history_row(row: Mapping[str, Any]) -> HistoryRow:
    """One step of a training, from a line of history.jsonl.

    Raises: one of WRONG if it is something else.
    """
    fields = {one.name for one in dataclasses.fields(HistoryRow)}
    is_old = "measures" not in row

    def read(name: str, value: Any) -> Any:
        if name in ("step", "topic"):
            return int(value) if name == "step" else str(value)
        if isinstance(value, Mapping):
            return {key: read_number(number) for key, number in value.items()}
        # Version 0.1 had measures beside the fields, null where there was none.
        return read_number(value) if name in fields or (is_old and value is not None) else value

    return HistoryRow.of({name: read(name, value) for name, value in row.items()})


def _record(name: str, report: dict[str, Any]) -> RunRecord:
    return RunRecord(
        name=name,
        command=str(report["command"]),
        model=str(report["model"]),
        method={key: report["method"][key] for key in ("name", "source", "fields")},
        config=dict(report["config"]),
        before=scores(report["before"]),
        after=scores(report["after"]),
        history=tuple(history_row(row) for row in report["history"]),
        environment=dict(report["environment"]),
        timing={
            phase: {key: read_number(spent[key]) for key in ("seconds", "peak_mb")}
            for phase, spent in report["timing"].items()
        },
        patch={
            "file": str(report["patch"]["file"]),
            "sha256": str(report["patch"]["sha256"]),
            "tensors": tuple(str(name) for name in report["patch"]["tensors"]),
            "bytes": int(report["patch"]["bytes"]),
            "share_of_model": read_number(report["patch"]["share_of_model"]),
        },
        samples=tuple(
            {key: str(sample[key]) for key in ("set", "prompt", "gold", "before", "after")}
            for sample in report["samples"]
        ),
        warnings=tuple(str(warning) for warning in report["warnings"]),
        measured_on=hashes(report),
        solution=tuple(dict(facts) for facts in report.get("solution", ())),
        reference_refusal_rate=report.get("reference_refusal_rate"),
        layer_search=report.get("layer_search"),
    )


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
