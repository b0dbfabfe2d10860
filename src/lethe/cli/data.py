"""The commands `lethe data check` and `lethe data rank`: what one's own data is worth, before and without a run."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from lethe import methods
from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, note, print_json, show
from lethe.cli.tables import Table
from lethe.data.settings import BUILTIN
from lethe.errors import InvalidValueError, UnknownNameError, UsageError
from lethe.system.plugins import load, nearest, summary

if TYPE_CHECKING:
    import lethe.advice.rank_rows
    import lethe.data.check_data

ROWS = 10
"""Row numbers that a finding lists in the terminal; with --json all."""


def check(
    folder: Positional[Path | None] = None,
    forget: tuple[str, ...] = (),
    retain: str | None = None,
    questions: tuple[Path, ...] = (),
    text_field: str = "text",
    model: str | None = None,
    as_json: Json = False,
) -> None:
    """Count rows, and find duplicates, overlaps and rows that are no text; exit code 2 if a run would mean nothing.

    Args:
        folder: Folder with forget.jsonl (or forget/*.jsonl), retain.jsonl and questions.jsonl.
        forget: Forget corpora, instead of the folder's.
        retain: Retain corpus, instead of the folder's.
        questions: Question files with a field `set`, instead of the folder's.
        text_field: Field of a .jsonl row that holds the text.
        model: Model whose tokens are counted.
    """
    from lethe.data import check_data
    from lethe.model.loading import load_tokenizer
    from lethe.runs import inputs

    named = _named(folder, forget, retain, questions)
    tokenizer = None if model is None else load_tokenizer(inputs.model_source(model))
    found = check_data.check(*named, text_field=text_field, tokenizer=tokenizer)
    if as_json:
        print_json({**dataclasses.asdict(found), "meaningless": bool(found.stops)})
    else:
        show(_facts(found))
        for one in found.findings:
            show(f"{one.level}: {one.where}: {one.what}{_rows(one.rows)}")
    if found.stops:
        places = ", ".join(sorted({stop.where for stop in found.stops}))
        raise UsageError(
            f"a run on this data would fail or mean nothing; what stands after stop says why.\nMend {places}."
        )


def rank(
    folder: Positional[Path | None] = None,
    forget: tuple[str, ...] = (),
    retain: str | None = None,
    text_field: str = "text",
    model: str = BUILTIN,
    layer: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    top: int = 10,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Find retain rows that fight the forget corpora, and forget rows that are generic text, by their gradients.

    Args:
        folder: Folder with forget.jsonl (or forget/*.jsonl) and retain.jsonl.
        forget: Forget corpora, instead of the folder's.
        retain: Retain corpus, instead of the folder's.
        text_field: Field of a .jsonl row that holds the text.
        model: `builtin`, a model folder or a hub id.
        layer: Layer l whose output would be steered; by default that of `lethe unlearn`.
        max_length: Tokens of a row.
        seed: Seed of the direction and of the projection.
        top: Rows of each side that are shown; all of them are written.
        device: cpu, cuda, mps or auto.
        dtype: Number type of the weights.
        out: Where all rows are written, .json or .csv.
    """
    from lethe.advice import rank_rows
    from lethe.data import data_folder
    from lethe.runs.defaults import defaults
    from lethe.runs.workspace import Workspace
    from lethe.system.atomic_files import require_place
    from lethe.system.machine import explaining_memory, threads

    require_place(out, [Path(name).expanduser() for name in (*forget, retain) if name is not None])
    if top < 1:
        raise InvalidValueError(f"'top' must be at least 1. Got {top}.")
    corpora, kept, _ = _named(folder, forget, retain, ())
    if not corpora or kept is None:
        raise UsageError("ranking compares two sides.\nName a forget and a retain corpus, or a folder with both.")
    given: dict[str, Any] = {
        "layer": layer, "max_length": None if max_length is None else (max_length,), "device": device, "dtype": dtype,
    }  # fmt: skip
    changes = {key: value for key, value in given.items() if value is not None}
    config = defaults(load("rmu", methods), model)[1].changed(**changes)
    sides = [{source: data_folder.read_rows(source, text_field) for source in side} for side in (corpora, (kept,))]
    workspace = Workspace(config.base)
    with (
        progress_bars.Bars() as progress,
        explaining_memory(f"with layers 0..{config.layer}.\nLower --layer or --max-length."),
        threads(config.base.threads),
    ):
        found = rank_rows.rank(
            workspace.slice(config),
            workspace.tokenizer,
            *sides,
            max_length=config.batching.max_length[0],
            seed=seed,
            progress=progress,
        )
    if out is not None:
        found.save(out)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    show(_ranked("retain rows that fight the forget corpora most", found.retain[:top]))
    show()
    show(_ranked("forget rows that are the most generic", found.forget[:top]))
    if found.left_out:
        note(f"{found.left_out} rows that this tokenizer turns into nothing were left out.")


def data(part: str, argv: Sequence[str]) -> tuple[Callable[..., None], Sequence[str]]:
    """Check a folder of own data before a run, or rank its rows by what they do to it."""
    if part not in PARTS:
        raise UnknownNameError(
            f"there is no 'lethe data {part}'.{nearest(part, PARTS)}\nThere is lethe data check and data rank."
        )
    return PARTS[part], argv


PARTS: dict[str, Callable[..., None]] = {"check": check, "rank": rank}


DATA = Command(
    run=data,
    usage="check|rank DIR",
    words=lambda: {name: summary(part) for name, part in PARTS.items()},
    examples=(
        "lethe data check ./my-data --model ./my-model",
        "lethe data check --forget a.jsonl b.jsonl --retain wiki.txt",
        "lethe data rank ./my-data --model ./my-model --layer 7 --out rows.csv",
    ),
)


def _named(
    folder: Path | None, forget: tuple[str, ...], retain: str | None, questions: tuple[Path, ...]
) -> tuple[tuple[str, ...], str | None, tuple[Path, ...]]:
    """Forget corpora, retain corpus and question files: those named, else the folder's.

    Raises: UsageError if nothing is named; CorpusError.
    """
    from lethe.data import data_folder

    if folder is None and not (forget or retain or questions):
        raise UsageError("no data is named.\nGive a folder, or --forget and --retain.")
    files = data_folder.OwnData(folder=Path()) if folder is None else data_folder.find(folder)
    return (
        forget or tuple(map(str, files.forget)),
        retain or (None if files.retain is None else str(files.retain)),
        questions or (() if files.questions is None else (files.questions,)),
    )


def _facts(found: "lethe.data.check_data.DataCheck") -> Table:
    numbers = ("rows", "characters", "shortest", "median", "longest", "tokens")
    table = Table("", ("corpus", *numbers), numbers)
    for side, facts in (*(("forget", one) for one in found.forget), ("", found.retain)):
        if facts is not None:
            tokens = "" if facts.tokens is None else str(facts.tokens)
            lengths = (facts.characters, facts.shortest, f"{facts.median:g}", facts.longest)
            table.add(f"{side} {facts.name}".strip(), str(facts.rows), *map(str, lengths), tokens)
    for name, count in found.questions.items():
        table.add(f"{name} questions", str(count))
    return table


def _ranked(title: str, rows: "Sequence[lethe.advice.rank_rows.RankedRow]") -> Table:
    columns = ("file", "row", "topic", "score", "other side", "its nearest", "own class")
    table = Table(title, columns, ("row", "score", "other side", "own class"))
    for row in rows:
        cells = (row.source, str(row.number), row.topic, f"{row.score:.3f}")
        table.add(*cells, f"{row.other:.3f}", row.nearest, f"{row.own:.3f}")
    return table


def _rows(rows: tuple[int, ...]) -> str:
    if not rows:
        return ""
    return f" ({len(rows)}: row {', '.join(map(str, rows[:ROWS]))}{', ...' * (len(rows) > ROWS)})"
