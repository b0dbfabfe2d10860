"""The command `lethe ls`: what stands on the shelves, and the runs in a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tyro.conf import Positional

from lethe import analyses, methods, metrics, solvers, suites
from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.tables import Table, score
from lethe.errors import UnknownNameError
from lethe.system.plugins import catalogue, nearest, summary


def ls(what: Positional[str] = "methods", folder: Positional[Path] = Path("runs"), as_json: Json = False) -> None:
    """List methods, metrics, analyses, suites, solvers, or the runs in a folder.

    Args:
        what: methods, metrics, analyses, suites, solvers or runs.
        folder: Where runs are looked for.
    """
    lists: dict[str, Callable[[], Table]] = {
        "methods": lambda: _shelf(methods, "method", "what it does"),
        "metrics": metrics_table,
        "analyses": lambda: _shelf(analyses, "analysis", "what it shows"),
        "suites": lambda: _shelf(suites, "suite", "what it measures"),
        "solvers": lambda: _shelf(solvers, "solver", "how it moves weights"),
        "runs": lambda: _runs(folder),
    }
    if what not in lists:
        raise UnknownNameError(f"there is no list '{what}'.{nearest(what, lists)} Lists: {', '.join(lists)}.")
    table = lists[what]()
    if as_json:
        print_json({what: table.as_rows()})
    else:
        show(table)


LS = Command(run=ls, examples=("lethe ls methods", "lethe ls runs"))


def _shelf(shelf: ModuleType, noun: str, what: str) -> Table:
    table = Table("", (noun, what, "source"))
    for name, kind in catalogue(shelf).items():
        table.add(name, summary(kind), kind.source)  # type: ignore[attr-defined]
    return table


def metrics_table() -> Table:
    """Every metric, as reports call it."""
    table = Table("", ("metric", "what it measures", "good on retain", "chance level", "needs", "source"))
    for name, kind in catalogue(metrics).items():
        facts: Any = kind
        better = "" if facts.better == "neither" else facts.better
        table.add(name.replace("-", "_"), summary(kind), better, facts.chance, facts.needs, facts.source)
    return table


def _runs(folder: Path) -> Table:
    """Complete runs directly inside a folder."""
    table = Table("", ("run", "method", "model", "layer", "forget", "retain"), ("layer",))
    for path in sorted(folder.glob("*/report.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            after = report["after"]
            cells = [report["method"]["name"], report["model"], str(report["config"]["layer"])]
        except (OSError, ValueError, KeyError) as error:
            table.add(str(path.parent), f"unreadable report.json ({type(error).__name__})")
            continue
        for data in ("forget", "retain"):
            name = next((f"{m}/{data}" for m in ("multiple_choice", "perplexity") if f"{m}/{data}" in after), None)
            cells.append(f"{score(name.partition('/')[0], after[name])}" if name else "not measured")
        table.add(str(path.parent), *cells)
    if not table.rows:
        table.caption = f"No complete run in {folder}."
    return table
