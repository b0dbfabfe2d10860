"""Figures that stand alone, as SVG and PNG, and the page that shows several with their readings."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lethe.report.pages import render
from lethe.report.style import as_svg, embedded, styled
from lethe.report.words import LIMITS
from lethe.system.atomic_files import replacing, write_text


@contextmanager
def drawing(columns: int = 1, rows: int = 1, *, sharey: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its axes, row by row, in the look of the reports whatever the user's matplotlib settings are."""
    with styled("analysis"):
        figure = Figure(figsize=(4.4 * columns + 0.2, 3.1 * rows), dpi=72, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)
        # Laid out once and for all: each further drawing would move things by a hair.
        FigureCanvasAgg(figure).draw()
        figure.set_layout_engine("none")


def shades(count: int) -> list[str]:
    """Colours for `count` ordered lines, light to dark, that show on white and on black paper."""
    places = [0.78 - 0.5 * index / max(1, count - 1) for index in range(count)]
    return [to_hex(colormaps["plasma"](place)) for place in places]


def write_figure(figure: Figure, folder: Path, name: str) -> tuple[Path, Path]:
    """Write NAME.svg and NAME.png, the latter with 144 dots per inch; the same figure gives the same bytes.

    Raises: SaveError.
    """
    paths = folder / f"{name}.svg", folder / f"{name}.png"
    write_text(paths[0], as_svg(figure, name))
    with styled(name), replacing(paths[1]) as partial:
        figure.savefig(partial, format="png", dpi=144, metadata={"Software": None})
    return paths


def write_page(
    path: Path, *, title: str, facts: str, drawings: Sequence[tuple[str, str, str, Figure]], missing: Mapping[str, str]
) -> Path:
    """Write one page, which opens offline, with each drawing (name, title, reading, figure); its path.

    `missing` says by name why an analysis is not there.

    Raises: SaveError.
    """
    shown = [
        {"name": name, "title": heading, "reading": reading, "svg": embedded(figure, name, heading)}
        for name, heading, reading, figure in drawings
    ]
    page = render("analyses.html.jinja", title=title, facts=facts, shown=shown, missing=missing, limits=LIMITS)
    return write_text(path, page)
