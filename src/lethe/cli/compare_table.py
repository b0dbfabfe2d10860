"""How a comparison is shown: its table in the terminal, its figure and numbers in a folder."""

import math
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lethe.errors import UsageError
from lethe.evaluation.compare import Compared, Row, as_dict
from lethe.evaluation.significance import LEVEL, Difference, Estimate
from lethe.report.difference_figure import Line, figure
from lethe.report.standalone_figures import write_figure
from lethe.report.words import amount, is_share, spoken, with_error
from lethe.system.atomic_files import saving, write_json

MINUS = "\N{MINUS SIGN}"


def table(found: Compared) -> Table:
    """One row a metric and set; after each column's score its difference to the first column."""
    first = found.columns[0].name
    shown = Table(title=f"differences to {first}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "set", "good", first):
        shown.add_column(Text(name), justify="right" if name == first else "left", overflow="fold")
    for column in found.columns[1:]:
        shown.add_column(Text(column.name), justify="right", overflow="fold")
        shown.add_column("difference [95 % interval]", overflow="fold")
    for row in found.rows:
        cells = [_value(row.values[0], row)]
        for value, one, p in zip(row.values[1:], row.differences, row.p_adjusted, strict=True):
            cells += [_value(value, row), _difference(one, p, row)]
        shown.add_row(row.metric, Text(row.set), row.good, *cells)
        if any("? " in cell for cell in cells):
            shown.caption = "With a question mark: outside the noise of its own test, not of all tests together."
            shown.caption_justify = "left"
    return shown


def write(found: Compared, out: Path) -> None:
    """Write compare.json, and the figure of all differences that were tested, into a folder.

    Raises: UsageError if it is a file; SaveError.
    """
    if out.is_file():
        raise UsageError(f"{out} is a file, and --out is a folder.\nName a folder.")
    lines = [
        Line(
            panel="percentage points" if share else spoken(row.metric, *row.scores),
            label=f"{spoken(row.metric, *row.scores)}, {row.set or 'all'}",
            set=row.set,
            column=column,
            value=one.value * scale,
            low=one.low * scale,
            high=one.high * scale,
            is_noise=bool(one.within_noise),
        )
        for row in found.rows
        for share in [is_share(*row.scores)]
        for scale in [100 if share else 1]
        for column, one in enumerate(row.differences)
        if one is not None and one.test
    ]
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    if lines:
        lines.sort(key=lambda line: line.panel != "percentage points")
        names = [column.name for column in found.columns]
        write_figure(figure(lines, names[1:], names[0]), out, "compare")
    write_json(out / "compare.json", as_dict(found))


def _value(value: Estimate | None, row: Row) -> str:
    if value is None:
        return "not measured"
    text = with_error(replace(row.scores[0], value=value.value, stderr=value.stderr))
    if value.spread is None:
        return text
    return f"{text} (spread {_plain(value.spread, row)})"


def _difference(one: Difference | None, p: float, row: Row) -> str:
    if one is None:
        return ""
    text = _signed(one.value, row)
    if not one.test:
        return f"{text} (no error known)"
    text += f" [{_signed(one.low, row)}, {_signed(one.high, row)}]" + " unpaired" * (not one.is_paired)
    if one.within_noise:
        return f"{text} within noise"
    tail = f"p {p:.2g}" if p >= 0.001 else "p < 0.001"
    risen = {"higher": "better", "lower": "worse", "": "higher"}[row.good]
    fallen = {"higher": "worse", "lower": "better", "": "lower"}[row.good]
    word = risen if one.value > 0 else fallen
    return f"{text} {word}, {tail}" if p <= 1 - LEVEL else f"{text} {word}? {tail}"


def _signed(value: float, row: Row) -> str:
    return ("+" if value > 0 else MINUS if value < 0 else "") + _plain(abs(value), row)


def _plain(value: float, row: Row) -> str:
    if not math.isfinite(value):
        return amount(value)
    return f"{100 * value:.1f}" if is_share(*row.scores) else f"{value:.3g}"
