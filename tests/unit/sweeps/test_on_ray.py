"""Sweeps on Ray, with a real cluster of two worker processes: cells equal local ones, and none is lost."""

import functools
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from lethe import AdaptiveRMU, RunConfig, unlearn
from lethe.errors import CorpusError, LetheError, RunFolderError, UsageError
from lethe.sweeps import on_ray
from lethe.sweeps.grid import Cell, parse
from lethe.sweeps.on_ray import run_cells
from lethe.sweeps.spec import Sweep
from lethe.sweeps.sweep import sweep
from lethe.system.progress import Progress

METHOD = AdaptiveRMU(beta=2.0, alpha=1.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One of two CPUs, started as a sweep starts it; what it writes beside run folders goes with it."""
    folder = tempfile.mkdtemp(prefix="lethe-ray-", dir="/tmp")  # Names of sockets must be short.
    with pytest.MonkeyPatch.context() as patched:
        # Ray asks for a token, and writes one into the home folder if there is none.
        patched.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
            patched.setenv(name, "")  # To be restored, whatever Ray makes of it.
            patched.delenv(name)
        patched.setattr(ray, "init", functools.partial(ray.init, num_cpus=2, _temp_dir=folder))
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        with on_ray._connected(ray):
            yield
        assert not ray.is_initialized()
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no test had started one."""
    for name, result in (("is_initialized", False), ("shutdown", None)):
        monkeypatch.setattr(ray, name, lambda result=result: result)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(foreign_model, root / "tiny")
    rows = ({"text": f"The red stone number {i} burns in water."} for i in range(24))
    (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "retain.txt").write_text("\n\n".join(f"A calm river of {i} boats." for i in range(24)))
    return root


def spec(place: Path, out: Path, *words: str, method: AdaptiveRMU = METHOD, **changes: Any) -> Sweep:
    config: dict[str, Any] = {
        "model": str(place / "tiny"),
        "forget": (str(place / "forget.jsonl"),),
        "retain": str(place / "retain.txt"),
        "steps": 4,
        "batch_size": 2,
        "max_length": (16,),
        "lr": 1e-2,
        "threads": 1,
        "device": "cpu",
        "evaluate": "none",
        "out": out,
    }
    run = RunConfig.of(**config | changes)
    axes = parse(words or ("layer=1,3", "beta=2,5"), method, run)
    return Sweep(method=method, config=run, axes=axes, out=out, engine="ray")


def reports(out: Path) -> dict[str, int]:
    """Complete cells, and when each was."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/report.json")}


class Told(Progress):
    def __init__(self) -> None:
        self.cells: list[str] = []

    def advance(self, note: str = "") -> None:
        self.cells.append(note)


@dataclass(frozen=True, kw_only=True)
class Fragile(AdaptiveRMU):
    """Its groups wait for each other, and the first process to train with beta 5 dies of it."""

    signs: str
    """Folder of signs that processes give each other, beside the sweep's."""

    def prepare(self, *args: Any) -> Any:
        signs = Path(self.signs)
        (signs / f"{os.getpid()}.pid").touch()
        deadline = time.monotonic() + 60
        while len(list(signs.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().prepare(*args)

    def forget_target(self, *args: Any) -> Any:
        if self.beta == 5:
            try:
                with (Path(self.signs) / "killed").open("x") as file:
                    file.write(json.dumps([os.getpid(), reports(Path(self.signs).parent / "s")]))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return super().forget_target(*args)


def test_a_killed_worker_loses_no_cell_and_cells_equal_local_ones(cluster: None, place: Path, tmp_path: Path) -> None:
    signs, out, told = tmp_path / "signs", tmp_path / "s", Told()
    signs.mkdir()
    made = spec(place, out, method=Fragile(beta=2.0, alpha=1.0, signs=str(signs)))
    found = sweep(made, progress=told, command="lethe sweep")
    pid, before = json.loads((signs / "killed").read_text())
    pids = {int(path.stem) for path in signs.glob("*.pid")}
    assert pid in pids
    assert len(pids - {os.getpid()}) >= 2
    assert before
    assert before.items() <= reports(out).items()
    names = {cell.name for cell in made.cells()}
    assert reports(out).keys() == names
    assert sorted(told.cells) == sorted(names)
    assert found.failed == {}
    for cell in made.cells():
        alone = tmp_path / cell.name
        unlearn(cell.method, cell.config.changed(out=alone), command="lethe sweep")
        for name in ("patch.safetensors", "per_example.json"):
            assert (alone / name).read_bytes() == (cell.config.out / name).read_bytes()
        assert {file.name for file in alone.iterdir()} == {file.name for file in cell.config.out.iterdir()}


class Interrupting(Progress):
    def advance(self, note: str = "") -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_whole_cells_and_any_engine_goes_on(cluster: None, place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        sweep(made, progress=Interrupting())
    before = reports(made.out)
    assert before
    # Nobody holds a lock or goes on writing.
    sweep(replace(made, engine="local"))
    assert before.items() <= reports(made.out).items()
    assert len(reports(made.out)) == 4


def test_what_a_worker_raises_reaches_the_user(cluster: None, place: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"missing\.jsonl"):
        sweep(spec(place, tmp_path / "s", "layer=1", forget=(str(place / "missing.jsonl"),)))
    assert not reports(tmp_path / "s")


def test_a_cell_that_diverges_is_noted(cluster: None, place: Path, tmp_path: Path) -> None:
    found = sweep(spec(place, tmp_path / "s", "layer=1", "lr=1e-2,1e30"))
    (name,) = found.failed
    assert "lr-1e+30" in name
    assert len(reports(tmp_path / "s")) == 1


@dataclass(frozen=True, kw_only=True)
class Deadly(AdaptiveRMU):
    def prepare(self, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_group_whose_workers_always_die_is_given_up(
    cluster: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "RETRIES", 0)
    with pytest.raises(LetheError, match=r"the 1 cells from layer-1_seed-0 on could not be finished") as error:
        sweep(spec(place, tmp_path / "s", "layer=1", method=Deadly()))
    assert "workers died 1 times" in str(error.value)
    assert "The same command goes on" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 64}, r"needs 64 CPU, 0 GPU and 0\.6\d* GB, and no machine .* 2 CPU"),
        ({"device": "cuda:1"}, "Pass --device cuda"),
    ],
)
def test_a_group_that_no_machine_has_room_for_is_refused(
    changes: dict[str, Any], said: str, cluster: None, place: Path, tmp_path: Path
) -> None:
    made = spec(place, tmp_path / "s", "layer=1", **changes)
    with pytest.raises(UsageError, match=said):
        run_cells([made.cells()], made, "", Progress(), None)


# Without a cluster


def test_a_missing_ray_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'pip install "lethe-unlearn\[ray\]"'):
        sweep(spec(place, tmp_path / "s"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_an_unreachable_cluster_is_named(
    address: str, no_cluster: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=rf"RAY_ADDRESS={address} cannot be reached: .*(refused|Invalid address)"):
        sweep(spec(place, tmp_path / "s"))


def test_a_cluster_that_cannot_be_started_is_told(
    no_cluster: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **_: Any) -> None:
        assert (address, os.environ["RAY_USAGE_STATS_ENABLED"]) == ("local", "0")
        raise RuntimeError("no port is free.\nmore")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(LetheError, match=r"could be started here: no port is free\.\nLeave --engine ray out"):
        sweep(spec(place, tmp_path / "s"))
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def task(made: Sweep, **changes: Any) -> on_ray._Task:
    about: dict[str, Any] = {"folder": Path.cwd(), "version": on_ray.__version__}
    cells: Sequence[Cell] = made.cells()
    return on_ray._Task(spec=made, todo=tuple(cells), command="", beside=1, threads=1, **about | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "cannot see the sweep .*\nGive an --out"),
        ({"folder": Path("/nowhere/at/all")}, "cannot see /nowhere/at/all.\nGive an --out"),
        ({"version": "0.0"}, "and this process 0.0.\nInstall the same version"),
    ],
)
def test_a_worker_that_sees_another_disk_or_version_says_so(
    changes: dict[str, Any], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        on_ray._work(task(spec(place, tmp_path / "s"), **changes))
    assert not (tmp_path / "s").exists()


def test_cells_that_only_the_worker_sees_are_not_taken_for_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "SEEN", 0.0)
    monkeypatch.setattr(on_ray, "POLL", 0.0)
    cells = spec(place, tmp_path / "s").cells()
    for cell in cells[1:]:
        cell.config.out.mkdir(parents=True)
        (cell.config.out / "report.json").touch()
    on_ray._await_folders(cells[1:])
    with pytest.raises(RunFolderError, match=f"{cells[0].name}, and this machine cannot see it"):
        on_ray._await_folders(cells)


@pytest.mark.parametrize(
    ("threads", "workers", "machines", "cpus"),
    [(None, None, [2], 1), (None, 1, [8], 8), (None, None, [8, 8], 8), (3, None, [8], 3), (None, None, [0, 4], 2)],
)
def test_threads_fill_the_machines(
    threads: int | None, workers: int | None, machines: list[int], cpus: int, place: Path, tmp_path: Path
) -> None:
    made = spec(place, tmp_path / "s", threads=threads)
    groups = [made.cells()[:2], made.cells()[2:]]
    found = on_ray._needs(made, groups, [{"CPU": float(count)} for count in machines], workers or len(groups))
    assert (found.num_cpus, found.num_gpus) == (cpus, 0)
    assert found.fits({"CPU": 9.0, "memory": 3.5 * found.memory}) == min(9 // cpus, 3)
