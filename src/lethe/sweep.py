"""A sweep: a grid of runs on one model that share what they have in common, each in a run folder of its own."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedModel

from lethe import __version__, decoder, edits, environment, outcomes, run, sources
from lethe import config as configs
from lethe.calibrate import calibrate
from lethe.config import RunConfig
from lethe.evalsets import of_run
from lethe.folder import RunFolder
from lethe.grid import Axes, Cell, cells
from lethe.outcomes import KEPT, Outcomes
from lethe.patch import Patch
from lethe.progress import Progress
from lethe.protocols import SteeringMethod
from lethe.recordings import Cut, Recordings, Store
from lethe.saving import write_text
from lethe.sharing import Sharing
from lethe.slice import LayerSlice
from lethe.starts import Starts
from lethe.sweep_folder import locked
from lethe.types import RUN_FORMAT, DivergedError, InvalidValueError, UsageError
from lethe.weights import load_tokenizer, skeleton

Found = TypeVar("Found")
Place = Literal["auto", "ram", "disk", "none"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is swept, and where it is written."""

    method: SteeringMethod
    config: RunConfig
    """Settings of every cell but those of the grid."""
    axes: Axes
    """Values of each setting of the grid."""
    out: Path
    seeds: tuple[int, ...] = (0,)
    cache: Place = "auto"
    """Where recordings are kept: in memory, in mapped files under `out`, nowhere, or where they fit."""
    disk_gb: float | None = None
    """Most disk that recordings may take; by default half of what is free."""
    proxy: int | None = None
    """At most this many questions of each set for every cell."""
    finalists: int = 0
    """How many of the best settings are measured on all questions."""
    floor: float = KEPT
    """Share of the base's retain score that a cell must keep to be chosen."""
    calibrate: float | None = None
    """Rank by the forget score of the largest mixing with the base that keeps this share of its retain score."""

    def __post_init__(self) -> None:
        if self.finalists < 0:
            raise InvalidValueError(f"'finalists' must be 0 or more. Got {self.finalists}.")
        if self.finalists and self.proxy is None:
            raise UsageError("'finalists' are measured on more questions than the others.\nPass --proxy N as well.")
        for name in ("floor", "calibrate"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InvalidValueError(f"'{name}' must be in (0, 1]. Got {value}.")
        if self.config.evaluate == "none" and (self.finalists or self.calibrate is not None):
            raise UsageError("nothing is measured, so there is nothing to rank by.\nLeave --evaluate none out.")
        if self.config.on is not None or self.config.layers_from is not None:
            raise UsageError("a sweep starts from the untouched model.\nLeave --on and --layers-from out.")

    def cells(self) -> list[Cell]:
        """The runs of the grid.

        Raises: UsageError, InvalidValueError.
        """
        config = self.config if self.proxy is None else replace(self.config, limit=self.proxy)
        return cells(self.method, config, self.axes, self.seeds, self.out / "cells")


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


@dataclass(eq=False)
class Kept(Sharing):
    """Keeps the last thing of each kind, recordings, and hidden states of what is measured."""

    depth: int | None
    """Layers of the model to load; None for all."""
    recordings: Recordings | None = None
    starts: Starts | None = None
    _found: dict[str, tuple[Hashable, Any]] = field(default_factory=dict, repr=False)

    def once(self, kind: str, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returned for this kind the last time, if the key is the same."""
        if kind not in self._found or self._found[kind][0] != key:
            if kind == "plan" and self.recordings is not None:
                self.recordings.clear()
            self._found.pop(kind, None)
            self._found[kind] = key, find()
        return self._found[kind][1]

    def model(
        self, key: Hashable, layers: int | None, load: Callable[[int | None], PreTrainedModel]
    ) -> PreTrainedModel:
        """The one model that is loaded."""
        return self.once("model", key, lambda: load(self.depth))

    def cut(self, model: PreTrainedModel, start: int, stop: int, train: tuple[str, ...]) -> LayerSlice:
        """A slice that shares its recordings."""
        if self.recordings is None:
            return super().cut(model, start, stop, train)
        return self.recordings.cut(model, start, stop, train)

    @contextlib.contextmanager
    def reading(self, model: PreTrainedModel, first: int | None) -> Iterator[None]:
        """Metrics start at the first edited layer."""
        with contextlib.nullcontext() if self.starts is None else self.starts.reading(model, first):
            yield

    def clear(self) -> None:
        """Give up what takes memory or disk."""
        self._found.clear()
        for part in (self.recordings, self.starts):
            if part is not None:
                part.clear()


def sweep(
    spec: Sweep,
    *,
    command: str = "",
    progress: Progress | None = None,
    on_plan: Callable[[Sharable], None] = lambda plan: None,
) -> Outcomes:
    """Run every cell that is not complete yet, choose one, and write sweep.json, sweep.csv and the page into `out`.

    Cells are complete run folders, equal to those of runs made alone. A sweep that was interrupted at any moment goes
    on when it is called again. `on_plan` hears what will be kept before anything is trained. A cell that diverges is
    noted and left out.

    Raises: any error of types.py; RunFolderError for a folder of another sweep, or one that another process works on;
    UsageError if the recordings do not fit the disk that they may take.
    """
    progress = progress or Progress()
    all_cells = spec.cells()
    for cell in all_cells:
        sources.check_layer(cell.config)
    device = environment.find_device(spec.config.device)
    with locked(spec.out, _about(spec)), environment.threads(spec.config.threads):
        shutil.rmtree(spec.out / "cache", ignore_errors=True)
        layers = None if spec.config.evaluate == "all" else max(cell.config.layer for cell in all_cells) + 1
        kept = Kept(depth=layers)
        try:
            open_cells = [cell for cell in all_cells if not _is_complete(cell)]
            if open_cells:
                plan, cuts = _plan(spec, open_cells, len(all_cells), kept)
                on_plan(plan)
                _provide(spec, plan, cuts, kept)
            started = time.perf_counter()
            failed = _run(all_cells, kept, command, progress, "cells")
            found = outcomes.read(spec.method, [c for c in all_cells if c.name not in failed], floor=spec.floor)
            if spec.finalists:
                names = [point.settings for point in found.ranked()[: spec.finalists]]
                finals = [
                    replace(c, config=replace(c.config, limit=spec.config.limit, out=spec.out / "finals" / c.name))
                    for c in all_cells
                    if c.settings in names and c.name not in failed
                ]
                failed |= _run(finals, kept, command, progress, "finalists")
                found = outcomes.joined(
                    found, outcomes.read(spec.method, [c for c in finals if c.name not in failed], floor=spec.floor)
                )
            if spec.calibrate is not None:
                found = _calibrated(spec, found, all_cells, kept, progress)
            found = replace(
                found,
                failed=failed,
                seconds=time.perf_counter() - started,
                device=str(device),
                command=command,
                passes=kept.recordings.passes if kept.recordings else 0,
                served=kept.starts.served if kept.starts else 0,
            )
        finally:
            kept.clear()
            shutil.rmtree(spec.out / "cache", ignore_errors=True)
        write_text(spec.out / "sweep.csv", outcomes.as_csv(found))
        # Last, because its presence says that the sweep is complete.
        write_text(spec.out / "sweep.json", json.dumps(outcomes.as_dict(found), indent=1) + "\n")
    return found


def _run(todo: Sequence[Cell], kept: Kept, command: str, progress: Progress, phase: str) -> dict[str, str]:
    """Run the cells that are not complete; what went wrong with those that could not be finished, by name."""
    progress.phase(phase, len(todo))
    failed: dict[str, str] = {}
    for cell in todo:
        if not _is_complete(cell):
            try:
                run.unlearn(cell.method, cell.config, command=command, progress=_Warnings(progress), sharing=kept)
            except DivergedError as error:
                failed[cell.name] = str(error).partition("\n")[0]
                progress.warn(f"{cell.name}: {failed[cell.name]}")
        progress.advance(cell.name)
    if todo and len(failed) == len(todo):
        raise DivergedError(f"every cell diverged; the first: {failed[todo[0].name]}\nLower --lr or the coefficients.")
    return failed


def _calibrated(spec: Sweep, found: Outcomes, todo: Sequence[Cell], kept: Kept, progress: Progress) -> Outcomes:
    """The outcomes ranked by what each cell's edit forgets once it is mixed with the base."""
    assert spec.calibrate is not None
    config = todo[0].config
    device = environment.find_device(config.device)
    source = sources.model_source(config.model)
    dtype = sources.find_dtype(config.dtype, source, config.revision, device)
    tokenizer = load_tokenizer(source, config.revision)
    model = sources.load(config, device, dtype, kept)
    material = edits.read(spec.method, config, tokenizer)
    sets = of_run(config, material.forget, material.retain, material.asked, tokenizer)
    path = spec.out / "calibrated.json"
    tau = spec.calibrate
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    progress.phase("calibrate", len(found.cells))
    for cell in found.cells:
        key = f"{tau:g} {cell.folder}"
        if key not in known:
            patch = Patch.load(RunFolder(spec.out / cell.folder).patch)
            of_cell = configs.read_run_config(spec.out / cell.folder / "config.yaml")
            with kept.reading(model, of_cell.trained_layers[0]):
                mixed = calibrate(model, tokenizer, patch, sets, tau)
            known[key] = dataclasses.asdict(mixed)
            write_text(path, json.dumps(known, indent=1) + "\n")
        progress.advance(cell.name)
    return outcomes.calibrated(found, {c.name: known[f"{tau:g} {c.folder}"] for c in found.cells}, tau)


def _plan(spec: Sweep, todo: Sequence[Cell], count: int, kept: Kept) -> tuple[Sharable, tuple[Cut, ...]]:
    """What the cells can share, estimated from the rows of the first one."""
    config = todo[0].config
    source = sources.model_source(config.model)
    part = skeleton(source, layers=max(cell.config.layer for cell in todo) + 1, revision=config.revision)
    cuts: dict[Cut, None] = {}
    for cell in todo:
        if cell.config.solver == "gradient":
            trained = cell.config.trained_layers
            names = [decoder.trainable_names(part, layer, cell.config.train_modules) for layer in trained]
            cuts[trained[0], cell.config.layer + 1, sum(names, ())] = None
    if not cuts or spec.cache == "none":
        plan = Sharable(cells=count, done=count - len(todo), slices=len(cuts), nbytes=0, place="none", together=False)
        return plan, ()
    device = environment.find_device(config.device)
    dtype = sources.find_dtype(config.dtype, source, config.revision, device)
    tokenizer = kept.once("tokenizer", (source, config.revision), lambda: load_tokenizer(source, config.revision))
    rows = configs.of_corpora(config)
    material = kept.once("material", (spec.method.reads, rows), lambda: edits.read(spec.method, config, tokenizer))
    batches = kept.once("plan", rows, lambda: edits.schedule(config, material, tokenizer))
    distinct = {id(b): b for step in range(batches.steps * config.accumulate) for b in batches.at(step)[1:]}
    tokens = sum(batch.input_ids.numel() for batch in distinct.values())
    state = tokens * decoder.d_model(part) * dtype.itemsize
    # A state at each boundary, which neighbours share, and the attention's output in each slice's first layer.
    boundaries = {place for start, stop, _ in cuts for place in (start, stop)}
    whole, single = state * (len(boundaries) + len(cuts)), 3 * state
    room = environment.free_bytes(device) // 2
    place, together = _place(spec, whole, single, room)
    plan = Sharable(
        cells=count,
        done=count - len(todo),
        slices=len(cuts),
        nbytes=whole if together else single,
        place=place,
        together=together,
    )
    return plan, tuple(cuts) if together else ()


def _place(spec: Sweep, whole: int, single: int, room: int) -> tuple[Literal["ram", "disk", "none"], bool]:
    if spec.cache == "ram" or (spec.cache == "auto" and whole <= room):
        return "ram", whole <= room
    limit = _disk_bytes(spec)
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


def _provide(spec: Sweep, plan: Sharable, cuts: tuple[Cut, ...], kept: Kept) -> None:
    """Make room for what the plan keeps."""
    device = environment.find_device(spec.config.device)
    on_disk = plan.place == "disk"
    cache = spec.out / "cache"
    if plan.place != "none":
        limit = _disk_bytes(spec) if on_disk else environment.free_bytes(device) // 2
        kept.recordings = Recordings(Store(limit, cache / "recordings" if on_disk else None), cuts)
    if spec.cache != "none" and spec.config.evaluate == "all":
        starts = {cell.config.trained_layers[0] for cell in spec.cells()}
        kept.starts = Starts(sorted(starts), Store(environment.free_bytes(device) // 4))


def _is_complete(cell: Cell) -> bool:
    folder = RunFolder(cell.config.out)
    return folder.holds(configs.plain(cell.method, cell.config)) and folder.is_complete


class _Warnings(Progress):
    """Hands on warnings alone: a bar for each phase of each cell would be too much."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def warn(self, text: str) -> None:
        self.progress.warn(text)


def _about(spec: Sweep) -> dict[str, Any]:
    """What makes a sweep this one, as YAML; how it is cached, ranked or cut down to finalists may change."""
    plain = configs.plain(spec.method, spec.config)
    del plain["run"]["out"], plain["run"]["seed"], plain["format"], plain["lethe"]
    grid = {
        name: [list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v for v in values]
        for name, values in spec.axes.items()
    }
    own = {"format": RUN_FORMAT, "lethe": __version__, "grid": grid, "seeds": list(spec.seeds), "proxy": spec.proxy}
    return own | plain


def describe(plan: Sharable) -> str:
    """The plan in a sentence."""
    size = plan.nbytes / 1e9
    shown = f"{size:.2g} GB" if size >= 0.1 or not math.isfinite(size) else f"{size * 1000:.2g} MB"
    where = {"ram": "in memory", "disk": "in mapped files", "none": ""}[plan.place]
    resumed = f", {plan.done} of them complete" if plan.done else ""
    if plan.place == "none":
        return f"{plan.cells} cells{resumed}; no recordings are shared."
    passes = "one pass for all slices" if plan.together and plan.slices > 1 else "a pass for each slice"
    return f"{plan.cells} cells{resumed}; recordings of {plan.slices} slices take about {shown} {where} ({passes})."
