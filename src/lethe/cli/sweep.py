"""The command `lethe sweep`: a grid of runs that share their work, and the one that a stated rule chooses."""

import dataclasses
import shlex
from pathlib import Path
from typing import Literal

from lethe.cli import progress_bars, tables
from lethe.cli.console import NOTES, RESULT, Json, examples, print_json, require_method
from lethe.cli.run_flags import parse_run, value_of
from lethe.data.settings import BUILTIN
from lethe.runs import config_file as configs
from lethe.runs.defaults import defaults
from lethe.sweeps import outcomes
from lethe.sweeps.grid import parse as parse_grid
from lethe.sweeps.outcomes import KEPT
from lethe.system.machine import explaining_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """The sweep."""

    grid: tuple[str, ...] = ()
    """Settings of the method or the run with their values: layer=3,7,11 beta=2,3,5. Several numbers as one value are
    joined by +: train_layers=3+4,5+6. With --engine optuna a number may have a range: beta=1..10 lr=1e-5..1e-3:log."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each cell is run with every one."""
    engine: Literal["local", "ray", "optuna"] = "local"
    """local: run cells here, one after another. ray: a layer's cells at a time on the workers of a Ray cluster (that of
    RAY_ADDRESS, else one on this machine), which share this file system. optuna: here, as Optuna proposes them; --grid
    then holds at least one range."""
    workers: int | None = None
    """With --engine ray: groups of cells that run beside each other; by default as many as the cluster has room for."""
    trials: int = 40
    """With --engine optuna: settings to try, each with all seeds; the first 10 are drawn at random. The same command
    with more goes on where it ended."""
    halving: bool = False
    """Spend little on poor settings of the grid: train all for a few steps, the best third anew for three times as
    many, and so on, until the last three are trained for all --steps."""
    cache: Literal["auto", "ram", "disk", "none"] = "auto"
    """Where recordings are kept while the sweep runs: in memory, in mapped files under --out, or nowhere; auto takes
    the first of these that they fit."""
    disk_gb: float | None = None
    """Most disk that recordings may take, in GB; by default half of what is free."""
    proxy: int | None = None
    """Measure every cell on at most this many questions of each set."""
    finalists: int = 0
    """Measure so many of the best settings on all questions (with --proxy)."""
    keep: float = KEPT
    """Share of the base's retain score that a cell must keep to be chosen."""
    calibrate: float | None = None
    """Rank by what each edit forgets once it is mixed with the base so far that this share of the base's retain score
    is kept."""


def sweep(argv: list[str]) -> None:
    """Run a grid of settings on one model, sharing what runs have in common, and choose one by a stated rule."""
    if not argv or argv[0] in ("-h", "--help"):
        RESULT.print("usage: lethe sweep METHOD --grid KEY=V,V,... [KEY=V,V,...] --seeds 0 1 2 --out DIR [run flags]\n")
        RESULT.print(f"{sweep.__doc__}\n")
        RESULT.print(tables.methods())
        RESULT.print("All settings: lethe sweep METHOD --help")
        examples("sweep")
        return
    require_method("sweep", argv)
    kind = configs.method_class(argv[0])
    method, run = defaults(kind, value_of("--model", argv) or BUILTIN, solver=value_of("--solver", argv))
    chosen, method, run = parse_run(
        "sweep",
        method,
        run.changed(out=Path("runs/sweep")),
        argv[1:],
        ("sweep", _Settings, _Settings()),
        ("as_json", Json, False),
    )
    from lethe.sweeps.cells import describe
    from lethe.sweeps.page import table, write_page
    from lethe.sweeps.spec import Sweep
    from lethe.sweeps.sweep import sweep as run_sweep

    own = {field.name: getattr(chosen.sweep, field.name) for field in dataclasses.fields(_Settings)}
    axes, floor = parse_grid(own.pop("grid"), method, run), own.pop("keep")
    spec = Sweep(method=method, config=run, axes=axes, floor=floor, out=run.out, **own)
    with (
        progress_bars.Bars(NOTES) as progress,
        explaining_memory("with the whole model and its recordings.\nPass --cache disk, or a smaller --batch-size."),
    ):
        found = run_sweep(
            spec,
            command=shlex.join(["lethe", "sweep", *argv]),
            progress=progress,
            on_plan=lambda plan: NOTES.print(describe(plan)),
        )
    path = write_page(found, spec.out)
    if chosen.as_json:
        print_json({"folder": str(spec.out), **outcomes.as_dict(found)})
    else:
        RESULT.print(table(found))
        RESULT.print(f"report: {path}")
