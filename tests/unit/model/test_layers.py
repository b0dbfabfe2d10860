from typing import Any

import pytest
from torch import nn

from lethe.errors import InvalidLayerError, UnknownModuleError
from lethe.model.layers import d_model, device_of, find_layers, layer_prefix, trainable_names

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("llama", {}, ["model.layers.1.mlp.down_proj.weight"]),
        ("gpt2", GPT, ["transformer.h.1.mlp.c_proj.weight"]),
        ("gpt_neox", {}, ["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, ["model.decoder.layers.1.fc2.weight"]),
        ("phi", {}, ["model.layers.1.mlp.fc2.weight"]),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 5}, ["transformer.blocks.1.ffn.down_proj.weight"]),
        ("mixtral", EXPERTS, ["model.layers.1.mlp.experts.down_proj"]),
        (
            "qwen2_moe",
            {**EXPERTS, "shared_expert_intermediate_size": 16},
            ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.shared_expert.down_proj.weight"],
        ),
    ],
)
def test_mlp_output_matrices_are_found_by_name(
    tiny_model: Any, family: str, changes: dict[str, Any], names: list[str]
) -> None:
    model = tiny_model(family, **changes)

    assert list(trainable_names(model, 1)) == names
    assert set(names) <= {name for name, _ in model.named_parameters()}
    assert len(find_layers(model)) == 5
    assert find_layers(model)[1] is model.get_submodule(layer_prefix(model, 1))
    assert d_model(model) == 32
    assert device_of(model).type == "cpu"


@pytest.mark.parametrize("spelling", ["self_attn.o_proj", "self_attn.o_proj.weight"])
def test_named_modules_replace_the_known_ones(tiny_model: Any, spelling: str) -> None:
    names = trainable_names(tiny_model(), 3, (spelling, "mlp.down_proj"))

    assert set(names) == {"model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"}


def test_biases_and_norms_are_no_matrices(tiny_model: Any) -> None:
    with pytest.raises(UnknownModuleError, match="layer 1 has no matrix named input_layernorm"):
        trainable_names(tiny_model(), 1, ("input_layernorm",))


def test_an_unknown_module_is_answered_with_what_the_layer_has(tiny_model: Any) -> None:
    with pytest.raises(UnknownModuleError) as error:
        trainable_names(tiny_model(), 1, ("mlp.down_proj", "mlp.w2"))

    assert str(error.value) == (
        "layer 1 has no matrix named mlp.w2.\n"
        "Layer 1 has: mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj, self_attn.o_proj, "
        "self_attn.q_proj, self_attn.v_proj. Pass one of these to --train-modules."
    )


def test_an_unknown_family_is_answered_with_what_the_layer_has(tiny_model: Any) -> None:
    with pytest.raises(UnknownModuleError) as error:
        trainable_names(tiny_model("mamba", state_size=8), 1)

    assert str(error.value) == (
        "no MLP output matrix is known for model_type 'mamba'.\n"
        "Layer 1 has: mixer.A_log, mixer.conv1d, mixer.dt_proj, mixer.in_proj, mixer.out_proj, mixer.x_proj.\n"
        "Pass --train-modules NAME, or add a line for this family to decoder.py."
    )


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_layer_outside_the_model_is_refused(tiny_model: Any, layer: int) -> None:
    with pytest.raises(InvalidLayerError) as error:
        trainable_names(tiny_model(), layer)

    assert str(error.value) == f"'layer' must be in [0, 4] for this model of 5 layers. Got {layer}."


def test_a_model_without_a_list_of_layers_is_refused(tiny_model: Any) -> None:
    model = tiny_model()
    model.model.layers = nn.Sequential(*model.model.layers)

    with pytest.raises(UnknownModuleError) as error:
        find_layers(model)

    assert str(error.value) == (
        "no list of 5 decoder layers was found in a model of type 'llama'.\n"
        "Lethe steers decoder-only language models whose layers stand in one ModuleList."
    )
