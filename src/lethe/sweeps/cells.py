"""Cells of a sweep that one process runs: what they can share is found out, kept while they run, and given up."""

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lethe.errors import DivergedError, RunFolderError, UsageError
from lethe.model.hidden_cache import HiddenCache
from lethe.model.layers import d_model, trainable_names
from lethe.model.recordings import Cut, Recordings, Store
from lethe.runs import config_file, unlearn
from lethe.runs.run_folder import RunFolder
from lethe.runs.workspace import Workspace
from lethe.solvers.gradient import Gradient
from lethe.sweeps.grid import Cell
from lethe.sweeps.spec import Sweep
from lethe.system import machine
from lethe.system.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Sharable:
    """What recordings would take, and where they are kept."""

    cells: int
    done: int
    """Cells that an earlier call finished."""
    slices: int
    """Different slices that gradient cells train."""
    nbytes: int
    """Estimated size of one seed's recordings: of all slices, or of one if they are not recorded together."""
    place: Literal["ram", "disk", "none"]
    together: bool
    """Whether one pass of the model records a batch for all slices."""
    groups: int = 0
    """Of cells that other processes run, each with recordings of its own; 0 if this process runs all."""


def run_group(
    spec: Sweep, todo: Sequence[Cell], *, command: str = "", progress: Progress | None = None, workers: int = 1
) -> dict[str, str]:
    """Run those of the cells that are not complete, in this process; what went wrong with diverged ones, by name.

    Everything that they share is their own, so that groups of one sweep can run in processes beside each other;
    `workers` of them divide what memory and disk recordings may take.

    Raises: any error of types.py but DivergedError.
    """
    open_cells = [cell for cell in todo if not is_complete(cell)]
    if not open_cells:
        return {}
    # A folder of its own for each group: the name of a cell stands in one group only.
    cache = spec.out / "cache" / open_cells[0].name
    with machine.threads(spec.config.base.threads), shared(spec, todo, cache) as workspace:
        found = plan(spec, open_cells, workspace, count=len(open_cells), workers=workers)
        provide(spec, open_cells, found, cache, workspace, workers=workers)
        return run_cells(open_cells, workspace, command, progress or Progress())


@contextlib.contextmanager
def shared(spec: Sweep, todo: Sequence[Cell], cache: Path) -> Iterator[Workspace]:
    """The workspace that cells share, given up in the end."""
    depth = None if spec.config.evaluation.evaluate == "all" else max(cell.config.layer for cell in todo) + 1
    workspace = Workspace(spec.config.base, share=True, depth=depth)
    try:
        yield workspace
    finally:
        workspace.clear()
        shutil.rmtree(cache, ignore_errors=True)


def run_cells(todo: Sequence[Cell], workspace: Workspace, command: str, progress: Progress) -> dict[str, str]:
    """Run the cells that are not complete; what went wrong with those that diverged, by name."""
    failed: dict[str, str] = {}
    for cell in todo:
        if is_complete(cell):
            # It may have been killed between its report and its end.
            RunFolder(cell.config.out).drop_checkpoint()
        else:
            try:
                unlearn.unlearn(
                    cell.method, cell.config, command=command, progress=_Warnings(progress), workspace=workspace
                )
            except DivergedError as error:
                failed[cell.name] = str(error).partition("\n")[0]
                progress.warn(f"{cell.name}: {failed[cell.name]}")
        progress.advance(cell.name)
    return failed


def is_complete(cell: Cell) -> bool:
    """Whether the cell's folder holds its run, complete.

    Raises: RunFolderError if it holds another one, or is damaged.
    """
    folder = RunFolder(cell.config.out)
    try:
        return folder.holds(config_file.plain(cell.method, cell.config)) and folder.is_complete
    except RunFolderError as error:
        # Another --out, which a run alone could take, is no way for one cell.
        found = str(error).partition("\n")[0]
        raise RunFolderError(
            f"{found}\nDelete that folder and run the sweep again, or choose another --out."
        ) from error


def plan(
    spec: Sweep, todo: Sequence[Cell], workspace: Workspace, *, count: int, done: int = 0, workers: int = 1
) -> tuple[Sharable, tuple[Cut, ...]]:
    """What cells can share, estimated from the rows of the first one, and the slices to record together.

    `count` and `done` are the whole sweep's cells, for the plan to tell.

    Raises: UsageError if the recordings do not fit the disk that they may take; any error of the corpora.
    """
    config = todo[0].config
    part = workspace.skeleton(max(cell.config.layer for cell in todo) + 1)
    cuts: dict[Cut, None] = {}
    for cell in todo:
        if isinstance(cell.config.solver, Gradient):
            trained = cell.config.trained_layers
            names = [trainable_names(part, layer, cell.config.train_modules) for layer in trained]
            cuts[trained[0], cell.config.layer + 1, sum(names, ())] = None
    if not cuts or spec.cache == "none":
        return Sharable(cells=count, done=done, slices=len(cuts), nbytes=0, place="none", together=False), ()
    solver = next(cell.config.solver for cell in todo if isinstance(cell.config.solver, Gradient))
    corpora = workspace.corpora(config.data, spec.method.reads)
    batches = workspace.schedule(config, corpora, solver.steps, solver.accumulate)
    distinct = {id(b): b for step in range(batches.steps) for b in batches.at(step)[1:]}
    tokens = sum(batch.input_ids.numel() for batch in distinct.values())
    state = tokens * d_model(part) * workspace.dtype.itemsize
    # A state at each boundary, which neighbours share, and the attention's output in each slice's first layer.
    boundaries = {place for start, stop, _ in cuts for place in (start, stop)}
    whole, single = state * (len(boundaries) + len(cuts)), 3 * state
    place, together = _place(spec, whole, single, machine.free_bytes(workspace.device) // (2 * workers), workers)
    nbytes = whole if together else single
    found = Sharable(cells=count, done=done, slices=len(cuts), nbytes=nbytes, place=place, together=together)
    return found, tuple(cuts) if together else ()


def provide(
    spec: Sweep,
    todo: Sequence[Cell],
    found: tuple[Sharable, tuple[Cut, ...]],
    cache: Path,
    workspace: Workspace,
    *,
    workers: int = 1,
) -> None:
    """Make room for what the plan keeps."""
    shared, cuts = found
    free = machine.free_bytes(workspace.device) // workers
    on_disk = shared.place == "disk"
    if shared.place != "none":
        limit = _disk_bytes(spec) // workers if on_disk else free // 2
        workspace.recordings = Recordings(Store(limit, cache if on_disk else None), cuts)
    if spec.cache != "none" and spec.config.evaluation.evaluate == "all":
        starts = {cell.config.trained_layers[0] for cell in todo}
        workspace.hidden = HiddenCache(sorted(starts), Store(free // 4))


def describe(found: Sharable) -> str:
    """The plan in a sentence."""
    size = found.nbytes / 1e9
    shown = f"{size:.2g} GB" if size >= 0.1 or not math.isfinite(size) else f"{size * 1000:.2g} MB"
    where = {"ram": "in memory", "disk": "in mapped files", "none": ""}[found.place]
    resumed = f", {found.done} of them complete" if found.done else ""
    if found.groups:
        each = "1 group" if found.groups == 1 else f"{found.groups} groups"
        return (
            f"{found.cells} cells{resumed}; {each} of one layer each, which share what they record, go to the workers."
        )
    if found.place == "none":
        return f"{found.cells} cells{resumed}; no recordings are shared."
    passes = "one pass for all slices" if found.together and found.slices > 1 else "a pass for each slice"
    return f"{found.cells} cells{resumed}; recordings of {found.slices} slices take about {shown} {where} ({passes})."


def _place(
    spec: Sweep, whole: int, single: int, room: int, workers: int
) -> tuple[Literal["ram", "disk", "none"], bool]:
    if spec.cache == "ram" or (spec.cache == "auto" and whole <= room):
        return "ram", whole <= room
    limit = _disk_bytes(spec) // workers
    if whole <= limit:
        return "disk", True
    if spec.cache == "disk" and single > limit:
        raise UsageError(
            f"recordings of one slice need {single / 1e9:.3g} GB ({whole / 1e9:.3g} GB for all slices of the grid), "
            f"and they may take {limit / 1e9:.3g} GB of disk.\nRaise --disk-gb, lower --steps, or pass --cache none."
        )
    if spec.cache == "disk":
        return "disk", False
    return ("ram" if single <= room else "disk" if single <= limit else "none"), False


def _disk_bytes(spec: Sweep) -> int:
    if spec.disk_gb is not None:
        return int(spec.disk_gb * 1e9)
    return shutil.disk_usage(spec.out).free // 2


class _Warnings(Progress):
    """Hands on warnings alone: a bar for each phase of each cell would be too much."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def warn(self, text: str) -> None:
        self.progress.warn(text)
