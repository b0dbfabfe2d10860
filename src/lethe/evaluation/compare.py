"""Several runs, or results of `lethe eval`, side by side: scores, how far they lie from the first, and the noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lethe.errors import UnknownNameError, UsageError
from lethe.evaluation.results import NAME, Measured, same_questions
from lethe.evaluation.significance import LEVEL, Difference, Estimate, difference, holm, over_seeds
from lethe.report.words import FEATURED, SETS, metric_and_set, metric_names
from lethe.types import Scores

EXAMS = ("exam_", "harness_")
"""Beginnings of what exams and the harness measure; it stands in every table beside the featured metrics."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measurement, or those of runs that differ in nothing but the seed."""

    name: str
    members: tuple[Measured, ...]
    when: Literal["before", "after"] = "after"

    def scores(self, name: str) -> list[Scores]:
        """The score of every member; empty if one lacks it."""
        found = [getattr(member, self.when).get(name) for member in self.members]
        return [score for score in found if score is not None] if None not in found else []


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric on one set, in every column."""

    metric: str
    set: str
    good: Literal["higher", "lower", ""]
    """Which way is good here; empty where a set or metric has no good end."""
    scores: tuple[Scores, ...]
    """Of the first member of each column that has it, for their kind."""
    values: tuple[Estimate | None, ...]
    """One a column; None where not measured."""
    differences: tuple[Difference | None, ...]
    """Of each column but the first to the first."""
    p_adjusted: tuple[float, ...]
    """Of each difference, p by Holm for all tests of the table; NaN without a test."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The table, and what has to be said about it."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    tests: int
    notes: tuple[str, ...]


def compare(
    found: Sequence[Measured], *, against: Literal["first", "before"] = "first", metrics: Sequence[str] = ()
) -> Compared:
    """The table of several measurements, each beside the first one, or beside the model before its edit.

    Runs that differ in nothing but the seed are one column. `metrics` are those of the table: by default those that
    reports feature, and exams; `all` for every one. What is one column only is compared with before its edit.

    Raises: UsageError if there is nothing to compare with, UnknownNameError for a metric that nothing measured.
    """
    columns = _columns(found)
    if len(columns) == 1 or against == "before":
        columns = (_before(columns), *columns)
    names = [name for name in _ordered(columns) if any(column.scores(name) for column in columns)]
    shown = _chosen(names, metrics)
    pairs = {name: [_beside(columns[0], column, name) for column in columns[1:]] for name in shown}
    p_values = [math.nan if one is None else one.p for row in pairs.values() for one in row]
    adjusted = iter(holm(p_values))
    rows = []
    for name in shown:
        metric, data = metric_and_set(name)
        scores = [column.scores(name) for column in columns]
        measured = tuple(own[0] for own in scores if own)
        rows.append(
            Row(
                metric=metric,
                set=data,
                good=_good(measured[0], data),
                scores=measured,
                values=tuple(over_seeds(own) if own else None for own in scores),
                differences=tuple(pairs[name]),
                p_adjusted=tuple(next(adjusted) for _ in pairs[name]),
            )
        )
    tests = sum(not math.isnan(p) for p in p_values)
    hidden = len(metric_names(names)) - len(metric_names(shown))
    return Compared(columns=columns, rows=tuple(rows), tests=tests, notes=tuple(_notes(columns, rows, tests, hidden)))


def as_dict(found: Compared) -> dict[str, Any]:
    """The table as JSON types; null for what is not known."""
    first, *others = (column.name for column in found.columns)
    rows = []
    for row in found.rows:
        differences = zip(others, row.differences, row.p_adjusted, strict=True)
        rows.append(
            {
                "metric": row.metric,
                "set": row.set,
                "good": row.good,
                "values": {
                    column.name: None if value is None else _estimate(value)
                    for column, value in zip(found.columns, row.values, strict=True)
                },
                "differences": {
                    name: None if one is None else {**_difference(one), "p_adjusted": _number(p)}
                    for name, one, p in differences
                },
            }
        )
    return {
        "first": first,
        "columns": [
            {"name": column.name, "runs": [str(member.path) for member in column.members], "when": column.when}
            for column in found.columns
        ],
        "level": LEVEL,
        "tests": found.tests,
        "rows": rows,
        "notes": list(found.notes),
    }


def _columns(found: Sequence[Measured]) -> tuple[Column, ...]:
    """Runs that differ in nothing but the seed together; the same seed once more begins a column of its own."""
    if not found:
        raise UsageError(f"nothing was named to compare.\n{NAME}")
    paths = [one.path.resolve() for one in found]
    twice = next((one.path for place, one in enumerate(found) if paths[place] in paths[:place]), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice.\nName each run once.")
    groups: list[list[Measured]] = []
    for one in found:
        fitting = [
            group
            for group in groups
            if one.settings is not None
            and group[0].settings == one.settings
            and one.seed not in [other.seed for other in group]
        ]
        if fitting:
            fitting[0].append(one)
        else:
            groups.append([one])
    short = [group[0].path.resolve().name for group in groups]
    columns = []
    for group, name in zip(groups, short, strict=True):
        named = str(group[0].path) if short.count(name) > 1 else name
        seeds = f", {len(group)} seeds" if len(group) > 1 else ""
        columns.append(Column(name=f"{named}{seeds}", members=tuple(group)))
    return tuple(columns)


def _before(columns: Sequence[Column]) -> Column:
    """The models before their edits."""
    members = [member for column in columns for member in column.members]
    without = next((member for member in members if not member.before), None)
    if without is not None and len(columns) == 1:
        raise UsageError(f"there is nothing to compare {without.path} with.\nName another one beside it.")
    if without is not None:
        raise UsageError(
            f"{without.path} holds no scores from before an edit.\n"
            "Leave --against before out, and name the untouched model's scores first: lethe eval MODEL --out base.json."
        )
    models = sorted({member.model for member in members})
    if len(models) > 1:
        raise UsageError(
            f"--against before needs runs of one model. Got {', '.join(models)}.\nCompare each with its own by itself."
        )
    return Column(name="before", members=(members[0],), when="before")


def _ordered(columns: Sequence[Column]) -> list[str]:
    """Names of scores: metrics as reports order them, then sets."""
    names = {name for column in columns for member in column.members for name in getattr(member, column.when)}
    metrics = {metric: place for place, metric in enumerate(metric_names(names))}
    sets = {name: place for place, name in enumerate(SETS)}

    def place(name: str) -> tuple[int, int, str]:
        metric, data = metric_and_set(name)
        return metrics[metric], sets.get(data, len(sets)), data

    return sorted(names, key=place)


def _chosen(names: Sequence[str], metrics: Sequence[str]) -> list[str]:
    if "all" in metrics:
        return list(names)
    known = metric_names(names)
    for metric in metrics:
        if metric not in known:
            raise UnknownNameError(f"none of these measured '{metric}'.\nMetrics: {', '.join(known)}, or all.")
    first = [metric for metric in known if metric in FEATURED or metric.startswith(EXAMS)]
    wanted = metrics or first or known
    return [name for name in names if metric_and_set(name)[0] in wanted]


def _beside(first: Column, second: Column, name: str) -> Difference | None:
    pair = first.scores(name), second.scores(name)
    if not all(pair):
        return None
    known = same_questions(first.members[0], second.members[0], name)
    return difference(over_seeds(pair[0]), over_seeds(pair[1]), paired=known)


def _good(score: Scores, data: str) -> Literal["higher", "lower", ""]:
    if score.better == "neither" or (data and score.role not in ("forget", "keep")):
        return ""
    if score.role == "forget":
        return "lower" if score.better == "higher" else "higher"
    return score.better


def _notes(columns: Sequence[Column], rows: Sequence[Row], tests: int, hidden: int) -> list[str]:
    notes = []
    if tests:
        by_chance = f": about {tests * (1 - LEVEL):.0f} would leave the noise by chance" if tests >= 20 else ""
        notes.append(f"{tests} test{'s' * (tests > 1)}{by_chance}; p is adjusted for all of them (Holm).")
    tested = [one for row in rows for one in row.differences if one is not None and one.test == "McNemar"]
    if any(one.within_noise and not one.low <= 0 <= one.high for one in tested):
        notes.append("Hits are noise until McNemar's exact test says otherwise, whatever the interval: few changed.")
    models = sorted({member.model for column in columns for member in column.members})
    if len(models) > 1:
        notes.append(f"Different models ({', '.join(models)}): a difference may be theirs, not the edit's.")
    unpaired = [
        _why_unpaired(columns[0], column, row)
        for row in rows
        for column, one in zip(columns[1:], row.differences, strict=True)
        if one is not None and one.test and not one.is_paired
    ]
    if unpaired:
        why = "; ".join(list(dict.fromkeys(unpaired))[:3])
        notes.append(f"Unpaired differences, {len(unpaired)} here, hide small changes in the noise: {why}.")
    missing = sum(value is None for row in rows for value in row.values)
    if missing:
        notes.append(f"Not measured: {missing} of {sum(len(row.values) for row in rows)} values.")
    single = [column for column in columns if column.members[0].settings and len(column.members) == 1]
    if any(column.when == "after" for column in single):
        notes.append("One seed says nothing of other seeds: noise is that of the questions, unless seeds are named.")
    if hidden:
        notes.append(f"Metrics that are not shown: {hidden}; --metrics all shows them.")
    return notes


def _why_unpaired(first: Column, second: Column, row: Row) -> str:
    name = f"{row.metric}/{row.set}" if row.set else row.metric
    for column in (first, second):
        if not any(score.per_example for score in getattr(column.members[0], column.when).values()):
            return f"{column.name} has no values by question"
    counts = [len(column.scores(name)[0].per_example) for column in (first, second)]
    if not all(counts):
        return "some metrics keep no values by question"
    if counts[0] != counts[1]:
        return f"{name} was measured on {counts[0]} and {counts[1]} questions"
    if not same_questions(first.members[0], second.members[0], name):
        return f"{first.name} and {second.name} are not known to be measured on the same questions"
    return "seeds differ in what they measured, or values are not numbers"


def _estimate(value: Estimate) -> dict[str, Any]:
    return {
        "value": _number(value.value),
        "stderr": _number(value.stderr),
        "n": value.n,
        "seeds": value.seeds,
        "spread": None if value.spread is None else _number(value.spread),
    }


def _difference(one: Difference) -> dict[str, Any]:
    numbers = {name: _number(getattr(one, name)) for name in ("value", "stderr", "low", "high", "p")}
    return {**numbers, "test": one.test, "paired": one.is_paired, "within_noise": one.within_noise}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
