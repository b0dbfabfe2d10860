"""A sweep's outcomes for people: the table of the terminal, and the page with its figures."""

import math
import statistics
from pathlib import Path

from rich.table import Table

from lethe.__version__ import __version__
from lethe.report import sweep_page as page
from lethe.report.sweep_page import Line, Map
from lethe.runs.config_file import method_class
from lethe.sweeps.grid import spoken
from lethe.sweeps.outcomes import Outcomes, Point, Score


def table(found: Outcomes) -> Table:
    """Every combination of settings, best first."""
    shown = Table(title=f"{found.method} on {found.model}", title_justify="left", box=None, pad_edge=False)
    mixed = ("forget, calibrated",) if found.tau is not None else ()
    for name in ("#", *found.axes, "seeds", "forget", "retain", "kept", *mixed):
        shown.add_column(name, justify="left" if name in found.axes else "right", overflow="fold")
    for number, point in enumerate(found.ranked(), start=1):
        settings = [spoken(point.settings[name]) for name in found.axes]
        scores = [_score(found, point.after[name]) for name in ("forget", "retain")]
        note = " (finalist)" if point.is_final else f" (after {point.stopped} steps)" if point.stopped else ""
        kept = f"{100 * point.kept:.0f} %{note}"
        extra = [_score(found, point.mixed_forget)] if point.mixed_forget is not None else []
        shown.add_row(str(number), *settings, str(len(point.seeds)), *scores, kept, *extra)
    if found.metric is None:
        shown.caption = "Not measured (--evaluate none)."
        return shown
    base = [_score(found, found.base[name]) for name in ("forget", "retain")]
    shown.add_row("", *["untouched", *[""] * (len(found.axes) - 1)], "", *base, "")
    shown.caption = f"Number 1 is chosen: {found.rule}." + f"\n{found.how}" * bool(found.how)
    shown.caption_justify = "left"
    return shown


def write_page(found: Outcomes, folder: Path) -> Path:
    """Write sweep.html, pareto and heat map into the sweep's folder; the page's path.

    Raises: SaveError.
    """
    # Of the runs: the last call may have had nothing left to do.
    seconds = math.fsum(cell.seconds for cell in found.cells)
    facts = [f"{len(found.cells)} cells", f"{seconds:,.0f} s", f"lethe {__version__}", found.device]
    return page.write(
        folder,
        title=f"Sweep of {found.method} on {found.model}",
        facts=" · ".join(part for part in facts if part),
        rule=found.rule if found.metric else "",
        how=found.how,
        spoken=found.spoken,
        names=list(found.axes),
        lines=[_line(found, number, point) for number, point in enumerate(found.ranked(), start=1)],
        base=(_pair(found.base["forget"]), _pair(found.base["retain"])) if found.metric else ((0.0, 0.0), (0.0, 0.0)),
        chance=found.chance,
        maps=_maps(found),
        failed=found.failed,
    )


def _line(found: Outcomes, number: int, point: Point) -> Line:
    return Line(
        number=number,
        settings=tuple(spoken(point.settings[name]) for name in found.axes),
        forget=_pair(point.after["forget"]),
        retain=_pair(point.after["retain"]),
        kept=point.kept,
        mixed=None if point.mixed_forget is None else _pair(point.mixed_forget),
        is_final=point.is_final,
        stopped=point.stopped,
    )


def _maps(found: Outcomes) -> list[Map]:
    """Maps of layer and coefficient, where both are in the grid; means over what else is."""
    coefficient = method_class(found.method).coefficient  # type: ignore[attr-defined]
    if found.metric is None or "layer" not in found.axes or coefficient not in found.axes:
        return []
    fields = len(found.axes["layer"]) * len(found.axes[coefficient])
    # Steps differ between halving's rungs, and values out of a range leave most of a map empty.
    if any(point.stopped for point in found.points) or 2 * len(found.points) < fields:
        return []
    maps = []
    for name in ("forget", "retain"):
        values = [
            [
                _average(
                    [
                        point.after[name].value
                        for point in found.points
                        if point.settings["layer"] == layer and point.settings[coefficient] == value
                    ]
                )
                for value in found.axes[coefficient]
            ]
            for layer in found.axes["layer"]
        ]
        maps.append(
            Map(
                title=f"{name} {found.spoken}",
                row_name="layer",
                column_name=coefficient.replace("_", " "),
                rows=tuple(map(spoken, found.axes["layer"])),
                columns=tuple(map(spoken, found.axes[coefficient])),
                values=tuple(map(tuple, values)),
            )
        )
    return maps


def _average(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _pair(score: Score) -> tuple[float, float]:
    return score.value, score.stderr


def _score(found: Outcomes, score: Score) -> str:
    if found.metric == "perplexity":
        return f"{score.value:.4g} ± {score.stderr:.2g}"
    return f"{100 * score.value:.1f} ± {100 * score.stderr:.1f} %"
