"""LUNAR against its published recipe, written out: one prompt at a time, a whole model, hooks, AdamW on stored rows."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import PreTrainedModel

from lethe import LUNAR
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.solvers.least_squares import Term, losses, solve
from lethe.solvers.one_matrix import matrix
from lethe.solvers.pooled import Recipe, collect_rows
from lethe.solvers.sums import forget_moments, retain_moments
from lethe.types import Batch, Topic

LAYER, C = 3, 2.0
Prompts = list[list[int]]


def prompts(seed: int, count: int, least: int = 3) -> Prompts:
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, 99, (least + int(torch.randint(5, (1,), generator=rng)),), generator=rng).tolist()
        for _ in range(count)
    ]


def batch(rows: Prompts) -> Batch:
    """Padded on the right; every real token counts, as published."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return Batch(input_ids=ids, attention_mask=real, mask=real)


def seen(model: PreTrainedModel, prompt: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of the layer's down_proj, and the layer's output, for one prompt: [token, width] each."""
    layer = model.model.layers[LAYER]  # type: ignore[union-attr]
    found: dict[str, Tensor] = {}
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda _, args, out: found.update(x=args[0][0], y=out[0])),
        layer.register_forward_hook(lambda _, __, out: found.update(h=(out[0] if isinstance(out, tuple) else out)[0])),
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return found["x"], found["y"], found["h"]


def naive(model: PreTrainedModel, forget: Prompts, retain: Prompts, reference: Prompts, seed: int) -> Tensor:
    """The weight that the published code ends with."""

    def last(rows: Prompts) -> Tensor:
        return torch.stack([seen(model, row)[2][-1].double() for row in rows]).mean(dim=0)

    r = (last(reference) - last(forget)).float()
    inputs, targets = [], []
    for row in forget:
        x, y, _ = seen(model, row)
        inputs.append(x)
        targets.append(y + C * r)
    for row in retain:
        x, y, _ = seen(model, row)
        inputs.append(x)
        targets.append(y)
    x, y = torch.cat(inputs), torch.cat(targets)
    estimated = copy.deepcopy(model.model.layers[LAYER].mlp.down_proj)  # type: ignore[union-attr]
    estimated.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(estimated.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(20):
        for rows in torch.randperm(len(x), generator=rng).split(64):
            loss = mse_loss(estimated(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return estimated.weight.detach()


@pytest.fixture
def sides() -> tuple[Prompts, Prompts, Prompts]:
    return prompts(0, 8), prompts(1, 20), prompts(2, 12)


def topic(sides: tuple[Prompts, Prompts, Prompts]) -> tuple[Topic, tuple[Batch, ...]]:
    forget, retain, reference = sides
    found = Topic(
        name="t", batches=(batch(forget[:5]), batch(forget[5:])), reference=(batch(reference[:7]), batch(reference[7:]))
    )
    return found, (batch(retain[:9]), batch(retain[9:]))


def layers_of(model: PreTrainedModel) -> LayerSlice:
    return LayerSlice(model, LAYER, LAYER + 1, trainable_names(model, LAYER))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_the_pooled_solver_gives_the_published_weight(tiny_model: Any, family: str, sides: Any) -> None:
    model = tiny_model(family)
    expected = naive(model, *sides, seed=0)
    layers = layers_of(model)
    forget, retain = topic(sides)
    rng = torch.Generator().manual_seed(0)
    x, residual = collect_rows(layers, LUNAR(steering_coeff=C), (forget,), retain, rng)
    found = matrix(layers) + Recipe().fit(matrix(layers), x, residual, rng).delta
    assert (expected - matrix(layers)).abs().max() > 0.02
    # Padded batches sum in another order than single prompts, and Adam divides by small numbers.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_ridge_ends_lower_than_the_published_recipe_on_its_own_loss(tiny_model: Any, sides: Any) -> None:
    """The recipe's plain mean over rows is the ridge objective with alpha = retain rows / forget rows."""
    model = tiny_model("llama")
    layers = layers_of(model)
    forget, retain = topic(sides)
    method = LUNAR(steering_coeff=C)
    rng = torch.Generator().manual_seed(0)
    state = method.prepare(layers, forget, rng)
    of_forget, _ = forget_moments(layers, method, forget.batches, state)
    of_retain = retain_moments(layers, retain)
    alpha = of_retain.tokens / of_forget.tokens
    term = Term(moments=of_forget, coefficient=C)

    def loss(delta: Tensor) -> float:
        forget_loss, retain_loss = losses(delta.double(), [term], [of_retain])
        return forget_loss + alpha * retain_loss

    published = naive(model, *sides, seed=0) - matrix(layers)
    assert loss(solve([term], [of_retain], alpha=alpha, lam=1e-6).delta) < loss(published)


def test_the_direction_is_the_published_one(tiny_model: Any, sides: Any) -> None:
    model = tiny_model("llama")
    forget, _, reference = sides
    means = [torch.stack([seen(model, row)[2][-1].double() for row in rows]).mean(0) for rows in (reference, forget)]
    state = LUNAR().prepare(layers_of(model), topic(sides)[0], torch.Generator())
    torch.testing.assert_close(state["length"] * state["direction"], (means[0] - means[1]).float(), rtol=0, atol=1e-6)
