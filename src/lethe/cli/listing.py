"""The command `lethe ls`: what stands on the shelves, and the runs in a folder."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tyro.conf import Positional

from lethe import analyses, methods, metrics, solvers, suites
from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.tables import Table
from lethe.errors import RunFolderError, UnknownNameError
from lethe.solvers import optimizers
from lethe.system.plugins import catalogue, nearest, summary


def ls(what: Positional[str] = "methods", folder: Positional[Path] = Path("runs"), as_json: Json = False) -> None:
    """List methods, metrics, analyses, suites, solvers, optimizers, or the runs in a folder.

    Args:
        what: methods, metrics, analyses, suites, solvers, optimizers or runs.
        folder: Where runs are looked for.
    """
    lists: dict[str, Callable[[], Table]] = {
        "methods": lambda: _shelf(methods, "method", "what it does"),
        "metrics": metrics_table,
        "analyses": lambda: _shelf(analyses, "analysis", "what it shows"),
        "suites": lambda: _shelf(suites, "suite", "what it measures"),
        "solvers": lambda: _shelf(solvers, "solver", "how it moves weights"),
        "optimizers": lambda: _shelf(optimizers, "optimizer", "how it steps along a gradient"),
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
    table = Table("", ("metric", "what it measures", "unit", "higher means", "chance level", "needs", "source"))
    for name, kind in catalogue(metrics).items():
        facts: Any = kind
        higher = {"more": "more knowledge", "less": "less knowledge"}.get(facts.higher_means, "")
        table.add(name.replace("-", "_"), summary(kind), facts.unit, higher, facts.chance, facts.needs, facts.source)
    return table


def _runs(folder: Path) -> Table:
    """Complete runs directly inside a folder."""
    from lethe.report.record import read_run
    from lethe.report.words import with_error

    table = Table("", ("run", "method", "model", "layer", "forget", "retain"), ("layer",))
    for path in sorted(folder.glob("*/report.json")):
        try:
            run = read_run(path.parent)
        except RunFolderError:
            table.add(str(path.parent), "unreadable report.json")
            continue
        cells = [run.method["name"], run.model, str(run.config.get("layer"))]
        for data in ("forget", "retain"):
            names = (f"{metric}/{data}" for metric in ("multiple_choice", "perplexity"))
            score = next((run.after[name] for name in names if name in run.after), None)
            cells.append("not measured" if score is None else with_error(score))
        table.add(str(path.parent), *cells)
    if not table.rows:
        table.caption = f"No complete run in {folder}."
    return table
