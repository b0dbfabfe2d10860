"""What a sweep's cells came to: their scores, means over seeds, and the one that a stated rule chooses."""

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lethe.methods.protocol import Method
from lethe.report.record import read_run
from lethe.runs.config_file import method_name
from lethe.sweeps.grid import Cell
from lethe.types import RUN_FORMAT, Scores

METRICS = ("multiple_choice", "exact_match", "perplexity")
"""What cells are compared by: the first of these that every cell has on forget and retain."""


SETS = ("forget", "adjacent", "retain")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score with its standard error."""

    value: float
    stderr: float
    n: int
    """Questions or texts; of a mean over seeds, seeds."""


@dataclass(frozen=True, kw_only=True)
class CellOutcome:
    """One run."""

    name: str
    folder: str
    """Below the sweep's folder."""
    settings: dict[str, Any]
    seed: int
    after: dict[str, Score] = field(repr=False)
    """By set, in the metric that cells are compared by."""
    seconds: float
    """Of all phases of the run."""
    mixed: dict[str, float] | None = None
    """What calibration found."""
    stopped: int | None = None
    """Steps after which halving stopped it; None if it was trained to the end."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination of settings: means over its seeds."""

    settings: dict[str, Any]
    after: dict[str, Score]
    """Standard errors are over seeds, or over questions where there is one seed."""
    kept: float
    """Share of the base's retain score that is kept; for perplexity, base over edited."""
    seeds: tuple[int, ...]
    is_final: bool = False
    """Whether it was measured on all questions, as a finalist."""
    mixed_forget: Score | None = None
    """Forget score after calibration."""
    stopped: int | None = None
    """Steps after which halving stopped it; None if it was trained to the end."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Everything that a sweep found."""

    model: str
    method: str
    axes: dict[str, tuple[Any, ...]]
    """Values of each setting, in the order of the grid."""
    metric: str | None
    """None if nothing was measured."""
    base: dict[str, Score]
    """The untouched model's scores by set."""
    chance: float | None
    """Forget score of guessing."""
    cells: tuple[CellOutcome, ...]
    points: tuple[Point, ...]
    floor: float
    tau: float | None = None
    """Calibrated for this share of the base's retain score; None if not."""
    failed: dict[str, str] = field(default_factory=dict)
    """Cells that diverged, and what they said."""
    seconds: float = 0.0
    passes: int = 0
    """Passes of the frozen model that recorded."""
    served: int = 0
    """Forwards of evaluation that started at the slice."""
    device: str = ""
    command: str = ""
    how: str = ""
    """How settings were chosen on the way, where not every combination was trained to the end."""

    @property
    def rule(self) -> str:
        """The rule of choice in words."""
        if self.tau is not None:
            return (
                f"least forget {self.spoken} after each edit is mixed with the base until {100 * self.tau:g} % of the "
                f"base's retain {self.spoken} is kept"
            )
        more = "highest" if self.metric == "perplexity" else "least"
        last = "; settings that diverged with a seed come after those that did not" * any(map(self._lost, self.points))
        chosen = self.chosen
        none = " (here none does)" * (chosen is not None and not chosen.kept >= self.floor)
        return (
            f"{more} forget {self.spoken} among cells that keep at least {100 * self.floor:g} % of the base's retain "
            f"{self.spoken}; if none does{none}, the one that keeps most{last}"
        )

    @property
    def chosen(self) -> Point | None:
        """The best point by the rule; None if nothing was measured."""
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def ranked(self) -> list[Point]:
        """Points, best first: finalists, then others that were trained to the end, then those of shorter rungs."""
        if self.metric is None:
            return []
        return sorted(self.points, key=self._rank)

    def merit(self, point: Point) -> float:
        """What the rule ranks settings by, as one number: less is better.

        In (-inf, 1] if enough is kept, above 2 if not, and infinity where a score is no number.
        """
        if math.isnan(point.kept) or math.isnan(point.after["forget"].value):
            return math.inf
        if point.kept >= self.floor:
            return (-1 if self.metric == "perplexity" else 1) * point.after["forget"].value
        return 2 + self.floor - point.kept

    def _lost(self, point: Point) -> bool:
        """Whether it lacks seeds that others have: its runs with them diverged."""
        return len(point.seeds) < max(len(other.seeds) for other in self.points)

    def _rank(self, point: Point) -> tuple[bool, float, bool, float, float]:
        short = 0.0 if point.stopped is None else 1 / point.stopped
        merit = self.merit(point) if point.mixed_forget is None else point.mixed_forget.value
        return not point.is_final, short, self._lost(point), merit, -point.kept

    @property
    def spoken(self) -> str:
        """The metric in words."""
        return {"multiple_choice": "accuracy", "exact_match": "exact answers"}.get(self.metric or "", self.metric or "")


def read(method: Method, cells: Sequence[Cell], *, floor: float, out: Path, stopped: int | None = None) -> Outcomes:
    """The outcomes of complete cells of the sweep in `out`, from their folders.

    `stopped` are the steps of a rung that is not the last.

    Raises: RunFolderError if one cannot be read.
    """
    runs = [read_run(cell.config.out) for cell in cells]
    both = [{name for name in run.before if name in run.after} for run in runs]
    metric = next((m for m in METRICS if all({f"{m}/forget", f"{m}/retain"} <= names for names in both)), None)
    bases: dict[str, dict[str, Score]] = {}
    outcomes = []
    for cell, run, names in zip(cells, runs, both, strict=True):
        sets = {s: f"{metric}/{s}" for s in SETS if f"{metric}/{s}" in names}
        after = {s: _score(run.after[name]) for s, name in sets.items()}
        bases[cell.name] = {s: _score(run.before[name]) for s, name in sets.items()}
        outcomes.append(
            CellOutcome(
                name=cell.name,
                folder=cell.config.out.relative_to(out).as_posix(),
                settings=cell.settings,
                seed=cell.config.seed,
                after=after,
                seconds=sum(phase["seconds"] for phase in run.timing.values()),
                stopped=stopped,
            )
        )
    axes = {name: tuple(dict.fromkeys(cell.settings[name] for cell in cells)) for name in cells[0].settings}
    return Outcomes(
        model=cells[0].config.base.model,
        method=method_name(method),
        axes=axes,
        metric=metric,
        base=bases[cells[0].name],
        chance=runs[0].after[f"{metric}/forget"].chance if metric else None,
        cells=tuple(outcomes),
        points=_points(outcomes, bases, metric),
        floor=floor,
    )


def joined(found: Outcomes, finals: Outcomes) -> Outcomes:
    """The outcomes with those of finalists in place of the same settings measured on fewer questions."""
    better = tuple(replace(point, is_final=True) for point in finals.points)
    return replace(extended(found, replace(finals, points=better)), base=finals.base)


def extended(found: Outcomes, later: Outcomes) -> Outcomes:
    """The outcomes with later ones in place of those of the same settings."""
    done = [point.settings for point in later.points]
    rest = [point for point in found.points if point.settings not in done]
    kept = [cell for cell in found.cells if cell.settings not in done]
    return replace(found, points=(*later.points, *rest), cells=(*later.cells, *kept))


def calibrated(found: Outcomes, mixed: Mapping[str, dict[str, float]], tau: float) -> Outcomes:
    """The outcomes with what calibration found for each cell that was trained to the end, by its name."""
    cells = tuple(replace(cell, mixed=mixed.get(cell.name)) for cell in found.cells)

    def of(point: Point) -> Score | None:
        own = [cell.mixed for cell in cells if cell.settings == point.settings and cell.mixed is not None]
        if not own:
            return None
        return _mean([Score(value=m["forget"], stderr=m["forget_stderr"], n=1) for m in own])

    return replace(
        found, cells=cells, tau=tau, points=tuple(replace(point, mixed_forget=of(point)) for point in found.points)
    )


def as_dict(found: Outcomes) -> dict[str, Any]:
    """The content of sweep.json."""
    about = dataclasses.asdict(found)
    chosen = found.chosen
    about["chosen"] = None if chosen is None else {**chosen.settings}
    return {"format": RUN_FORMAT, "rule": found.rule if found.metric else None, **about}


def as_csv(found: Outcomes) -> str:
    """One line a cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    sets = [name for name in SETS if name in found.base]
    mixed = ["share", "mixed_forget"] if found.tau is not None else []
    stopped = ["stopped_at"] if any(cell.stopped for cell in found.cells) else []
    scored = [f"{s}{end}" for s in sets for end in ("", "_stderr")]
    writer.writerow(["cell", *found.axes, "seed", *stopped, *scored, *mixed, "seconds"])
    for cell in found.cells:
        scores = [number for s in sets for number in (cell.after[s].value, cell.after[s].stderr)]
        extra = ["" if cell.mixed is None else cell.mixed[name] for name in ("share", "forget")] if mixed else []
        rung = ["" if cell.stopped is None else cell.stopped] if stopped else []
        settings = [_spoken(cell.settings[a]) for a in found.axes]
        writer.writerow([cell.name, *settings, cell.seed, *rung, *scores, *extra, cell.seconds])
    return file.getvalue()


def _points(
    cells: Sequence[CellOutcome], bases: Mapping[str, Mapping[str, Score]], metric: str | None
) -> tuple[Point, ...]:
    points = []
    for settings in _distinct([cell.settings for cell in cells]):
        own = [cell for cell in cells if cell.settings == settings]
        after = {name: _mean([cell.after[name] for cell in own]) for name in own[0].after}
        kept = math.nan
        if metric is not None:
            # Each beside its own base: where corpora stand in the grid, texts differ.
            base = statistics.fmean(bases[cell.name]["retain"].value for cell in own)
            pair = after["retain"].value, base
            above, below = pair if metric != "perplexity" else pair[::-1]
            kept = above / below if below else 1.0
        seeds = tuple(cell.seed for cell in own)
        points.append(Point(settings=settings, after=after, kept=kept, seeds=seeds, stopped=own[0].stopped))
    return tuple(points)


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for row in rows:
        if row not in found:
            found.append(row)
    return found


def _mean(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    values = [score.value for score in scores]
    is_known = all(map(math.isfinite, values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if is_known else math.nan
    return Score(value=statistics.fmean(values), stderr=error, n=len(values))


def _score(found: Scores) -> Score:
    return Score(value=found.value, stderr=found.stderr, n=found.n)


def _spoken(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
