"""The command `lethe sweep`: a grid of runs that share their work, and the one that a stated rule chooses."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, note, print_json, show
from lethe.cli.unlearn import UNLEARN, RunFlags, form, starting_point, with_behaviour
from lethe.errors import UsageError
from lethe.sweeps.settings import KEPT
from lethe.system.plugins import name_of


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class _Sweep(RunFlags):
    """The flags of `lethe sweep`; for each method a form derives from them, which knows the method's settings."""

    sweep: _Settings = _Settings()
    method: Any
    as_json: Json = False

    line: ClassVar[str] = ""
    """The command as it was typed."""

    def __call__(self) -> None:
        """Run the sweep, and show what was chosen."""
        from lethe.sweeps import outcomes
        from lethe.sweeps.cells import describe
        from lethe.sweeps.grid import parse as parse_grid
        from lethe.sweeps.page import table, write_page
        from lethe.sweeps.spec import Sweep
        from lethe.sweeps.sweep import sweep as run_sweep
        from lethe.system.machine import explaining_memory

        if self.sweep.engine == "ray" and type(self.method).__module__.endswith(".py"):
            raise UsageError(
                f"Ray's workers cannot import {name_of(type(self.method))}.\nPass --engine local, or make the method "
                "a file of src/lethe/methods on every machine."
            )
        method, run = with_behaviour(self.method), self.run
        own = {field.name: getattr(self.sweep, field.name) for field in fields(_Settings)}
        axes, floor = parse_grid(own.pop("grid"), method, run), own.pop("keep")
        spec = Sweep(method=method, config=run, axes=axes, floor=floor, out=run.out, **own)
        with (
            progress_bars.Bars() as progress,
            explaining_memory(
                "with the whole model and its recordings.\nPass --cache disk, or a smaller --batch-size."
            ),
        ):
            found = run_sweep(spec, command=self.line, progress=progress, on_plan=lambda plan: note(describe(plan)))
        path = write_page(found, spec.out)
        if self.as_json:
            print_json({"folder": str(spec.out), **outcomes.as_dict(found)})
        else:
            show(table(found))
            show(f"report: {path}")


def sweep(method: str, argv: Sequence[str]) -> tuple[type[_Sweep], list[str]]:
    """Run a grid of settings on one model, sharing what runs have in common, and choose one by a stated rule."""
    own, run, rest = starting_point("sweep", method, argv)
    line = shlex.join(["lethe", "sweep", method, *argv])
    return form(_Sweep, own, run.changed(out=Path("runs/sweep")), line), rest


SWEEP = Command(
    run=sweep,
    usage="METHOD --grid KEY=V,V,... [KEY=V,V,...] --seeds 0 1 2 --out DIR [run flags]",
    words=UNLEARN.words,
    about="All settings: lethe sweep METHOD --help",
    examples=(
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=2,3,5 --seeds 0 1 2 --out runs/sweep",
        "lethe sweep rmu --model ./my-model --forget a.jsonl --retain r.txt --grid layer=7,11 steering_coeff=20,50",
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=1,2,3,5,8,10 --halving --out runs/halved",
        "lethe sweep adaptive-rmu --grid layer=3..9 beta=1..10 --engine optuna --trials 40 --out runs/searched",
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=2,3,5 --engine ray --workers 2 --out runs/on-ray",
    ),
)
