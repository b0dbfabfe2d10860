"""Cells of a sweep on a Ray cluster: a group of them is a task, and what they find is in their run folders."""

import contextlib
import logging
import math
import os
import platform
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lethe.__version__ import __version__
from lethe.errors import LetheError, RunFolderError, UsageError, first_line
from lethe.runs.estimate import plan
from lethe.runs.run_folder import RunFolder
from lethe.sweeps.cells import run_group
from lethe.sweeps.grid import Cell
from lethe.sweeps.spec import Sweep
from lethe.system import machine as machine_module
from lethe.system.progress import Progress

RETRIES = 3
"""How often a group is begun again whose worker died."""


POLL = 0.5
"""Seconds between looks at the run folders."""


CONNECT = 10.0
"""Seconds that a cluster may take to answer."""


SEEN = 60.0
"""Seconds that a network file system may take to show what another machine wrote."""


PROCESS_BYTES = 6 * 10**8
"""What a worker takes beside weights: Python, torch, a batch."""


STORE = 10**8
"""Bytes for what Ray itself hands around: settings and the names of cells."""


QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


SHARED = "Give an --out, a model and corpora on a file system that all machines of the cluster share, at the same path."


@dataclass(frozen=True, kw_only=True)
class _Task:
    """All that a worker is told."""

    spec: Sweep
    todo: tuple[Cell, ...]
    command: str
    beside: int
    """Groups that run on the same machine at a time."""
    threads: int
    """CPU threads, where the run names no number."""
    folder: Path
    """What relative paths are relative to."""
    version: str


@dataclass(frozen=True, kw_only=True)
class _Needs:
    """What a group takes of a machine; Ray's names."""

    num_cpus: int
    num_gpus: int
    memory: int
    """Bytes, estimated."""

    def fits(self, machine: dict[str, float]) -> int:
        """How many groups a machine of such resources has room for."""
        return min(int(machine.get(name, 0) // amount) for name, amount in self.resources.items() if amount)

    @property
    def resources(self) -> dict[str, float]:
        """By the names that Ray gives a machine's."""
        return {"CPU": float(self.num_cpus), "GPU": float(self.num_gpus), "memory": float(self.memory)}


def run_cells(
    groups: Sequence[Sequence[Cell]], spec: Sweep, command: str, progress: Progress, workers: int | None
) -> dict[str, str]:
    """Run groups of incomplete cells on the cluster of RAY_ADDRESS, or on one that is started for this call here.

    A Ray that the caller has initialized is used as it is. A group whose worker dies is begun again, and its complete
    cells are kept. At most `workers` groups run beside each other. Returns what went wrong with diverged cells, by
    name.

    Raises: what a worker raised, if it is of types.py; UsageError if Ray is not installed, its cluster cannot be
    reached, or no machine of it has room for a group; RunFolderError if machines do not share the sweep's folder;
    LetheError for a group whose workers died again and again.
    """
    ray = _import_ray()
    if spec.config.base.device.startswith("cuda:"):
        raise UsageError(
            f"Ray gives each worker a GPU of its own, and {spec.config.base.device} names one.\nPass --device cuda."
        )
    beside = min(len(groups), workers or len(groups))
    with _connected(ray):
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = _needs(spec, groups, machines, beside)
        room = max((needs.fits(machine) for machine in machines), default=0)
        if not room:
            raise UsageError(_no_room(needs, machines))
        tasks = [
            _Task(
                spec=spec,
                todo=tuple(group),
                command=command,
                beside=min(beside, room),
                threads=needs.num_cpus,
                folder=Path.cwd(),
                version=__version__,
            )
            for group in groups
        ]
        # SPREAD: a machine's memory and disk hold more of a group's recordings, the fewer groups it has.
        options = {**vars(needs), "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        return _run(ray, ray.remote(_work).options(**options), tasks, beside, progress)


def _work(task: _Task) -> tuple[dict[str, str], list[str]]:
    """What a worker does: the cells' errors by name, and what the user should be warned of."""
    here = f"the worker on {platform.node()}"
    if task.version != __version__:
        raise UsageError(
            f"{here} has Lethe {__version__}, and this process {task.version}.\n"
            "Install the same version on all machines."
        )
    try:
        os.chdir(task.folder)
    except OSError as error:
        raise RunFolderError(f"{here} cannot see {task.folder}.\n{SHARED}") from error
    # The sweep has written it, so a worker without it looks at another disk.
    if not (task.spec.out / "sweep.yaml").exists():
        raise RunFolderError(f"{here} cannot see the sweep {task.spec.out}.\n{SHARED}")
    heard = _Heard()
    with machine_module.threads(task.threads):
        failed = run_group(task.spec, task.todo, command=task.command, progress=heard, workers=task.beside)
    return failed, heard.warnings


class _Heard(Progress):
    """Keeps warnings until the group ends."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def _run(ray: ModuleType, work: Any, tasks: Sequence[_Task], beside: int, progress: Progress) -> dict[str, str]:
    waiting, running = list(reversed(tasks)), {}
    shown: set[str] = set()
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < beside:
                task = waiting.pop()
                running[work.remote(task)] = task
            done, _ = ray.wait(list(running), timeout=POLL)
            for cell in (cell for task in running.values() for cell in task.todo):
                if cell.name not in shown and RunFolder(cell.config.out).is_complete:
                    shown.add(cell.name)
                    progress.advance(cell.name)
            for ref in done:
                task = running.pop(ref)
                diverged, warnings = _result(ray, ref, task)
                failed |= diverged
                for text in warnings:
                    progress.warn(text)
                _await_folders([cell for cell in task.todo if cell.name not in diverged])
                for cell in task.todo:
                    if cell.name not in shown:
                        progress.advance(cell.name)
    finally:
        if running:
            _cancel(ray, list(running))
    return failed


def _cancel(ray: ModuleType, refs: Sequence[Any]) -> None:
    """End what still runs after an error or Ctrl-C, and wait until it has given its cells' locks up."""
    # Ray 2.60 aborts the process that cancels a task whose result is there.
    _, unfinished = ray.wait(refs, num_returns=len(refs), timeout=0)
    for ref in unfinished:
        ray.cancel(ref, force=True)
    if unfinished:
        ray.wait(unfinished, num_returns=len(unfinished), timeout=CONNECT)


def _result(ray: ModuleType, ref: Any, task: _Task) -> tuple[dict[str, str], list[str]]:
    about = f"the {len(task.todo)} cells from {task.todo[0].name} on"
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LetheError):
            raise error.cause from None
        if "No module named 'lethe" in str(error):
            raise UsageError(
                "a worker of the Ray cluster has no Lethe.\n"
                f'Install it on all machines: pip install "lethe-unlearn[ray]=={__version__}"'
            ) from None
        raise
    except ray.exceptions.RayError as error:
        raise LetheError(
            f"{about} could not be finished: their workers died {RETRIES + 1} times, or Ray failed. It says: "
            f"{first_line(error).rstrip('.')}.\nThe same command goes on. If memory ran out, pass fewer --workers, "
            "--cache disk or a smaller --batch-size."
        ) from error


def _await_folders(finished: Sequence[Cell]) -> None:
    deadline = time.monotonic() + SEEN
    while unseen := [cell.config.out for cell in finished if not RunFolder(cell.config.out).is_complete]:
        if time.monotonic() > deadline:
            raise RunFolderError(f"a worker finished {unseen[0]}, and this machine cannot see it.\n{SHARED}")
        time.sleep(POLL)


def _needs(spec: Sweep, groups: Sequence[Sequence[Cell]], machines: Sequence[dict[str, float]], beside: int) -> _Needs:
    deepest = max((cell for group in groups for cell in group), key=lambda cell: cell.config.layer)
    cost = plan(deepest.config, reads=deepest.method.reads)
    gpus = 1 if machine_module.find_device(spec.config.base.device).type == "cuda" else 0
    able = [int(m["CPU"]) for m in machines if m.get("CPU", 0) >= 1 and m.get("GPU", 0) >= gpus]
    # All groups at once, if each machine takes its part of them.
    share = min(able, default=1) // math.ceil(beside / max(1, len(able)))
    return _Needs(
        num_cpus=spec.config.base.threads or max(1, share),
        num_gpus=gpus,
        memory=int(1e9 * (max(cost.weights_gb, cost.evaluation_gb) + cost.training_gb)) + PROCESS_BYTES,
    )


def _no_room(needs: _Needs, machines: Sequence[dict[str, float]]) -> str:
    def spoken(found: dict[str, float]) -> str:
        cpus, gpus, memory = (found.get(name, 0.0) for name in needs.resources)
        return f"{cpus:g} CPU, {gpus:g} GPU and {memory / 1e9:.3g} GB"

    has = "; ".join(map(spoken, machines)) or "there is none"
    return (
        f"a group of cells needs {spoken(needs.resources)}, and no machine of the Ray "
        f"cluster has that: {has}.\nLower --threads, choose another --device, or add machines."
    )


@contextlib.contextmanager
def _connected(ray: ModuleType) -> Iterator[None]:
    """With a Ray cluster: the caller's, that of RAY_ADDRESS, or one of this machine that ends with the context."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        try:
            _connect(ray, address)
        # Ray leaves the process if what answers is no Ray.
        except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError, SystemExit) as error:
            if address == "local":
                raise LetheError(
                    f"no Ray cluster could be started here: {first_line(error).rstrip('.')}.\n"
                    "Leave --engine ray out to run the cells in this process."
                ) from error
            raise UsageError(
                f"the Ray cluster at RAY_ADDRESS={address} cannot be reached: {first_line(error).rstrip('.')}.\n"
                "Start one there (ray start --head), correct RAY_ADDRESS, or unset it to use this machine alone.\n"
                "If the cluster asks for a token, set RAY_AUTH_MODE=token."
            ) from error
        yield
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    if address == "local":
        with _no_statistics():
            ray.init(address, include_dashboard=False, object_store_memory=STORE, **QUIET)
        return
    # Ray itself waits for minutes, and then ends the process.
    if found := re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT).close()
    ray.init(address, **QUIET)


@contextlib.contextmanager
def _no_statistics() -> Iterator[None]:
    """A cluster that is started here reports nothing to Ray's makers, unless the user has said that it may."""
    name = "RAY_USAGE_STATS_ENABLED"
    was_set = name in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if not was_set:
            del os.environ[name]


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError(
            'Ray is not installed.\nInstall it: pip install "lethe-unlearn[ray]", or leave --engine ray out.'
        ) from error
    return ray
