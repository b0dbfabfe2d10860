"""Loading whole and partial models, and the refusals of folders that cannot be used."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from lethe.errors import InvalidLayerError, InvalidValueError, ModelError
from lethe.model import checkpoint_files as checkpoint_files_module
from lethe.model import loading
from lethe.model.checkpoint_files import checkpoint_files, model_folder, tensor_hashes
from lethe.model.loading import load_model, load_tokenizer

LAYERS = 5
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "eos_token_id": 2}
SMALL = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
FAMILIES = {
    "llama": ("llama", SMALL),
    "llama-tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "gemma3": ("gemma3_text", {**SMALL, "sliding_window": 4, "sliding_window_pattern": 2}),
    "gpt_neox": ("gpt_neox", SIZES),
    "gpt2": ("gpt2", GPT2),
    "mixtral": ("mixtral", {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


def save_tiny(folder: Path, family: str, shard: str = "50GB", dtype: torch.dtype = torch.float32) -> Path:
    model_type, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def copy(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def layer_output(model, layer):
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) in (layer + 1, LAYERS)]
    seen = []
    handle = lists[0][layer].register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shard", ["50GB", "6KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_alone_give_the_hidden_states_of_the_whole_model(family, shard, tmp_path):
    folder = save_tiny(tmp_path / family, family, shard)
    assert (len(set(checkpoint_files(folder).values())) > 1) == (shard == "6KB")

    whole, part = load_model(folder), load_model(folder, layers=3)

    assert torch.equal(layer_output(whole, 2), layer_output(part, 2))
    in_upper_layers = re.compile(r"\.(layers|h)\.[34]\.")
    heads = {"lm_head.weight", "embed_out.weight"}
    expected = {name for name, _ in whole.named_parameters() if not in_upper_layers.search(name) and name not in heads}
    assert {name for name, _ in part.named_parameters()} == expected
    assert isinstance(part.get_output_embeddings(), nn.Identity)


def test_a_loaded_model_is_ready_to_measure(llama):
    model = load_model(llama)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.config.use_cache
    assert model.name_or_path == str(llama)


@pytest.mark.parametrize(("asked", "got"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_the_checkpoint_s_dtype_is_kept_unless_another_is_asked_for(asked, got, tmp_path):
    folder = save_tiny(tmp_path / "bf16", "llama", dtype=torch.bfloat16)
    assert {p.dtype for p in load_model(folder, dtype=asked).parameters()} == {got}


def test_only_the_report_of_layers_left_out_is_silenced(llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # the command line silences it, in other tests
    load_model(llama, layers=2)
    assert "LOAD REPORT" not in caplog.text

    extra = load_file(llama / "model.safetensors") | {"surplus": torch.zeros(1)}
    folder = Path(shutil.copytree(llama, llama.parent / "surplus"))
    save_file(extra, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert "surplus" in caplog.text


@pytest.mark.parametrize("layers", [0, -1, LAYERS + 1])
def test_more_layers_than_there_are(llama, layers):
    with pytest.raises(InvalidLayerError, match=rf"first {layers} layers .* has 5: layers 0 to 4"):
        load_model(llama, layers=layers)


def test_layers_counted_from_the_end_are_still_counted_right():
    text = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=10, num_kv_shared_layers=4)
    loading._keep_first_layers(text, 8, Path("m"))
    assert text.num_kv_shared_layers == 2, "layers 6 and 7 share, as in the whole model"


def test_an_unusable_device(llama):
    with pytest.raises(InvalidValueError, match="device 'nonsense' cannot be used"):
        load_model(llama, device="nonsense")


# --- refusals -------------------------------------------------------------------------------------------------------


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refuse(folder, *parts):
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).count("\n") <= 2


def test_a_missing_folder_names_near_ones(llama):
    refuse(llama.parent / "lama", f"no model folder {llama.parent}/lama", "Did you mean", f"{llama.parent}/llama")


def test_a_file_is_not_a_folder(llama):
    refuse(llama / "config.json", "is a file", "Pass the folder")


@pytest.mark.parametrize("name", ["./nowhere/at/all", "a b", "~/nowhere"])
def test_what_cannot_be_a_hub_id_is_not_looked_up(name, monkeypatch):
    monkeypatch.setattr(checkpoint_files_module, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    refuse(name, "there is no model folder", "hub id")


def test_a_hub_id_without_network(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(checkpoint_files_module, "snapshot_download", offline)
    refuse("org/name", "org/name is not a local folder, not in the cache, and the hub cannot be reached", "Go online")


def test_a_hub_id_fetches_no_pickles_and_only_indexed_shards(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "snapshot", "llama", "6KB")
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(checkpoint_files_module, "snapshot_download", download)
    assert model_folder("org/name", "v1") == folder
    assert [call[:2] for call in asked] == [("org/name", "v1")] * 2
    assert not any("safetensors" in pattern for pattern in asked[0][2]), (
        "the config is judged before weights are fetched"
    )
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert shards == {pattern for pattern in asked[1][2] if "safetensors" in pattern}


def test_no_config(copy):
    (copy / "config.json").unlink()
    refuse(copy, "has no config.json")


def test_an_adapter(copy):
    (copy / "adapter_config.json").write_text("{}")
    refuse(copy, "holds an adapter", "Merge it")
    (copy / "config.json").unlink()
    refuse(copy, "is an adapter, not a model", "Merge it")


def test_broken_config(copy):
    (copy / "config.json").write_text("{")
    refuse(copy, "config.json cannot be read as JSON")


def test_remote_code(copy):
    edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    refuse(copy, "auto_map", "Lethe never does", "local copy")


def test_unknown_model_type(copy):
    edit_json(copy / "config.json", model_type="lama")
    refuse(copy, "knows no model_type 'lama'", "nearest is 'llama'", "Upgrade transformers")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "vit", "architectures": None},
    ],
)
def test_no_causal_language_model(copy, changes):
    edit_json(copy / "config.json", **changes)
    refuse(copy, "not a causal language model", "decoder-only")


def test_only_pickled_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuse(copy, "only pickled weights (pytorch_model.bin)", "Convert it to safetensors")


def test_no_weights(copy):
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    refuse(copy, "has no weights", "weights.safetensors")


@pytest.mark.parametrize("keep", [4, 100, 3000])
def test_weights_cut_short(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(copy, "model.safetensors is corrupt or cut short", "Download it again")


def test_a_missing_shard(tmp_path):
    folder = save_tiny(tmp_path / "sharded", "llama", "6KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(folder, f"lacks {shard.name}", "model.safetensors.index.json names")


def test_an_index_that_lies(tmp_path):
    folder = save_tiny(tmp_path / "sharded", "llama", "6KB")
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**files, "surplus": next(iter(files.values()))})
    refuse(folder, "does not hold surplus")
    edit_json(index, weight_map={"x": "../../outside.safetensors"})
    refuse(folder, "no usable weight_map")


def test_a_tensor_that_transformers_would_make_up(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    refuse(copy, "lacks weights", "model.layers.1.mlp.up_proj.weight")


def test_a_config_of_other_weights(copy):
    edit_json(copy / "config.json", intermediate_size=32)
    refuse(copy, "is stored as", "but used as", "belongs to other weights")


# --- tokenizers and hashes ------------------------------------------------------------------------------------------


def save_tokenizer(folder, **special):
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")), **special
    ).save_pretrained(folder)


def test_a_tokenizer_without_padding_pads_with_its_end(copy):
    save_tokenizer(copy, eos_token="</s>")
    assert load_tokenizer(copy).pad_token == "</s>"
    save_tokenizer(copy, unk_token="<unk>")
    assert load_tokenizer(copy).pad_token == "<unk>"
    save_tokenizer(copy)
    with pytest.raises(ModelError, match="no pad, eos, bos or unk"):
        load_tokenizer(copy)


def test_tokenizers_that_are_missing_broken_or_need_code(copy):
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(copy)
    save_tokenizer(copy, eos_token="</s>")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(copy)
    edit_json(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]})
    with pytest.raises(ModelError, match="auto_map"):
        load_tokenizer(copy)


def test_hashes_see_dtype_shape_and_every_bit(llama):
    name = "model.layers.0.mlp.down_proj.weight"
    state = load_file(llama / "model.safetensors")
    in_file = tensor_hashes(llama, [name])
    assert in_file == tensor_hashes(state, [name])
    flipped = state[name].clone()
    flipped.view(torch.int32)[3, 4] ^= 1
    others = [
        flipped,
        state[name].T,
        state[name].T.contiguous(),
        state[name].view(torch.int32),
        state[name].to(torch.bfloat16),
    ]
    assert not {tensor_hashes({name: other}, [name])[name] for other in others} & set(in_file.values())


def test_hashing_a_tensor_that_is_not_there_names_the_nearest(llama):
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.0\.mlp\.dwn_proj\.weight'.*down_proj"):
        tensor_hashes(llama, ["model.layers.0.mlp.dwn_proj.weight"])
