"""The run folder: one writer, one run, files whole or not at all, nothing left behind."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lethe.errors import RunFolderError, SaveError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.rmu import RMU
from lethe.runs.config import RunConfig
from lethe.runs.config_file import plain
from lethe.runs.run_folder import RunFolder
from lethe.solvers.training_state import Checkpoint
from lethe.system.atomic_files import write_text
from lethe.types import HistoryRow

CONFIG = plain(RMU(), RunConfig.of(model="builtin", steps=5))

NORMS = {"mean": 1.0, "median": 0.5, "max": 2.25}
OTHER_MEASURES = {"target_norm": 3.0, "forget_cos_frozen": 1.0, "retain_cos_frozen": 0.5, "retain_error": 0.0}
MEASURES = {f"{side}_norm_{name}": value for side in ("forget", "retain") for name, value in NORMS.items()}
MEASURES |= OTHER_MEASURES

HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "a")


def row(step: int, topic: str = "one") -> HistoryRow:
    return HistoryRow(
        step=step,
        topic=topic,
        forget_loss=0.1 + step,
        retain_loss=1e-9,
        seconds=0.01,
        peak_mb=12.5,
        measures=MEASURES | ({} if step % 2 else {"cos_direction": -0.25}),
    )


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        tensors={"w/master": torch.full((2, 3), float(step))},
        states={"a/b c": {"direction": torch.arange(3.0)}},
        rng=torch.Generator().manual_seed(step),
    )


def names(folder: RunFolder) -> set[str]:
    return {file.name for file in folder.path.iterdir()}


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(RunFolderError) as caught:
        call()
    return str(caught.value)


def start(folder: RunFolder, config: dict[str, Any] = CONFIG) -> None:
    with folder.open(config):
        pass


def kept(folder: RunFolder) -> None:
    """A run that has reached a checkpoint."""
    with folder.open(CONFIG):
        folder.save_checkpoint(checkpoint(3))


# One run


def test_a_new_folder_is_made_with_its_parents_and_holds_the_config(folder: RunFolder) -> None:
    assert not folder.holds(CONFIG)
    with folder.open(CONFIG):
        assert yaml.safe_load(folder.config.read_text()) == CONFIG
        assert folder.holds(CONFIG)
        folder.save_checkpoint(checkpoint(1))
    assert names(folder) == {"config.yaml", "checkpoint.safetensors"}


def test_an_empty_folder_will_do(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    assert not folder.holds(CONFIG)
    kept(folder)
    assert folder.holds(CONFIG)


def test_a_folder_of_something_else_is_refused_and_left_alone(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("x")
    assert refusal(lambda: start(folder)) == f"{folder.path} exists and is no run folder.\nChoose another --out."
    assert names(folder) == {"thesis.tex"}


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    folder = RunFolder(tmp_path / "a")
    assert refusal(lambda: start(folder)) == f"{folder.path} exists and is no run folder.\nChoose another --out."


def test_a_run_that_was_killed_as_it_began_is_no_hindrance(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "lock").touch()
    (folder.path / "config.yaml.partial").write_text("form")
    assert not folder.holds(CONFIG)
    kept(folder)
    assert names(folder) == {"config.yaml", "checkpoint.safetensors"}


OTHERS = {
    "one setting": (plain(RMU(), RunConfig.of(model="builtin", steps=6)), "steps is 5 there and 6 here"),
    "two settings": (
        plain(RMU(alpha=3.0), RunConfig.of(model="builtin", steps=5, forget=("a.txt", "b.txt"))),
        "forget is ['builtin'] there and ['a.txt', 'b.txt'] here; alpha is 1200.0 there and 3.0 here",
    ),
    "a method": (
        plain(AdaptiveRMU(), RunConfig.of(model="builtin", steps=5)),
        "beta is not set there and 5.0 here; name is rmu there and adaptive-rmu here; "
        "norm is not set there and first-batch here; steering_coeff is 6.5 there and not set here",
    ),
    "a version": (CONFIG | {"format": 3}, "format is 2 there and 3 here"),
}


@pytest.mark.parametrize(("config", "difference"), OTHERS.values(), ids=OTHERS)
def test_another_run_is_refused_by_what_differs(folder: RunFolder, config: dict[str, Any], difference: str) -> None:
    kept(folder)
    before = names(folder)
    assert refusal(lambda: start(folder, config)) == (
        f"{folder.path} holds another run: {difference}.\nChoose another --out, or delete the folder."
    )
    assert names(folder) == before


def test_place_and_version_of_lethe_do_not_make_another_run(folder: RunFolder) -> None:
    kept(folder)
    moved = plain(RMU(), RunConfig.of(model="builtin", steps=5, out=Path("elsewhere")))
    assert folder.holds(moved | {"lethe": "0.0.9"})


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"- 1"])
def test_a_config_that_cannot_be_read_is_refused(folder: RunFolder, content: bytes) -> None:
    folder.path.mkdir(parents=True)
    folder.config.write_bytes(content)
    assert refusal(lambda: folder.holds(CONFIG)) == (
        f"{folder.config} cannot be read.\nChoose another --out, or delete the folder."
    )


def test_complete_means_that_the_report_is_there(folder: RunFolder) -> None:
    with folder.open(CONFIG):
        assert not folder.is_complete
        folder.write_json("report.json", {})
        assert folder.is_complete
    assert names(folder) == {"config.yaml", "report.json"}


# One writer


@pytest.fixture
def other_process(folder: RunFolder) -> Iterator[None]:
    """Another process that holds the lock of a run in progress."""
    kept(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield
    process.stdin.close()
    process.wait()
    process.stdout.close()


def test_a_folder_that_another_process_writes_to_is_refused(folder: RunFolder, other_process: None) -> None:
    before = names(folder)
    assert refusal(lambda: start(folder)) == (
        f"another process is writing to {folder.path}.\nWait for it, or choose another --out."
    )
    assert names(folder) == before == {"config.yaml", "checkpoint.safetensors", "lock"}


def test_the_lock_is_free_once_the_run_ends(folder: RunFolder) -> None:
    kept(folder)
    with pytest.raises(ZeroDivisionError), folder.open(CONFIG):
        raise ZeroDivisionError
    kept(folder)
    assert "lock" not in names(folder)


# Nothing left behind


def test_what_a_killed_run_was_writing_is_removed(folder: RunFolder) -> None:
    kept(folder)
    for name in ("checkpoint.safetensors.partial", "report.json.partial", "patch.safetensors.partial"):
        (folder.path / name).write_bytes(b"half")
    kept(folder)
    assert names(folder) == {"config.yaml", "checkpoint.safetensors"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    folder: RunFolder, failure: type[BaseException]
) -> None:
    def run() -> None:
        with folder.open(CONFIG):
            folder.append_history(row(0))
            folder.patch.write_bytes(b"half")
            raise failure

    with pytest.raises(failure):
        run()
    assert not folder.path.exists()


def test_a_run_that_fails_later_keeps_what_it_can_go_on_from(folder: RunFolder) -> None:
    def run() -> None:
        with folder.open(CONFIG):
            folder.append_history(row(0))
            folder.save_checkpoint(checkpoint(1))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run()
    assert names(folder) == {"config.yaml", "history.jsonl", "checkpoint.safetensors"}
    found = folder.checkpoint()
    assert found is not None
    assert (found.step, found.states.keys()) == (1, {"a/b c"})
    folder.drop_checkpoint()
    assert folder.checkpoint() is None


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new(
    folder: RunFolder, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(folder)
    folder.write_json("report.json", {"old": 1})
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    monkeypatch.setattr(moment, full)
    with pytest.raises(SaveError) as caught:
        folder.write_json("report.json", {"new": 2})
    assert str(caught.value) == (
        f"{folder.report} could not be written: No space left on device.\nFree some space, or name another disk."
    )
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before


@pytest.mark.parametrize("moment", ["os.replace", "lethe.system.tensor_file.save_file"])
def test_a_full_disk_leaves_the_old_checkpoint(folder: RunFolder, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(folder)
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}

    def half(_: Any, path: Path, **__: Any) -> None:
        Path(path).write_bytes(b"half")
        full()

    monkeypatch.setattr(moment, half if moment.endswith("save_file") else full)
    with pytest.raises(SaveError) as caught:
        folder.save_checkpoint(checkpoint(4))
    assert str(caught.value) == (
        f"{folder.path}/checkpoint.safetensors could not be written: No space left on device.\n"
        "Free some space, or name another disk."
    )
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(SaveError) as caught:
        start(folder)
    assert str(caught.value) == (
        f"{folder.path} could not be written: Not a directory.\nName a path that you may write to."
    )


def test_a_history_that_cannot_be_written(folder: RunFolder) -> None:
    (folder.path / "history.jsonl").mkdir(parents=True)
    with pytest.raises(SaveError, match=r"history\.jsonl could not be written: Is a directory\.\nName a path"):
        folder.append_history(row(0))


def test_a_damaged_checkpoint_says_how_to_go_on(folder: RunFolder) -> None:
    kept(folder)
    path = folder.path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    said = refusal(folder.checkpoint)
    assert said.startswith(f"the checkpoint {path} is damaged: ")
    assert said.endswith("\nDelete it to start the run from its first step.")


# History


def test_rows_come_back_as_they_were(folder: RunFolder) -> None:
    kept(folder)
    rows = [row(step) for step in range(4)]
    for each in rows:
        folder.append_history(each)
    assert folder.history(until=4) == rows


def test_rows_of_lethe_0_1_are_read(folder: RunFolder) -> None:
    kept(folder)
    for step in range(2):
        line = {
            "step": step, "topic": "one", "forget_loss": 0.1 + step, "retain_loss": 1e-9,
            "forget_norm": NORMS, "retain_norm": NORMS, **OTHER_MEASURES,
            "cos_direction": None if step % 2 else -0.25, "retain_floor": 0.5, "seconds": 0.01, "peak_mb": 12.5,
        }  # fmt: skip
        with (folder.path / "history.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    wanted = [replace(row(step), measures={**row(step).measures, "retain_floor": 0.5}) for step in range(2)]
    assert folder.history(until=2) == wanted
    # They were written anew, as this version has them.
    assert folder.history(until=2) == wanted


def test_rows_of_steps_that_will_be_repeated_are_removed(folder: RunFolder) -> None:
    kept(folder)
    for step in range(4):
        folder.append_history(row(step))
    assert folder.history(until=2) == [row(0), row(1)]
    assert [json.loads(line)["step"] for line in (folder.path / "history.jsonl").read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("ending", ['{"step": 2, "top', '{"step": 2}\n', "\0\0\0", "[1]\n"])
def test_a_line_that_was_being_written_is_dropped(folder: RunFolder, ending: str) -> None:
    kept(folder)
    for step in range(2):
        folder.append_history(row(step))
    with (folder.path / "history.jsonl").open("a") as file:
        file.write(ending)
    assert folder.history(until=9) == [row(0), row(1)]
    folder.append_history(row(2))
    assert folder.history(until=9) == [row(0), row(1), row(2)]


def test_no_history_is_an_empty_one(folder: RunFolder) -> None:
    assert folder.history(until=9) == []


def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(SaveError, match="is no file"):
        write_text(pipe, "x")
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "file").read_text() == "new"
