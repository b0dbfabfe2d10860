"""Differences between checkpoints, on edits of known size and rank."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lethe.errors import ModelError
from lethe.model.diff import diff


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def tensors():
    rng = torch.Generator().manual_seed(0)
    return {
        "model.layers.10.mlp.down_proj.weight": torch.randn(12, 20, generator=rng),
        "model.layers.9.mlp.down_proj.weight": torch.randn(20, 12, generator=rng),
        "h.3.ln.weight": torch.randn(12, generator=rng),
        "experts": torch.randn(2, 3, 4, generator=rng),
    }


def test_equal_checkpoints_differ_in_nothing(tensors, tmp_path):
    assert diff(save(tmp_path / "a", tensors), save(tmp_path / "b", tensors)) == []


@pytest.mark.parametrize("name", ["model.layers.10.mlp.down_proj.weight", "model.layers.9.mlp.down_proj.weight"])
@pytest.mark.parametrize("singular", [[1.0], [1.0, 1.0, 1.0], [3.0, 1.0]])
def test_norm_and_rank_of_a_known_edit(name, singular, tensors, tmp_path):
    rows, columns = tensors[name].shape
    rng = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(rows, len(singular), generator=rng))[0]
    v = torch.linalg.qr(torch.randn(columns, len(singular), generator=rng))[0]
    edited = tensors | {name: tensors[name] + u @ torch.diag(torch.tensor(singular)) @ v.T}

    (row,) = diff(save(tmp_path / "a", tensors), save(tmp_path / "b", edited))

    p = [s / sum(singular) for s in singular]
    assert (row.name, row.kind, row.shape) == (name, "changed", (rows, columns))
    assert row.layer == int(name.split(".")[2])
    assert row.relative_norm == pytest.approx(math.hypot(*singular) / tensors[name].norm().item(), rel=1e-4)
    assert row.effective_rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-3)


def test_a_cast_is_named_and_does_not_blur_an_edit(tensors, tmp_path):
    other = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
    name = "model.layers.9.mlp.down_proj.weight"
    other[name][0] += 4
    rows = diff(save(tmp_path / "a", tensors), save(tmp_path / "b", other))
    assert {row.name: row.kind for row in rows} == {n: "changed" if n == name else "dtype" for n in tensors}
    changed = next(row for row in rows if row.kind == "changed")
    assert changed.effective_rank == pytest.approx(1, rel=1e-3), "rounding of the other rows would raise it"


def test_missing_added_and_reshaped_tensors(tensors, tmp_path):
    other = {name: value for name, value in tensors.items() if name != "experts"}
    other["h.3.ln.weight"] = torch.zeros(13)
    other["model.layers.11.mlp.down_proj.weight"] = torch.zeros(2, 3)
    rows = diff(save(tmp_path / "a", tensors), save(tmp_path / "b", other))
    found = {row.name: (row.kind, row.layer, row.shape, row.relative_norm, row.effective_rank) for row in rows}
    assert found == {
        "experts": ("missing", None, (2, 3, 4), None, None),
        "h.3.ln.weight": ("shape", 3, (12,), None, None),
        "model.layers.11.mlp.down_proj.weight": ("added", 11, (2, 3), None, None),
    }


def test_only_matrices_have_a_rank_and_layers_stand_in_their_order(tensors, tmp_path):
    zeroed = tensors | {"h.3.ln.weight": torch.zeros(12)}
    everything = {name: value + 1 for name, value in zeroed.items()}
    rows = diff(save(tmp_path / "a", zeroed), save(tmp_path / "b", everything))
    assert [row.layer for row in rows] == [None, 3, 9, 10]
    assert [row.effective_rank is not None for row in rows] == [False, False, True, True]
    assert rows[1].relative_norm == math.inf


def test_a_folder_that_is_not_there(tensors, tmp_path):
    with pytest.raises(ModelError, match="no model folder"):
        diff(save(tmp_path / "a", tensors), tmp_path / "b")
