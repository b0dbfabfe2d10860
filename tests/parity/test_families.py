"""Replaying recorded layers equals the library's own forward, on every kind of decoder.

Each family is a tiny random model whose weights are moved after recording. The reference is a plain full-depth
forward of a second model that holds the moved weights.
"""

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.model.layers import find_layers, trainable_names
from lethe.model.slice import LayerSlice
from lethe.model.token_view import TokenView
from lethe.model.trainable import Everything, Matrices, Trainable
from lethe.types import Batch

START, STOP = 1, 4

WINDOW = {"sliding_window": 4, "use_sliding_window": True}
GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "n_inner": 64}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
PER_LAYER_INPUT = {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99}
ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
MIXED = ["linear_attention", "full_attention"] * 2 + ["linear_attention"]
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 5, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "deepseek_v3": {**SMALL_EXPERTS, **LATENT, **GROUPS, "num_key_value_heads": 4},
    "diffllama": {},
    "ernie4_5": {},
    "ernie4_5_moe": {**SMALL_EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone4": WINDOW,
    "falcon": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **WINDOW},
    "gemma3_text": {"head_dim": 8, **WINDOW},
    "gemma4_text": {**PER_LAYER_INPUT, **WINDOW, "layer_types": ALTERNATING},
    "gemma4_text shared keys": {**PER_LAYER_INPUT, **WINDOW, "layer_types": ALTERNATING, "num_kv_shared_layers": 2},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {"head_dim": 8, **SMALL_EXPERTS, **GROUPS},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 5, "attention_types": [[["global", "local"], 2], [["global"], 1]], "window_size": 4},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 8, **EXPERTS, **WINDOW},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {},
    "granitemoe": EXPERTS,
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 16},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": EXPERTS,
    "lfm2": {},
    "llama": {},
    "llama4_text": {"head_dim": 8, **EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 4},
    "mamba": {"state_size": 8},
    "ministral": {"head_dim": 8, **WINDOW},
    "minimax": {"head_dim": 8, **EXPERTS},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 5},
    "nanochat": {},
    "nemotron": {"head_dim": 8},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmo_hybrid": {},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": EXPERTS,
    "qwen2": {**WINDOW, "max_window_layers": 2},
    "qwen2_moe": SMALL_EXPERTS,
    "qwen3": {"head_dim": 8, **WINDOW, "max_window_layers": 2},
    "qwen3_moe": {"head_dim": 8, **SMALL_EXPERTS},
    "qwen3_5_text": {**LINEAR, "layer_types": MIXED},
    "qwen3_next": {**SMALL_EXPERTS, **LINEAR, "layer_types": MIXED},
    "seed_oss": {"head_dim": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 5, "attention_heads": 4},
}
HEADS: dict[str, dict[str, Any]] = {
    "gemma2 soft-capped": {**FAMILIES["gemma2"], "final_logit_softcapping": 0.3, "attn_logit_softcapping": 1.0},
    "cohere scaled": {"logit_scale": 0.3},
    "granite scaled": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "llama tied": {"tie_word_embeddings": True},
}
"""What families do to their logits, with numbers that show."""
MODULES = {"mamba": ("mixer.out_proj",)}


def full_forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The output of the slice's last layer in a forward of the whole model."""
    seen: list[Any] = []
    handle = find_layers(model)[STOP - 1].register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_the_full_forward(
    tiny_model: Any, tiny_batch: Any, family: str, side: Literal["left", "right"]
) -> None:
    model = tiny_model(family.split()[0], **FAMILIES[family])
    whole = copy.deepcopy(model)
    batch = tiny_batch((9, 5, 7), side=side)
    names = sum((trainable_names(model, layer, MODULES.get(family, ())) for layer in range(START, STOP)), ())
    before = {module: (hooks(module), "forward" in vars(module)) for module in model.modules()}
    layers = LayerSlice(model, START, STOP, names)
    recording = layers.record(batch)
    # torch chooses how to multiply by who wants gradients, also where none are taken, so both must want the same.
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in names)
    with torch.no_grad():
        untouched = full_forward(whole, batch)

    noise = torch.Generator().manual_seed(1)
    theirs = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in layers.trained.items():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
            theirs[name].copy_(parameter)
    moved = layers.delta()
    expected = full_forward(whole, batch)
    replayed = layers(recording)

    assert torch.equal(recording.frozen.h, untouched)
    assert torch.equal(layers.record(batch).frozen.h, untouched)
    assert not torch.equal(expected, untouched)
    assert torch.equal(replayed, expected)
    assert torch.equal(layers(recording), expected)

    target = torch.randn(replayed.shape, generator=noise)
    ours = torch.autograd.grad((replayed - target).square().mean(), list(layers.trained.values()))
    full = torch.autograd.grad((expected - target).square().mean(), [theirs[name] for name in layers.trained])
    for name, mine, other in zip(layers.trained, ours, full, strict=True):
        assert mine.any(), name
        assert torch.equal(mine, other), name

    layers.check(batch)
    assert all(torch.equal(value, moved[name]) for name, value in layers.delta().items())
    assert {module: (hooks(module), "forward" in vars(module)) for module in model.modules()} == before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(names)


# --- token log-probabilities


def last_quarter(model: PreTrainedModel) -> Matrices:
    """All that the last two of the five layers hold."""
    mine = {id(parameter) for layer in find_layers(model)[-2:] for parameter in layer.parameters()}
    return Matrices(tuple(name for name, parameter in model.named_parameters() if id(parameter) in mine))


def plain_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-softmax of what the library gives, [batch pos-1 vocab], of tokens 1 to the last."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


def move(parameters: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
            theirs[name].copy_(parameter)


@pytest.mark.parametrize("trained", ["last quarter", "everything"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2 soft-capped", "cohere scaled", "granite scaled", "llama tied"])
def test_token_log_probs_and_gradients_equal_those_of_the_full_forward(
    tiny_model: Any, tiny_batch: Any, family: str, trained: str
) -> None:
    model = tiny_model(family.split()[0], **({**FAMILIES, **HEADS}[family]))
    whole = copy.deepcopy(model)
    batch = tiny_batch((9, 5, 7), side="left")
    moves: Trainable = Everything() if trained == "everything" else last_quarter(model)
    before = {module: (hooks(module), "forward" in vars(module)) for module in model.modules()}
    view = TokenView(model, moves)
    recording = view.record(batch)
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name in view.trained)
    with torch.no_grad():
        untouched = plain_log_probs(whole, batch)
    move(view.trained, dict(whole.named_parameters()))
    moved = view.delta()
    full = plain_log_probs(whole, batch)
    ids = batch.input_ids[:, 1:, None]
    target = torch.rand(ids.shape[:2], generator=torch.Generator().manual_seed(2))

    frozen, now = view.record(batch).frozen, view(recording)

    for reference in (frozen, recording.frozen):
        assert torch.equal(reference.of_tokens[:, 1:], untouched.gather(-1, ids)[..., 0])
        assert torch.equal(reference.distribution[:, 1:], untouched)
    assert not torch.equal(full, untouched)
    assert torch.equal(now.of_tokens[:, 1:], full.gather(-1, ids)[..., 0])
    assert torch.equal(now.distribution[:, 1:], full)

    parameters = [dict(whole.named_parameters())[name] for name in view.trained]
    theirs = torch.autograd.grad((full.gather(-1, ids)[..., 0] * target).sum(), parameters, allow_unused=True)
    ours = torch.autograd.grad(
        (view(recording).of_tokens[:, 1:] * target).sum(), list(view.trained.values()), allow_unused=True
    )
    assert sum(gradient is not None for gradient in ours) > len(ours) / 2
    for name, mine, other in zip(view.trained, ours, theirs, strict=True):
        assert (mine is None) == (other is None), name
        assert mine is None or torch.equal(mine, other), name

    view.check(batch)
    assert all(torch.equal(value, moved[name]) for name, value in view.delta().items())
    assert {module: (hooks(module), "forward" in vars(module)) for module in model.modules()} == before
