"""Whole runs of methods that see tokens, for each kind of what moves; and of optimizers that keep other states."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from lethe import GradDiff, Patch, RunConfig, unlearn
from lethe.errors import UsageError
from lethe.methods.finetune import Finetune
from lethe.methods.protocol import Method
from lethe.methods.rmu import RMU
from lethe.model.loading import load_model
from lethe.runs import solve
from lethe.runs.run_folder import RunFolder
from lethe.runs.unlearn import Result
from lethe.runs.workspace import Workspace
from lethe.solvers.protocol import Log
from lethe.solvers.training_state import Checkpoint
from lethe.suites import world
from lethe.system.progress import Progress

STEPS = 4
KINDS = ("matrices", "lora", "everything")
METHOD = GradDiff(retain_with="kl", alpha=2.0)
MOVED = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)}


def settings(out: Path, **changes: Any) -> RunConfig:
    small: dict[str, Any] = {
        "model": "builtin",
        "layer": 3,
        "steps": STEPS,
        "batch_size": 2,
        "max_length": (24,),
        "epochs": 2,
        "lr": 1e-3,
        "evaluate": "none",
        "lora_rank": 4,
    }
    return RunConfig.of(**{**small, "out": out, **changes})


class Stopping(Progress):
    """Interrupts the run once so many batches are done."""

    def __init__(self, after: int):
        self.left = after

    def advance(self, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def resumed(method: Method, config: RunConfig, batches: int, step: int, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The run, interrupted in the batch that ends a step, before the step's checkpoint, and called again."""
    saved: list[int] = []
    save = RunFolder.save_checkpoint

    def note(folder: RunFolder, checkpoint: Checkpoint) -> None:
        saved.append(checkpoint.step)
        save(folder, checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "every", 1)
        patched.setattr(RunFolder, "save_checkpoint", note)
        # Time stands still, so that no checkpoint is left out because the last one took long.
        patched.setattr(solve, "time", Mock(monotonic=lambda: 0.0))
        with pytest.raises(KeyboardInterrupt):
            unlearn(method, config, progress=Stopping(batches))
        assert saved == list(range(1, step))
        assert not (config.out / "report.json").exists()
        found = unlearn(method, config)
    assert saved == list(range(1, step)) + list(range(step, STEPS + 1))
    return found


def same_run(found: Result, whole: Result) -> None:
    assert (found.folder / "patch.safetensors").read_bytes() == (whole.folder / "patch.safetensors").read_bytes()
    assert [(row.step, row.topic, row.forget_loss, row.retain_loss, row.measures) for row in found.history] == [
        (row.step, row.topic, row.forget_loss, row.retain_loss, row.measures) for row in whole.history
    ]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("train", KINDS)
def test_a_run_gives_a_patch_that_applies_and_leaves_the_model_alone(train: Any, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", train=train)
    workspace = Workspace(config.base, share=True)
    modules = [(name, type(module)) for name, module in workspace.model().named_modules()]
    before = weights(workspace.model())

    result = unlearn(METHOD, config, workspace=workspace)

    after = workspace.model().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [(name, type(module)) for name, module in workspace.model().named_modules()] == modules
    model = load_model(world.MODEL_FOLDER, dtype=workspace.dtype)
    everything = {name for name, _ in model.named_parameters()}
    assert result.patch.tensors.keys() == (everything if train == "everything" else MOVED)
    patch = Patch.load(result.folder / "patch.safetensors")
    patch.apply_in_memory(model)
    applied = model.state_dict()
    for name in everything:  # a head that is tied to the embeddings once
        value = before[name]
        assert torch.equal(applied[name], patch.tensors.get(name, value)), name
        assert torch.equal(applied[name], value) is (name not in patch.tensors), name
    exported = load_model(patch.export(world.MODEL_FOLDER, tmp_path / "edited"), dtype=workspace.dtype)
    assert all(torch.equal(value, applied[name]) for name, value in exported.state_dict().items())
    assert len(result.history) == STEPS
    assert all(row.measures.keys() >= {"forget_nll", "retain_nll", "retain_nll_frozen"} for row in result.history)


@pytest.mark.parametrize("train", KINDS)
def test_a_shared_model_gives_the_bytes_of_one_alone(train: Any, tmp_path: Path) -> None:
    config = settings(tmp_path / "alone", train=train)
    unlearn(METHOD, config)
    workspace = Workspace(config.base, share=True)
    for name in ("first", "second"):
        unlearn(METHOD, config.changed(out=tmp_path / name), workspace=workspace)
    alone, *shared = ((tmp_path / name / "patch.safetensors").read_bytes() for name in ("alone", "first", "second"))
    assert shared == [alone, alone]


@pytest.mark.parametrize("train", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unlearn(METHOD, settings(tmp_path / "whole", train=train))

    found = resumed(METHOD, settings(tmp_path / "cut", train=train), 3, 3, monkeypatch)

    same_run(found, whole)


RATES: dict[str, tuple[Method, dict[str, Any]]] = {
    "muon on matrices": (METHOD, {"optimizer": "muon", "lr": 0.02}),
    "muon on everything": (Finetune(), {"optimizer": "muon", "lr": 0.02, "train": "everything"}),
    "muon on factors": (METHOD, {"optimizer": "muon", "lr": 0.02, "train": "lora"}),
    "muon of a steering method": (RMU(alpha=10.0), {"optimizer": "muon", "lr": 0.02}),
    "warm-up and decay": (METHOD, {"warm_up": 2, "decay": 0.5}),
    "muon with warm-up and decay": (Finetune(), {"optimizer": "muon", "lr": 0.02, "warm_up": 2, "decay": 0.5}),
    "sgd": (METHOD, {"optimizer": "sgd", "lr": 0.1}),
    "accumulated": (METHOD, {"accumulate": 2, "warm_up": 1}),
}


@pytest.mark.parametrize(("method", "how"), RATES.values(), ids=RATES)
@pytest.mark.parametrize("after", [2, 4])
def test_each_optimizer_goes_on_to_the_same_bytes(
    method: Method, how: dict[str, Any], after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = unlearn(method, settings(tmp_path / "whole", **how))
    batches = how.get("accumulate", 1)

    found = resumed(method, settings(tmp_path / "cut", **how), after * batches, after, monkeypatch)

    same_run(found, whole)


def test_the_rate_of_a_run_is_part_of_its_bytes(tmp_path: Path) -> None:
    runs = [
        unlearn(METHOD, settings(tmp_path / str(number), **how)).patch.tensors
        for number, how in enumerate(({}, {"warm_up": 2}, {"decay": 0.5}, {"optimizer": "sgd"}, {"optimizer": "muon"}))
    ]
    for number, first in enumerate(runs):
        assert first.keys() == MOVED
        for second in runs[:number]:
            assert all(not torch.equal(first[name], second[name]) for name in MOVED)


def test_a_steering_method_cannot_train_everything(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a steering method replays the layers up to --layer alone"):
        unlearn(RMU(), settings(tmp_path / "run", train="everything"))
    assert not list(tmp_path.iterdir())
