"""The figures of a report, each an SVG that stands inside the page and takes its colours from it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from lethe.report.record import RunRecord
from lethe.report.style import COLOURS, DASHES, INK, MARKERS, PAPER, SHADE, embedded, styled
from lethe.report.words import FEATURED, SETS, amount, is_share, metric_names, spoken
from lethe.system.atomic_files import read_number
from lethe.types import HistoryRow, Scores

_PALE = 0.38
"""Opacity of what was before; what is after is opaque."""


_WIDTH = 440
"""Of every drawing, in pixels of a page that has room for two side by side."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure and its title. No text of the user's stands in the SVG: legends are the page's own."""

    title: str
    svg: Markup


def topics(run: RunRecord) -> list[str]:
    """Topics in the order of training."""
    return list(dict.fromkeys(row.topic for row in run.history))


def scores(run: RunRecord) -> list[Drawing]:
    """Before and after, one figure per metric that has a better end: bars for shares, points on a log axis else."""
    drawings = []
    for metric in (name for name in metric_names(run.before) if name in FEATURED):
        pairs = {
            name: (run.before[key], run.after[key])
            for name in SETS
            if (key := f"{metric}/{name}") in run.before and key in run.after and run.after[key].better != "neither"
        }
        if all(is_share(*pair) for pair in pairs.values()) and pairs:
            drawings.append(
                _draw(f"scores-{metric}", spoken(metric).capitalize(), lambda axes, p=pairs: _bars(axes, p))
            )
        elif _plottable([score.value for pair in pairs.values() for score in pair]):
            drawings.append(
                _draw(f"scores-{metric}", spoken(metric).capitalize(), lambda axes, p=pairs: _points(axes, p))
            )
    return drawings


def training(run: RunRecord) -> list[Drawing]:
    """Losses, norms and cosines over the steps, one line per topic; nothing where no topic has two steps."""
    by_topic = [[row for row in run.history if row.topic == topic] for topic in topics(run)]
    if all(len(rows) < 2 for rows in by_topic):
        return []
    curves: list[tuple[str, dict[str, Callable[[HistoryRow], float | None]], bool]] = [
        ("Loss", {"forget": lambda row: row.forget_loss, "retain": lambda row: row.retain_loss}, True),
        (
            "Mean activation norm",
            {
                "target": lambda row: row.measures.get("target_norm"),
                "forget": lambda row: row.measures.get("forget_norm_mean"),
                "retain": lambda row: row.measures.get("retain_norm_mean"),
            },
            False,
        ),
        (
            "Cosine of forget activation to its direction",
            {"forget": lambda row: row.measures.get("cos_direction")},
            False,
        ),
        (
            "Cosine to the untouched activation",
            {
                "forget": lambda row: row.measures.get("forget_cos_frozen"),
                "retain": lambda row: row.measures.get("retain_cos_frozen"),
            },
            False,
        ),
    ]
    drawings = []
    for title, lines, log in curves:
        values = {name: [[_finite(read(row)) for row in rows] for rows in by_topic] for name, read in lines.items()}
        if any(_plottable(line) for group in values.values() for line in group):
            steps = [[row.step for row in rows] for rows in by_topic]
            drawings.append(
                _draw(f"training-{title}", title, lambda axes, v=values, s=steps, g=log: _curves(axes, s, v, log=g))
            )
    return drawings


def by_layer(run: RunRecord) -> list[Drawing]:
    """Each quantity that is known at every layer, before and after, with the trained layers shaded."""
    drawings = []
    for metric in metric_names(name for name, score in run.after.items() if score.by_layer):
        lines = {
            name: [part.get(f"{metric}/{name}") for part in (run.before, run.after)]
            for name in SETS
            if f"{metric}/{name}" in run.after
        }
        title = f"{spoken(metric).capitalize()} by layer"
        drawings.append(_draw(f"layer-{metric}", title, lambda axes, x=lines: _layers(axes, x, run.trained_layers)))
    return drawings


def layer_search(run: RunRecord) -> Drawing | None:
    """What steering at each layer did before the edit; None where no layer was searched."""
    if run.layer_search is None:
        return None
    rows, chosen = run.layer_search["layers"], run.layer_search["chosen"]

    def draw(axes: Axes) -> None:
        for layer in chosen:
            axes.axvspan(layer - 0.5, layer + 0.5, color=SHADE, lw=0, antialiased=False)
        layers = [row["layer"] for row in rows]
        for key, name in (("refusal_rate", "forget"), ("wanted", "retain"), ("unwanted", "unknown")):
            axes.plot(layers, [read_number(row[key]) for row in rows], color=COLOURS[name], marker="o", ms=3.5, lw=1.6)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.margins(x=0.02)

    return _draw("layer-search", "Steered at each layer, before the edit", draw)


def scatter(runs: Sequence[RunRecord], metric: str) -> Drawing | None:
    """Forget against retain after each run; None where no run has both. Points carry the runs' numbers, from 1."""
    keys = (f"{metric}/forget", f"{metric}/retain")
    placed = [
        (number, run.method["name"], run.after[keys[0]], run.after[keys[1]])
        for number, run in enumerate(runs, start=1)
        if all(key in run.after and math.isfinite(run.after[key].value) for key in keys)
    ]
    if not placed:
        return None
    starts = sorted(
        {tuple(run.before[key].value for key in keys) for run in runs if all(k in run.before for k in keys)}
    )
    shapes = shape_of_methods(runs)

    def draw(axes: Axes) -> None:
        share = all(is_share(*pair) for _, _, *pair in placed)
        for number, method, x, y in placed:
            axes.errorbar(
                x.value,
                y.value,
                xerr=_bar(x),
                yerr=_bar(y),
                fmt=shapes[method],
                color=INK,
                ms=7,
                elinewidth=1,
                capsize=0,
                gid=f"run-{number}",
            )
        for x, y in starts:
            axes.plot(x, y, "o", mfc="none", mec=INK, ms=8)
        axes.grid(visible=True, axis="both")
        axes.set(xlabel=f"forget after: {spoken(metric)}", ylabel=f"retain after: {spoken(metric)}")
        if share:
            axes.set(xlim=(-0.03, 1.03))
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        for chance in sorted({x.chance for _, _, x, _ in placed if x.chance is not None}):
            axes.axvline(chance, color=INK, lw=1, ls=(0, (2, 2)))
        _number_points(axes, [(str(number), x.value, y.value) for number, _, x, y in placed])

    lower = placed[0][2].better == "lower"
    title = "Right: more forgotten. Down: more kept." if lower else "Left: more forgotten. Up: more kept."
    return _draw("scatter", title, draw, height=380)


def shape_of_methods(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Marker of each method, in the order of the runs."""
    names = list(dict.fromkeys(run.method["name"] for run in runs))
    return {name: list(MARKERS)[index % len(MARKERS)] for index, name in enumerate(names)}


def _bars(axes: Axes, pairs: dict[str, tuple[Scores, Scores]]) -> None:
    for place, (name, pair) in enumerate(pairs.items()):
        for score, shift, alpha in zip(pair, (-0.2, 0.2), (_PALE, 1.0), strict=True):
            axes.bar(place + shift, score.value, width=0.36, color=PAPER)  # hides the grid behind a pale bar
            axes.bar(place + shift, score.value, width=0.36, color=COLOURS[name], alpha=alpha)
            axes.errorbar(place + shift, score.value, yerr=_bar(score), color=INK, elinewidth=1.2, capsize=3)
            _write_above(axes, f"{100 * score.value:.0f}", place + shift, score.value + (_bar(score) or 0), gap=3)
        chance = pair[1].chance
        if chance is not None:
            axes.plot([place - 0.45, place + 0.45], [chance, chance], color=INK, lw=1.2, ls=(0, (2, 2)))
    axes.set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1], xlim=(-0.6, len(pairs) - 0.4))
    axes.set_xticks(range(len(pairs)), list(pairs))
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def _points(axes: Axes, pairs: dict[str, tuple[Scores, Scores]]) -> None:
    for place, (name, pair) in enumerate(pairs.items()):
        axes.plot([place - 0.12, place + 0.12], [score.value for score in pair], color=COLOURS[name], lw=1, alpha=_PALE)
        for score, shift, alpha in zip(pair, (-0.12, 0.12), (_PALE, 1.0), strict=True):
            axes.errorbar(place + shift, score.value, yerr=_bar(score), fmt="none", ecolor=INK, elinewidth=1.2)
            axes.plot(place + shift, score.value, "o", ms=9, color=COLOURS[name], alpha=alpha, mew=0)
            _write_above(axes, amount(score.value), place + shift, score.value + (_bar(score) or 0), gap=6)
    axes.set_xlim(-0.6, len(pairs) - 0.4)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(pairs)), list(pairs))
    axes.tick_params(axis="x", length=0)
    _log_axis(axes, [score.value for pair in pairs.values() for score in pair])


def _write_above(axes: Axes, text: str, x: float, y: float, *, gap: int) -> None:
    axes.annotate(text, (x, y), (0, gap), textcoords="offset points", ha="center", va="bottom", fontsize=10)


def _curves(axes: Axes, steps: list[list[int]], values: dict[str, list[list[float]]], *, log: bool) -> None:
    for name, group in values.items():
        for topic, (line, at) in enumerate(zip(group, steps, strict=True)):
            # One step has no line to draw, so its point must show.
            marker = "o" if len(at) == 1 else ""
            drawn = [value if value > 0 or not log else math.nan for value in line]
            axes.plot(
                at,
                drawn,
                color=COLOURS.get(name, INK),
                marker=marker,
                ms=4,
                lw=1.1 if name == "target" else 1.6,
                ls=(0, DASHES[topic % len(DASHES)] or (1, 0)),
            )
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if log:
        _log_axis(axes, [value for group in values.values() for line in group for value in line])


def _layers(axes: Axes, lines: dict[str, list[Scores | None]], trained: tuple[int, ...]) -> None:
    for layer in trained:
        axes.axvspan(layer - 0.5, layer + 0.5, color=SHADE, lw=0, antialiased=False)
    seen = []
    for name, pair in lines.items():
        for score, width, alpha in zip(pair, (5.0, 1.6), (_PALE, 1.0), strict=True):
            if score is not None and score.by_layer:
                marker = "o" if len(score.by_layer) <= 16 and alpha == 1 else ""
                values = [_finite(value) for value in score.by_layer]
                axes.plot(
                    range(len(values)),
                    values,
                    color=COLOURS[name],
                    lw=width,
                    alpha=alpha,
                    marker=marker,
                    ms=3.5,
                    solid_capstyle="butt",
                )
                seen += [value for value in values if math.isfinite(value)]
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.02)
    if seen and min(seen) > 0 and max(seen) > 30 * min(seen):
        _log_axis(axes, seen)


def _number_points(axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Write each point's number beside it, where no other number and no point stands yet."""
    axes.autoscale_view()
    places = [tuple(axes.transData.transform((x, y))) for _, x, y in points]
    taken = list(places)
    around = [
        (r * math.cos(a), r * math.sin(a)) for r in (13, 22, 31) for a in (0.7, -0.7, 2.4, -2.4, 0, 3.14, 1.6, -1.6)
    ]
    for (text, x, y), (left, down) in zip(points, places, strict=True):
        gaps = [min(math.hypot(left + dx - a, down + dy - b) for a, b in taken) for dx, dy in around]
        # The first free place, else the freest one.
        best = next((i for i, gap in enumerate(gaps) if gap > 11.5), gaps.index(max(gaps)))
        dx, dy = around[best]
        taken.append((left + dx, down + dy))
        axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha="center", va="center", fontsize=10)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log scale with plain numbers, where the values span enough of it."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive or max(positive) < 4 * min(positive):
        return
    axes.set_yscale("log", nonpositive="mask")
    wide = max(positive) > 300 * min(positive)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _bar(score: Scores) -> float | None:
    return score.stderr if math.isfinite(score.stderr) and score.stderr > 0 else None


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _plottable(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _draw(name: str, title: str, draw: Callable[[Axes], None], *, height: int = 250) -> Drawing:
    """One pair of axes as SVG, the same bytes every time and whatever the user's matplotlib settings are."""
    with styled(name):
        # 72 dpi makes a unit of the drawing one pixel of the page.
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
        axes = figure.add_subplot()
        draw(axes)
        # Fixed margins rather than fitted ones: axes below one another line up.
        left, bottom = (60 if axes.get_ylabel() else 52), (40 if axes.get_xlabel() else 24)
        figure.subplots_adjust(left / _WIDTH, bottom / height, 1 - 14 / _WIDTH, 1 - 8 / height)
    return Drawing(title=title, svg=embedded(figure, re.sub(r"\W+", "-", name), title))
