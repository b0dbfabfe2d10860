from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lethe.errors import RunFolderError, SaveError
from lethe.solvers.training_state import Checkpoint
from lethe.system import tensor_file


@pytest.fixture
def saved() -> Checkpoint:
    rng = torch.Generator().manual_seed(3)
    torch.randn(5, generator=rng)
    return Checkpoint(
        step=17,
        tensors={
            "model.layers.1.mlp.down_proj.weight/master": torch.tensor([[1e-45, -0.0], [torch.inf, 1 / 3]]),
            "model.layers.1.mlp.down_proj.weight/exp_avg": torch.randn(3, 2, generator=rng).T,
            "model.layers.1.mlp.down_proj.weight/step": torch.tensor(17.0),
        },
        states={
            "bio/forget corpus.jsonl": {"direction": torch.randn(4, generator=rng)},
            "Ünïcode'": {"direction": torch.ones(4, dtype=torch.bfloat16), "norm": torch.tensor([2.5])},
        },
        rng=rng,
    )


def test_loading_gives_back_every_bit(saved: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"

    saved.save(path)
    loaded = Checkpoint.load(path)

    assert loaded.step == 17
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert loaded.states.keys() == saved.states.keys()
    pairs = [(loaded.tensors, saved.tensors), *((loaded.states[topic], saved.states[topic]) for topic in saved.states)]
    for found, expected in pairs:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert torch.equal(torch.randn(9, generator=loaded.rng), torch.randn(9, generator=saved.rng))


def test_a_later_checkpoint_replaces_an_earlier_one_and_leaves_no_other_file(saved: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    saved.save(path)

    Checkpoint(step=18, tensors={}, states={}, rng=saved.rng).save(path)

    assert Checkpoint.load(path).step == 18
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_keeps_the_earlier_checkpoint_and_leaves_nothing_half_written(
    saved: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    saved.save(path)
    before = path.read_bytes()

    def disk_full(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", disk_full)
    with pytest.raises(SaveError) as error:
        saved.save(path)

    assert str(error.value) == (
        f"{path} could not be written: No space left on device.\nFree some space, or name another disk."
    )
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_folder_that_does_not_exist_is_a_save_error(saved: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="could not be written"):
        saved.save(tmp_path / "nowhere" / "checkpoint.safetensors")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused(saved: Checkpoint, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    saved.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "foreign":
        save_file({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"not a checkpoint")

    with pytest.raises(RunFolderError) as error:
        Checkpoint.load(path)

    assert str(error.value).startswith(f"the checkpoint {path} is damaged: ")
    assert str(error.value).endswith(".\nDelete it to start the run from its first step.")
