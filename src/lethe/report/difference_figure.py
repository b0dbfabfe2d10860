"""The figure of a comparison: how far each score lies from the first, with its interval, beside what noise would do."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lethe.report.standalone_figures import drawing
from lethe.report.style import COLOURS, GRID, INK, MARKERS, PAPER

ROW = 0.26
"""Height of a line, in inches."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One difference to the first column."""

    panel: str
    """What the axis measures: lines of one panel share it."""
    label: str
    set: str
    column: int
    """Which of the compared it is, from 0."""
    value: float
    low: float
    high: float
    is_noise: bool


def figure(lines: Sequence[Line], columns: Sequence[str], first: str) -> Figure:
    """Differences to `first`, one panel a kind of number; the grey band is as wide as chance alone would reach."""
    panels = list(dict.fromkeys(line.panel for line in lines))
    labels = {panel: list(dict.fromkeys(line.label for line in lines if line.panel == panel)) for panel in panels}
    heights = [ROW * (len(columns) * len(labels[panel]) + 0.4) for panel in panels]
    markers = list(MARKERS)
    with drawing(rows=len(panels)) as (drawn, every):
        drawn.set_size_inches(6.6, sum(heights) + 0.6 * len(panels) + 0.2 * (len(columns) + 3))
        drawn.set_layout_engine("constrained", w_pad=0.1)
        grid = every[0].get_gridspec()
        if grid is not None:
            grid.set_height_ratios(heights)
        for axes, panel in zip(every, panels, strict=True):
            _panel(axes, [line for line in lines if line.panel == panel], labels[panel], len(columns))
            axes.set_xlabel(panel)
        shown = [
            Line2D([], [], color=INK, marker=markers[place % len(markers)], lw=1.2, label=name)
            for place, name in enumerate(columns)
        ]
        shown.append(Line2D([], [], color=INK, marker="o", mfc=PAPER, lw=1.2, label="hollow: within noise"))
        band = Patch(color=GRID, label="what noise alone would reach, 95 %")
        legend = drawn.legend(handles=[*shown, band], loc="outside upper left")
        legend.set_title(f"difference to {first}, with 95 % interval")
        legend.set_alignment("left")
        for text in (*legend.get_texts(), legend.get_title()):
            text.set_parse_math(False)
    return drawn


def _panel(axes: Axes, lines: Sequence[Line], labels: Sequence[str], columns: int) -> None:
    markers = list(MARKERS)
    for line in lines:
        shift = (line.column - (columns - 1) / 2) / (columns + 0.6)
        place = labels.index(line.label) + shift
        reach = (line.high - line.low) / 2
        axes.barh(place, 2 * reach, left=-reach, height=0.8 / (columns + 0.6), color=GRID, lw=0)
        colour, marker = COLOURS.get(line.set, INK), markers[line.column % len(markers)]
        axes.plot([line.low, line.high], [place, place], color=colour, lw=1.4)
        axes.plot(line.value, place, marker, color=colour, mfc=PAPER if line.is_noise else colour, ms=5)
    axes.axvline(0, color=INK, lw=0.8, zorder=1)
    axes.use_sticky_edges = False
    axes.margins(x=0.04)
    axes.set_yticks(range(len(labels)), labels)
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False)
