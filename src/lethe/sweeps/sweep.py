"""A sweep: a grid of runs on one model that share what they have in common, each in a run folder of its own."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lethe.errors import DivergedError, RunFolderError
from lethe.evaluation.calibrate import Mixed, calibrate
from lethe.model.patch import Patch
from lethe.runs.config_file import read_run_config
from lethe.runs.run_folder import RunFolder
from lethe.runs.workspace import Workspace
from lethe.sweeps import cells as cells_module
from lethe.sweeps import halving, optuna_search, outcomes
from lethe.sweeps.cells import Sharable, is_complete, run_cells
from lethe.sweeps.grid import Cell
from lethe.sweeps.outcomes import Outcomes
from lethe.sweeps.spec import Sweep, about
from lethe.sweeps.sweep_folder import locked
from lethe.system import machine
from lethe.system.atomic_files import write_json, write_text
from lethe.system.progress import Progress


def sweep(
    spec: Sweep,
    *,
    command: str = "",
    progress: Progress | None = None,
    on_plan: Callable[[Sharable], None] = lambda plan: None,
) -> Outcomes:
    """Run every cell that is not complete yet, choose one, and write sweep.json and sweep.csv into `out`.

    Cells are complete run folders, equal to those of runs made alone. A sweep that was interrupted at any moment goes
    on when it is called again. `on_plan` hears what will be kept before anything is trained. A cell that diverges is
    noted and left out.

    Raises: any error of types.py; RunFolderError for a folder of another sweep, or one that another process works on;
    UsageError if the recordings do not fit the disk that they may take.
    """
    progress = progress or Progress()
    # Of a search these are the ends of its ranges, and every layer that it may come to.
    all_cells = spec.cells()
    base = Workspace(spec.config.base)
    for cell in all_cells:
        base.check_layer(cell.config.layer)
    rungs = halving.ladder(spec) if spec.halving else ()
    cache = spec.out / "cache"
    with locked(spec.out, about(spec)), machine.threads(spec.config.base.threads):
        shutil.rmtree(cache, ignore_errors=True)
        with cells_module.shared(spec, all_cells, cache) as workspace:
            seeds = len(dict.fromkeys(spec.seeds))
            count = {"optuna": spec.trials * seeds}.get(spec.engine, len(all_cells))
            if rungs:
                count = sum(rung.settings for rung in rungs) * seeds
            is_grid = not rungs and spec.engine != "optuna"
            todo = [cell for cell in all_cells if not is_complete(cell)] if is_grid else all_cells
            done = len(all_cells) - len(todo)
            if todo and spec.engine == "ray":
                groups = len(_by_layer(todo))
                on_plan(
                    Sharable(cells=count, done=done, slices=0, nbytes=0, place="none", together=False, groups=groups)
                )
            elif todo:
                planned = cells_module.plan(spec, todo, workspace, count=count, done=done)
                on_plan(planned[0])
                cells_module.provide(spec, todo, planned, cache, workspace)
            started = time.perf_counter()
            work = _Work(spec, workspace, command, progress)
            found, tried, failed = work.through(all_cells)
            if spec.finalists:
                names = [point.settings for point in found.ranked()[: spec.finalists]]
                finals = [
                    replace(
                        c, config=c.config.changed(limit=spec.config.evaluation.limit, out=spec.out / "finals" / c.name)
                    )
                    for c in tried
                    if c.settings in names and c.name not in failed
                ]
                failed |= work(finals, "finalists")
                found = outcomes.joined(found, _read(spec, finals, failed))
            if spec.calibrate is not None:
                found = _calibrated(spec, found, workspace, progress)
            found = replace(
                found,
                failed=failed,
                seconds=time.perf_counter() - started,
                device=str(workspace.device),
                command=command,
                passes=workspace.recordings.passes if workspace.recordings else 0,
                served=workspace.hidden.served if workspace.hidden else 0,
            )
        write_text(spec.out / "sweep.csv", outcomes.as_csv(found))
        # Last, because its presence says that the sweep is complete.
        write_json(spec.out / "sweep.json", outcomes.as_dict(found))
    return found


@dataclass(frozen=True)
class _Work:
    """How cells are run: here or on Ray."""

    spec: Sweep
    workspace: Workspace
    command: str
    progress: Progress

    def __call__(self, todo: Sequence[Cell], phase: str) -> dict[str, str]:
        """Run the cells that are not complete; what went wrong with those that diverged, by name.

        Raises: DivergedError if all did.
        """
        self.progress.phase(phase, len(todo))
        if self.spec.engine == "ray":
            failed = self._on_ray(todo)
        else:
            failed = run_cells(todo, self.workspace, self.command, self.progress)
        return _checked(todo, failed)

    def through(self, cells: Sequence[Cell]) -> tuple[Outcomes, Sequence[Cell], dict[str, str]]:
        """The outcomes of a whole grid, ladder or search; its cells; and what diverged, by name."""
        if self.spec.halving:
            found, failed = halving.halve(self.spec, self)
            return found, cells, failed
        if self.spec.engine == "optuna":
            return self._searched()
        failed = self(cells, "cells")
        return _read(self.spec, cells, failed), cells, failed

    def _searched(self) -> tuple[Outcomes, Sequence[Cell], dict[str, str]]:
        spec = self.spec
        self.progress.phase("trials", spec.trials * len(dict.fromkeys(spec.seeds)))
        cells, failed = optuna_search.search(
            spec,
            lambda todo: run_cells(todo, self.workspace, self.command, self.progress),
            on_done=lambda cell: self.progress.advance(cell.name),
        )
        _checked(cells, failed)
        found = _read(spec, cells, failed)
        how = f"{len(found.points)} settings out of ranges: the first 10 at random, then as Optuna proposed them (TPE)."
        return replace(found, how=how), cells, failed

    def _on_ray(self, todo: Sequence[Cell]) -> dict[str, str]:
        from lethe.sweeps.on_ray import run_cells as run_on_ray

        left = []
        for cell in todo:
            if is_complete(cell):
                self.progress.advance(cell.name)
            else:
                left.append(cell)
        if not left:
            return {}
        return run_on_ray(_by_layer(left), self.spec, self.command, self.progress, self.spec.workers)


def _by_layer(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share recordings."""
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.config.layer, []).append(cell)
    return list(groups.values())


def _read(spec: Sweep, cells: Sequence[Cell], failed: Collection[str]) -> Outcomes:
    left = [cell for cell in cells if cell.name not in failed]
    return outcomes.read(spec.method, left, floor=spec.floor, out=spec.out)


def _checked(todo: Sequence[Cell], failed: dict[str, str]) -> dict[str, str]:
    if todo and len(failed) == len(todo):
        raise DivergedError(f"every cell diverged; the first: {failed[todo[0].name]}\nLower --lr or the coefficients.")
    return failed


def _calibrated(spec: Sweep, found: Outcomes, workspace: Workspace, progress: Progress) -> Outcomes:
    """The outcomes ranked by what each cell's edit forgets once it is mixed with the base."""
    assert spec.calibrate is not None
    config = spec.config if spec.proxy is None else spec.config.changed(limit=spec.proxy)
    model, tokenizer = workspace.model(), workspace.tokenizer
    sets = workspace.sets(config, workspace.corpora(config.data, spec.method.reads))
    path = spec.out / "calibrated.json"
    tau = spec.calibrate
    known = _mixtures(path)
    todo = [cell for cell in found.cells if cell.stopped is None]
    progress.phase("calibrate", len(todo))
    for cell in todo:
        key = f"{tau:g} {cell.folder}"
        if key not in known:
            folder = RunFolder(spec.out / cell.folder)
            if not folder.patch.exists():
                raise RunFolderError(f"{folder.path} has lost its patch.\nDelete that folder and run the sweep again.")
            of_cell = read_run_config(folder.config)
            with workspace.reading(model, of_cell.trained_layers[0]):
                known[key] = calibrate(model, tokenizer, Patch.load(folder.patch), sets, tau)
            written = {name: dataclasses.asdict(mixed) for name, mixed in known.items()}
            write_json(path, written)
        progress.advance(cell.name)
    mixed = {cell.name: dataclasses.asdict(known[f"{tau:g} {cell.folder}"]) for cell in todo}
    return outcomes.calibrated(found, mixed, tau)


def _mixtures(path: Path) -> dict[str, Mixed]:
    """What an earlier call found, by tau and cell."""
    if not path.exists():
        return {}
    try:
        return {key: Mixed(**one) for key, one in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} cannot be read.\nDelete it and run the sweep again.") from error
