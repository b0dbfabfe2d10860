"""The one look of all figures: colours, marks and sizes, as a file that stands alone or as part of a page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK, GRID, SHADE, PAPER = "#1c1e21", "#e3e6e9", "#e9ebee", "#ffffff"
"""Of text and lines, of grid lines, of shading, and of what lies below; a page puts its own in their place."""

COLOURS = {
    "forget": "#d55e00",
    "earlier": "#e69f00",
    "adjacent": "#009e73",
    "retain": "#0072b2",
    "unknown": "#cc79a7",
}
"""Okabe and Ito's palette, which stays apart for colour-blind readers; one colour per set, everywhere."""


DASHES = ((), (4.0, 1.5), (1.0, 1.2), (6.0, 1.5, 1.0, 1.5))
"""One dash pattern per topic, in units of the line width."""


MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
"""One marker per method in the scatter, with its look in text."""

_CSS = {INK: "currentColor", GRID: "var(--grid)", SHADE: "var(--shade)", PAPER: "var(--paper)"} | {
    colour: f"var(--{name})" for name, colour in COLOURS.items()
}


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Matplotlib in the look of the reports, whatever the user's settings are; `name` salts ids of the SVG."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        matplotlib.rcParams["svg.hashsalt"] = name
        yield


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG file; the same figure gives the same bytes."""
    file = io.StringIO()
    with styled(name):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def embedded(figure: Figure, name: str, title: str) -> Markup:
    """The figure as part of a page: no prologue, no addresses, ids of its own, the page's colours."""
    svg = as_svg(figure, name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[\d. ]*"', svg)
    opening = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(title)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    return Markup(re.sub("|".join(_CSS), lambda colour: _CSS[colour[0]], svg))
