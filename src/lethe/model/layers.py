"""Where a Hugging Face causal language model keeps its layers and its MLP output matrices."""

import torch
from torch import nn
from transformers import PreTrainedModel

from lethe.errors import InvalidLayerError, UnknownModuleError

# The last matrix of the MLP, as each family of models names it inside one layer. A new family is one more entry.
MLP_OUTPUTS = (
    "mlp.down_proj",  # llama, mistral, qwen, gemma, phi3, olmo, cohere, granite, glm, ...
    "mlp.dense_4h_to_h",  # gpt_neox, bloom, falcon
    "mlp.c_proj",  # gpt2, gpt_neo, gpt_bigcode, starcoder2
    "mlp.fc2",  # phi, stablelm variants
    "mlp.fc_out",  # gptj, codegen
    "mlp.proj_out",  # xglm-like blocks
    "fc2",  # opt, xglm, biogpt
    "ffn.down_proj",  # mpt
    "ffn.experts.mlp.w2",  # dbrx
    "feed_forward.down_proj",  # jamba, llama4 dense layers
    "feed_forward.w2",  # lfm2
    "feed_forward.experts.down_proj",  # llama4
    "feed_forward.shared_expert.down_proj",
    "shared_mlp.output_linear",  # granitemoehybrid
    "mlp.experts.down_proj",  # mixtral, qwen2_moe, qwen3_moe, deepseek, gpt_oss: one 3-D tensor for all experts
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
    "experts.down_proj",
    "block_sparse_moe.output_linear",  # granitemoe
    "block_sparse_moe.experts.down_proj",
)


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, first to last.

    Raises: UnknownModuleError if the model has no list of `num_hidden_layers` layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in (model.get_decoder(), model):
        for _, candidate in module.named_modules():
            if isinstance(candidate, nn.ModuleList) and len(candidate) == count:
                return candidate
    raise UnknownModuleError(
        f"no list of {count} decoder layers was found in a model of type '{model.config.model_type}'.\n"
        "Lethe steers decoder-only language models whose layers stand in one ModuleList."
    )


def layer_prefix(model: PreTrainedModel, layer: int) -> str:
    """The dotted name of a layer inside the model, `model.layers.7`.

    Raises: InvalidLayerError if the model has no such layer.
    """
    layers = find_layers(model)
    if not 0 <= layer < len(layers):
        raise InvalidLayerError(
            f"'layer' must be in [0, {len(layers) - 1}] for this model of {len(layers)} layers. Got {layer}."
        )
    return next(name for name, module in model.named_modules() if module is layers[layer])


def trainable_names(model: PreTrainedModel, layer: int, modules: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Full names of the weights that training may change in one layer.

    `modules` names submodules or parameters relative to the layer (`mlp.down_proj`); without it they are the
    MLP output matrices of a known family. Matrices are found by name: the published code takes "parameter
    number 6" of the layer, which is another matrix in Qwen2, Qwen3, Gemma 3 and OLMo 2.

    Raises: UnknownModuleError, listing what the layer has, if nothing matches.
    """
    prefix = layer_prefix(model, layer)
    inside = {
        name: parameter for name, parameter in find_layers(model)[layer].named_parameters() if parameter.ndim in (2, 3)
    }
    modules = tuple(module.removesuffix(".weight") for module in modules)
    wanted = modules or MLP_OUTPUTS
    found = tuple(f"{prefix}.{name}" for name in inside if name.removesuffix(".weight") in wanted)
    missing = [module for module in modules if module not in _stems(inside)]
    if found and not missing:
        return found
    has = ", ".join(sorted(_stems(inside))) or "no matrix"
    if modules:
        raise UnknownModuleError(
            f"layer {layer} has no matrix named {', '.join(missing)}.\n"
            f"Layer {layer} has: {has}. Pass one of these to --train-modules."
        )
    raise UnknownModuleError(
        f"no MLP output matrix is known for model_type '{model.config.model_type}'.\n"
        f"Layer {layer} has: {has}.\nPass --train-modules NAME, or add a line for this family to decoder.py."
    )


def _stems(inside: dict[str, nn.Parameter]) -> set[str]:
    return {name.removesuffix(".weight") for name in inside}


def d_model(model: PreTrainedModel) -> int:
    """Width of the residual stream."""
    return model.config.get_text_config().hidden_size


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model's input belongs: the device of its embeddings."""
    return model.get_input_embeddings().weight.device  # type: ignore[return-value]
