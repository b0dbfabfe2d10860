"""Killed at any moment, the same call goes on and ends with the same bytes."""

import json
import multiprocessing
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethe import Activation, AdaptiveRMU, RunConfig, unlearn
from lethe.solvers.training_state import Checkpoint
from lethe.system.progress import Progress

STEPS = 24
# Each process is a fork of one that has done the slow imports.
CONTEXT = multiprocessing.get_context("forkserver")


class Halting(Progress):
    """Stands still once so many rows of the history are written, and waits to be killed."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class Noisy(AdaptiveRMU):
    """Draws from the generator at every step, besides a norm that runs on."""

    norm: Literal["running"] = "running"

    def retain_target(self, frozen: Activation, rng: torch.Generator) -> Float[Tensor, "#batch #pos d_model"]:
        return frozen.h + 0.01 * torch.randn(frozen.h.shape, generator=rng)


def run(out: Path, rows: int) -> None:
    torch.set_num_threads(1)
    config = RunConfig.of(
        model="builtin",
        layer=2,
        steps=STEPS,
        batch_size=2,
        max_length=(24,),
        epochs=2,
        lr=1e-2,
        evaluate="none",
        out=out,
    )
    unlearn(Noisy(beta=2.0, alpha=10.0), config, progress=Halting(rows))


def start(out: Path, *, rows: int) -> ForkServerProcess:
    CONTEXT.set_forkserver_preload(["lethe"])
    process = CONTEXT.Process(target=run, args=(out, rows))
    process.start()
    return process


def finish(out: Path) -> None:
    process = start(out, rows=-1)
    process.join()
    assert process.exitcode == 0


def kill_after(out: Path, rows: int) -> None:
    """Start the run and kill it once its history has so many rows."""
    process = start(out, rows=rows)
    written = out / "history.jsonl"
    deadline = time.monotonic() + 60
    try:
        while not (written.exists() and written.read_text().count("\n") == rows):
            assert process.is_alive(), f"the run ended before it had {rows} rows"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


def history(out: Path) -> list[dict[str, Any]]:
    """The history without what no two runs share."""
    parsed = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("seconds", "peak_mb")} for row in parsed]


def test_a_run_that_is_killed_four_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    saved = killed / "checkpoint.safetensors"
    # Before the first checkpoint, between two, and with the step done but its checkpoint not yet written.
    for rows, last_checkpoint in ((3, None), (13, 10), (20, 10), (21, 20)):
        kill_after(killed, rows)
        assert (Checkpoint.load(saved).step if saved.exists() else None) == last_checkpoint
        assert not (killed / "report.json").exists()
    finish(killed)

    assert (killed / "patch.safetensors").read_bytes() == (whole / "patch.safetensors").read_bytes()
    assert history(killed) == history(whole)
    assert [row["step"] for row in history(killed)] == list(range(STEPS))
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()}
    reports = [json.loads((out / "report.json").read_text()) for out in (killed, whole)]
    assert reports[0]["patch"] == reports[1]["patch"]
    assert reports[0]["warnings"] == reports[1]["warnings"]
