"""RMU, Adaptive RMU, RSV and RNA against the authors' loops, written out: two whole models, hooks, all layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from lethe.data.batches import Schedule
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.directions import gaussian_like, random_unit
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.model.layers import find_layers, trainable_names
from lethe.model.slice import LayerSlice
from lethe.solvers.gradient import Gradient
from lethe.types import Batch, HistoryRow, Topic

LAYER, TRAINED, STEPS, TOPICS, LR = 3, (1, 2, 3), 6, ("bio", "cyber"), 1e-3
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt_neox": {},
    "phi3": {},
}


def published_schedule(tiny_batch: Any, **how: Any) -> Schedule:
    """Topics in turn; one retain batch serves one step of each topic."""
    topics = tuple(
        Topic(name=name, batches=tuple(tiny_batch((9, 5, 7, 3 + i), seed=10 * n + i, **how) for i in range(3)))
        for n, name in enumerate(TOPICS)
    )
    retain = [tiny_batch((8, 4, 6, 2), seed=100 + i, **how) for i in range(3)]
    return Schedule(topics=topics, retain=tuple(retain[step // len(TOPICS)] for step in range(STEPS)), steps=STEPS)


def forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Activations at the layer, caught by a hook in a forward of the whole model."""
    seen: list[Any] = []
    handle = find_layers(model)[LAYER].register_forward_hook(lambda _, __, output: seen.append(output))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def mean_over_everything(h: Tensor, target: Tensor, batch: Batch) -> Tensor:
    return mse_loss(h, target.expand_as(h))


def mean_over_counted(h: Tensor, target: Tensor, batch: Batch) -> Tensor:
    return (h - target)[batch.mask].square().mean()


def naive_loop(
    model: PreTrainedModel,
    method: RMU | AdaptiveRMU | RSV,
    schedule: Schedule,
    mse: Callable[[Tensor, Tensor, Batch], Tensor],
) -> dict[str, Tensor]:
    """The published training loop; returns the named matrices after it."""
    updated, frozen = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    names = sum((trainable_names(model, layer) for layer in TRAINED), ())
    parameters = dict(updated.named_parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())
    optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=LR, eps=1e-6, weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    units: dict[int, Tensor] = {}
    lengths: dict[int, float] = {}
    for step in range(STEPS):
        topic, index = step % len(TOPICS), step // len(TOPICS)
        forget = schedule.topics[topic].batches[index]
        retain = schedule.retain[step]
        h_forget = forward(updated, forget)
        if topic not in units:
            units[topic] = random_unit(32, method.direction, rng)
        if isinstance(method, RMU):
            target = method.steering_coeff * units[topic]
        elif isinstance(method, RSV):
            with torch.no_grad():
                target = forward(frozen, forget) + method.steering_coeff * units[topic]
        else:
            if topic not in lengths:
                lengths[topic] = method.beta * h_forget.norm(dim=-1)[forget.mask].mean().item()
            target = lengths[topic] * units[topic]
        forget_loss = mse(h_forget, target, forget)
        with torch.no_grad():
            kept = forward(frozen, retain)
            if method.nu > 0:
                kept = kept + method.nu * gaussian_like(kept, rng)
        retain_loss = mse(forward(updated, retain), kept, retain)
        (forget_loss + method.alpha * retain_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameters[name].detach() for name in names}


def ours(model: PreTrainedModel, method: SteeringMethod, schedule: Schedule) -> dict[str, Tensor]:
    names = sum((trainable_names(model, layer) for layer in TRAINED), ())
    layers = LayerSlice(copy.deepcopy(model), TRAINED[0], LAYER + 1, names)
    Gradient(lr=LR, fp32_masters=False).train(layers, method, schedule, torch.Generator().manual_seed(0))
    return layers.delta()


METHODS = {
    "rmu": RMU(alpha=10.0),
    "adaptive-rmu": AdaptiveRMU(alpha=10.0),
    "rsv": RSV(alpha=10.0),
    "rna on rmu": RMU(alpha=10.0, nu=0.05),
    "rna on adaptive-rmu": AdaptiveRMU(alpha=10.0, nu=0.05),
    "rna on rsv": RSV(alpha=10.0, nu=0.05),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_published_gives_the_authors_weights(
    tiny_model: Any, tiny_batch: Any, family: str, method: RMU | AdaptiveRMU | RSV
) -> None:
    model = tiny_model(family, **FAMILIES[family])
    schedule = published_schedule(tiny_batch, side="left", count="all")
    method = method.as_published()

    expected = naive_loop(model, method, schedule, mean_over_everything)
    found = ours(model, method, schedule)

    start = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value - start[name]).abs().max() > 2 * LR
        # A mean of norms may be summed in another order, so Adaptive RMU's length is not promised to the last bit.
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_default_counts_real_tokens_without_bos(
    tiny_model: Any, tiny_batch: Any, method: RMU | AdaptiveRMU | RSV
) -> None:
    model = tiny_model("llama")
    schedule = published_schedule(tiny_batch, side="right", count="no-first")

    expected = naive_loop(model, method, schedule, mean_over_counted)
    over_everything = naive_loop(model, method, schedule, mean_over_everything)
    found = ours(model, method, schedule)

    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        assert (found[name] - over_everything[name]).abs().max() > 1e-4


def test_noise_on_the_retain_target_sets_a_floor_under_the_retain_loss(tiny_model: Any, tiny_batch: Any) -> None:
    """E |h - (h0 + nu xi)|^2 = |h - h0|^2 + nu^2 per coordinate; at the first step the model is still h0."""
    model, method = tiny_model("llama"), RMU(alpha=10.0, nu=0.3)
    layers = LayerSlice(model, 1, LAYER + 1, trainable_names(model, LAYER))
    rows: list[HistoryRow] = []
    schedule = published_schedule(tiny_batch, side="right", count="no-first")
    Gradient(lr=1e-6).train(layers, method, schedule, torch.Generator().manual_seed(0), on_row=rows.append)

    assert rows[0].measures["retain_floor"] == pytest.approx(10 * 0.3**2)
    assert sum(10 * row.retain_loss for row in rows) / len(rows) == pytest.approx(
        rows[0].measures["retain_floor"], rel=0.05
    )


def test_noise_on_the_input_moves_the_retain_activation_and_not_its_target(tiny_model: Any, tiny_batch: Any) -> None:
    model = tiny_model("llama")
    layers = LayerSlice(model, 1, LAYER + 1, trainable_names(model, LAYER))
    recording = layers.record(tiny_batch())
    noise = 0.1 * gaussian_like(recording.hidden, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layers(recording, noise)
        whole = forward_from(model, recording.batch, noise)
    torch.testing.assert_close(found, whole, rtol=0, atol=0)
    assert not torch.equal(found, recording.frozen.h)


def forward_from(model: PreTrainedModel, batch: Batch, noise: Tensor) -> Tensor:
    """A whole forward with noise added to what enters layer 1."""
    handle = find_layers(model)[0].register_forward_hook(
        lambda _, __, output: (output[0] + noise, *output[1:]) if isinstance(output, tuple) else output + noise
    )
    try:
        return forward(model, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "sixth"),
    [
        ("llama", "mlp.down_proj.weight"),
        ("qwen2", "self_attn.o_proj.weight"),
        ("qwen3", "mlp.gate_proj.weight"),
        ("gemma3_text", "mlp.gate_proj.weight"),
        ("olmo2", "mlp.gate_proj.weight"),
    ],
)
def test_parameter_number_six_is_a_trap_and_names_are_not(tiny_model: Any, family: str, sixth: str) -> None:
    model = tiny_model(family, head_dim=8)
    prefix = "model.layers.2."

    assert list(dict(find_layers(model)[2].named_parameters()))[6] == sixth
    assert trainable_names(model, 2) == (f"{prefix}mlp.down_proj.weight",)
