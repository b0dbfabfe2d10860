"""The figures and the page of a sweep: forget against retain, a map of layer and coefficient, and every setting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lethe.report.pages import render
from lethe.report.standalone_figures import drawing, write_figure
from lethe.report.style import COLOURS, INK, embedded
from lethe.report.words import LIMITS
from lethe.system.atomic_files import write_text

Number = tuple[float, float]
"""A value and its standard error."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One combination of settings, as the page shows it."""

    number: int
    """Its rank by the rule, from 1."""
    settings: tuple[str, ...]
    forget: Number
    retain: Number
    kept: float
    """Share of the base's retain score."""
    mixed: Number | None
    """Forget score after calibration."""
    is_final: bool
    stopped: int | None = None
    """Steps after which halving stopped it."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """Scores of one set by layer (rows) and coefficient (columns); NaN where nothing was measured."""

    title: str
    row_name: str
    column_name: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]


def pareto(lines: Sequence[Line], base: tuple[Number, Number], spoken: str, chance: float | None) -> Figure:
    """Forget against retain after each combination of settings, with standard errors; the first one is the chosen.

    Those that halving stopped are hollow.
    """
    with drawing() as (figure, (axes,)):
        stopped = next((line.number for line in lines if line.stopped), None)
        for line in lines:
            chosen = line.number == 1
            axes.errorbar(
                line.forget[0],
                line.retain[0],
                xerr=line.forget[1] or None,
                yerr=line.retain[1] or None,
                fmt="D" if chosen else "o",
                color=COLOURS["forget"] if chosen else INK,
                mfc="white" if line.stopped else None,
                ms=8 if chosen else 5,
                elinewidth=1,
                zorder=3 if chosen else 2,
                label="chosen" if chosen else "stopped earlier" if line.number == stopped else None,
            )
            axes.annotate(
                str(line.number), (line.forget[0], line.retain[0]), (5, 4), textcoords="offset points", fontsize=8
            )
        axes.plot(base[0][0], base[1][0], "o", mfc="none", mec=INK, ms=8, label="untouched")
        if chance is not None:
            axes.axvline(chance, color=INK, lw=1, ls=(0, (2, 2)), label="guessing")
        axes.grid(visible=True, axis="both")
        axes.set(xlabel=f"forget {spoken}", ylabel=f"retain {spoken}")
        axes.legend()
    return figure


def heat(maps: Sequence[Map]) -> Figure:
    """One map for each set, with the numbers written in."""
    with drawing(columns=len(maps)) as (figure, every):
        for axes, shown in zip(every, maps, strict=True):
            axes.imshow(shown.values, cmap="cividis", aspect="auto")
            axes.set_xticks(range(len(shown.columns)), shown.columns)
            axes.set_yticks(range(len(shown.rows)), shown.rows)
            axes.set(xlabel=shown.column_name, ylabel=shown.row_name, title=shown.title)
            axes.grid(visible=False)
            for row, values in enumerate(shown.values):
                for column, value in enumerate(values):
                    if value == value:
                        text = f"{value:.2g}" if value >= 10 else f"{value:.2f}"
                        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}
                        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black", bbox=box)
    return figure


def write(
    folder: Path,
    *,
    title: str,
    facts: str,
    rule: str,
    how: str,
    spoken: str,
    names: Sequence[str],
    lines: Sequence[Line],
    base: tuple[Number, Number],
    chance: float | None,
    maps: Sequence[Map],
    failed: Mapping[str, str],
) -> Path:
    """Write `sweep.html`, which opens offline, and its figures as SVG and PNG into the folder; the page's path.

    Raises: SaveError.
    """
    figures = {"pareto": ("What was lost against what was kept", pareto(lines, base, spoken, chance))} if lines else {}
    if maps:
        figures["heatmap"] = (f"{maps[0].row_name.capitalize()} and {maps[0].column_name}", heat(maps))
    for name, (_, figure) in figures.items():
        write_figure(figure, folder, name)
    page = render(
        "sweep.html.jinja",
        title=title,
        facts=facts,
        rule=rule,
        how=how,
        spoken=spoken,
        names=names,
        lines=lines,
        base=base,
        drawings=[(heading, embedded(figure, name, heading)) for name, (heading, figure) in figures.items()],
        failed=failed,
        limits=LIMITS,
    )
    return write_text(folder / "sweep.html", page)
