"""Patches: the same bytes for the same edit, applied only where they belong, and reverted bit for bit."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lethe.errors import PatchError, SaveError
from lethe.model import patch as patch_module
from lethe.model.checkpoint_files import checkpoint_files, read_tensor, tensor_hash
from lethe.model.loading import load_model
from lethe.model.patch import Patch, revert

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "eos_token_id": 2}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
FAMILIES = {
    "llama": ("llama", SMALL, "mlp.down_proj"),
    "llama-tied": ("llama", {**SMALL, "tie_word_embeddings": True}, "mlp.down_proj"),
    "qwen2": ("qwen2", SMALL, "mlp.down_proj"),
    "gemma3": ("gemma3_text", {**SMALL, "sliding_window": 4}, "mlp.down_proj"),
    # Stored as language_model.model.*, used as model.language_model.*.
    "gemma3-with-images": (
        "gemma3",
        {"text_config": SMALL, "vision_config": {**VISION, "patch_size": 14}},
        "language_model.layers.{}.mlp.down_proj",
    ),
    "gpt_neox": ("gpt_neox", SIZES, "mlp.dense_4h_to_h"),
    "gpt2": ("gpt2", GPT2, "mlp.c_proj"),
    # Stored as one matrix per expert, used as one tensor of all experts.
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 2}, "mlp.experts.down_proj"),
}


def save_tiny(folder: Path, family: str, shard: str = "50GB", seed: int = 0, dtype=torch.float32) -> Path:
    model_type, settings, _ = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit(model, family: str, seed: int = 1, layers=(1, 2)) -> dict[str, torch.Tensor]:
    """New values of the MLP output weights of two layers."""
    kind = FAMILIES[family][2]
    rng = torch.Generator().manual_seed(seed)
    wanted = [kind.format(i) if "{}" in kind else f".{i}.{kind}" for i in layers]
    names = [name for name, _ in model.named_parameters() if any(w in name for w in wanted) and "bias" not in name]
    assert len(names) == 2
    parameters = dict(model.named_parameters())
    return {n: parameters[n] + 0.1 * torch.randn(parameters[n].shape, generator=rng) for n in names}


def make_patch(folder: Path, family: str = "llama", **options) -> Patch:
    model = load_model(folder, layers=3)
    return Patch.from_parameters(
        model,
        edit(model, family, **options),
        base=folder,
        method="rmu",
        config={"steps": 3, "alpha": 10.0, "b": {"z": 1, "a": 2}},
        versions={"torch": "2", "lethe": "0"},
    )


def logits(folder_or_model) -> torch.Tensor:
    model = folder_or_model
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits


def tensors_of(folder: Path) -> dict[str, str]:
    files = checkpoint_files(folder)
    return {name: tensor_hash(read_tensor(files, name)) for name in files}


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "sharded", "llama", "8KB")


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_patch_survives_the_disk(llama, tmp_path):
    patch = make_patch(llama)
    patch.save(tmp_path / "new" / "p.safetensors")
    loaded = Patch.load(tmp_path / "new" / "p.safetensors")
    assert set(loaded.tensors) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    assert all(torch.equal(loaded.tensors[n], v) for n, v in patch.tensors.items())
    for name in ("base_hashes", "model", "method", "config", "versions"):
        assert getattr(loaded, name) == getattr(patch, name)
    assert os.listdir(tmp_path / "new") == ["p.safetensors"]


def test_equal_patches_give_equal_bytes(llama, tmp_path):
    patch = make_patch(llama)
    reordered = Patch(
        tensors=dict(reversed(patch.tensors.items())),
        base_hashes=dict(reversed(patch.base_hashes.items())),
        model=patch.model,
        method=patch.method,
        config=dict(reversed(patch.config.items())),
        versions=dict(reversed(patch.versions.items())),
    )
    patch.save(tmp_path / "first")
    first = (tmp_path / "first").read_bytes()
    for same in (patch, reordered, make_patch(llama), Patch.load(tmp_path / "first")):
        same.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == first
    make_patch(llama, seed=2).save(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != first


def refuse_to_load(path, *parts):
    with pytest.raises(PatchError) as caught:
        Patch.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_patches_that_cannot_be_read(llama, tmp_path):
    path = tmp_path / "p.safetensors"
    refuse_to_load(path, "there is no patch file")
    make_patch(llama).save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refuse_to_load(path, "corrupt or cut short", "again")
    path.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    refuse_to_load(path, "corrupt", "down_proj.weight differs from its hash")
    refuse_to_load(llama / "model.safetensors", "not a patch of Lethe")


def test_a_patch_of_a_newer_format(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(patch_module, "FORMAT", 99)
    make_patch(llama).save(tmp_path / "p")
    monkeypatch.undo()
    refuse_to_load(tmp_path / "p", "has patch format 99; this Lethe reads up to 1", "Upgrade lethe-unlearn")


# --- in memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_in_memory_equals_exported_and_can_be_put_back(family, tmp_path):
    base = save_tiny(tmp_path / "base", family)
    patch = make_patch(base, family)
    model = load_model(base)
    before, untouched = logits(model), {n: p.clone() for n, p in model.named_parameters()}

    originals = patch.apply_in_memory(model)

    assert len(originals) == 2
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, untouched[n])}
    assert changed == set(originals)
    exported = patch.export(base, tmp_path / "out")
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(exported), logits(model))
    assert torch.equal(logits(revert(exported, tmp_path / "back")), before)
    for name, value in originals.items():
        model.get_parameter(name).data.copy_(value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("stored", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, None)]
)
def test_a_patch_has_the_dtype_of_the_checkpoint_and_fits_models_of_any(stored, loaded, tmp_path):
    base = save_tiny(tmp_path / "base", "llama", dtype=stored)
    patch = make_patch(base)
    assert {value.dtype for value in patch.tensors.values()} == {stored}
    model = load_model(base, dtype=loaded)
    originals = patch.apply_in_memory(model)
    for name in originals:
        assert torch.equal(model.get_parameter(name), patch.tensors[name].to(loaded or stored))


def test_a_checkpoint_that_leaves_out_the_inner_models_name(tmp_path):
    base = save_tiny(tmp_path / "base", "gpt2")
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    patch = make_patch(base, "gpt2")
    assert set(patch.tensors) == {"h.1.mlp.c_proj.weight", "h.2.mlp.c_proj.weight"}
    model = load_model(base)
    patch.apply_in_memory(model)
    assert torch.equal(logits(patch.export(base, tmp_path / "out")), logits(model))


def test_what_cannot_be_stored(llama):
    model = load_model(llama, layers=3)
    about = {"base": llama, "method": "rmu", "config": {}, "versions": {}}
    with pytest.raises(PatchError, match=r"parameter model\.extra of the model is not stored"):
        Patch.from_parameters(model, {"model.extra": torch.zeros(2)}, **about)
    with pytest.raises(PatchError, match=r"shape \(2,\) .* has \(16, 24\)"):
        Patch.from_parameters(model, {"model.layers.1.mlp.down_proj.weight": torch.zeros(2)}, **about)


def test_a_patch_is_refused_by_every_other_model(llama, tmp_path):
    patch = make_patch(llama)
    name = r"model\.layers\.1\.mlp\.down_proj\.weight"
    other = save_tiny(tmp_path / "other", "llama", seed=7)
    foreign = save_tiny(tmp_path / "foreign", "gpt2")
    with pytest.raises(PatchError, match=rf"{name} in .*other is not the tensor .*\n.*made with rmu for .*llama"):
        patch.export(other, tmp_path / "out")
    with pytest.raises(PatchError, match=rf"changes {name}, which .*foreign does not hold"):
        patch.export(foreign, tmp_path / "out")
    with pytest.raises(PatchError, match=rf"{name} in .*other is not the tensor"):
        patch.apply_in_memory(load_model(other))
    assert not (tmp_path / "out").exists()

    edited = load_model(llama)
    patch.apply_in_memory(edited)
    with pytest.raises(PatchError, match=r"the model was edited.*\nLoad the model again"):
        patch.apply_in_memory(edited)
    with pytest.raises(PatchError, match=r"no parameter for model\.layers\.2.*which the patch changes"):
        patch.apply_in_memory(load_model(llama, layers=2))


def test_a_refused_patch_leaves_the_model_as_it_was(llama):
    patch, model = make_patch(llama), load_model(llama)
    model.get_parameter("model.layers.2.mlp.down_proj.weight").data[0, 0] += 1
    before = logits(model)
    with pytest.raises(PatchError):
        patch.apply_in_memory(model)
    assert torch.equal(logits(model), before)


# --- folders --------------------------------------------------------------------------------------------------------


def test_export_rewrites_only_the_shards_that_changed(sharded, tmp_path):
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    (sharded / "consolidated.safetensors").write_bytes(b"a second set of weights")
    (sharded / "LICENSE").write_text("free")
    before = tensors_of(sharded)
    patch = make_patch(sharded)
    out = patch.export(sharded, tmp_path / "deep" / "out")

    after = tensors_of(out)
    assert {n for n in before if before[n] != after[n]} == set(patch.tensors)
    assert all(after[n] == tensor_hash(v) for n, v in patch.tensors.items())
    rewritten = {checkpoint_files(sharded)[n].name for n in patch.tensors}
    shards = {path.name for path in checkpoint_files(sharded).values()}
    assert rewritten < shards
    for name in shards:
        assert os.path.samefile(sharded / name, out / name) == (name not in rewritten)
    small = {p.name for p in sharded.iterdir() if p.suffix == ".json"} | {"LICENSE"}
    assert {p.name for p in out.iterdir()} == shards | small | {"lethe"}, "no pickles, no second set of weights"
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert tensors_of(sharded) == before


@pytest.mark.parametrize("fixture", ["llama", "sharded"])
def test_revert_is_bit_exact(fixture, request, tmp_path):
    base = request.getfixturevalue(fixture)
    out = make_patch(base).export(base, tmp_path / "out")
    back = revert(out, tmp_path / "back")
    needed = {
        path.name for path in base.iterdir() if path.name not in ("pytorch_model.bin", "consolidated.safetensors")
    }
    assert file_hashes(back) == {name: value for name, value in file_hashes(base).items() if name in needed}
    assert not (back / "lethe").exists()


def test_files_are_copied_where_hard_links_are_not_possible(sharded, tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", link)
    out = make_patch(sharded).export(sharded, tmp_path / "out")
    assert logits(out).isfinite().all()
    assert not any(os.path.samefile(p, out / p.name) for p in checkpoint_files(sharded).values())


def test_two_patches_in_a_row_revert_to_the_untouched_base(llama, tmp_path):
    first = make_patch(llama).export(llama, tmp_path / "first")
    second = make_patch(first, seed=5, layers=(0, 1)).export(first, tmp_path / "second")
    assert (
        len(
            {
                tensor_hash(load_file(f / "model.safetensors")["model.layers.1.mlp.down_proj.weight"])
                for f in (llama, first, second)
            }
        )
        == 3
    )
    assert tensors_of(revert(second, tmp_path / "back")) == tensors_of(llama)


def test_what_cannot_be_reverted(llama, tmp_path):
    with pytest.raises(PatchError, match="not an export of Lethe"):
        revert(llama, tmp_path / "back")
    out = make_patch(llama).export(llama, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PatchError, match=r"changed since it was exported: model\.layers\.2"):
        revert(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_never_written_over(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(SaveError, match="is not an empty folder"):
        make_patch(llama).export(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out" / "notes").unlink()
    make_patch(llama).export(llama, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(llama, tmp_path, monkeypatch, call):
    patch = make_patch(llama)
    patch.save(tmp_path / "p")
    old = (tmp_path / "p").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SaveError, match=r"p could not be written: No space left on device\.\nFree some space"):
        make_patch(llama, seed=3).save(tmp_path / "p")
    with pytest.raises(SaveError, match=r"out could not be written: No space left on device\.\nFree some space"):
        patch.export(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == ["p"]
    assert (tmp_path / "p").read_bytes() == old


def test_a_place_that_cannot_be_written_to(llama, tmp_path):
    patch = make_patch(llama)
    (tmp_path / "file").write_text("")
    for write in (lambda out: patch.save(out), lambda out: patch.export(llama, out)):
        with pytest.raises(SaveError, match=r"could not be written: .*\nName a path that you may write to"):
            write(tmp_path / "file" / "out")


def test_an_export_is_not_private_to_its_maker(llama, tmp_path):
    out = make_patch(llama).export(llama, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_originals_are_hidden_from_loaders_that_read_every_safetensors_file(llama, tmp_path):
    out = make_patch(llama).export(llama, tmp_path / "out")
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert json.loads((out / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    shutil.rmtree(out / "lethe")
    assert logits(out).isfinite().all()
