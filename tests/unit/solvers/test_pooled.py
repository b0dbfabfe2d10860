from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe.errors import DivergedError, EmptyBatchError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.rsv import RSV
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.solvers.one_matrix import matrix, matrix_inputs
from lethe.solvers.pooled import Recipe, collect_rows
from lethe.types import Topic


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layers(tiny_model: Any) -> LayerSlice:
    model = tiny_model()
    return LayerSlice(model, 2, 3, trainable_names(model, 2))


def test_it_is_the_published_loop() -> None:
    x, residual, start = random(150, 10, seed=1), random(150, 4, seed=2), random(4, 10, seed=3)
    layer = torch.nn.Linear(10, 4, bias=False)
    layer.weight.data.copy_(start)
    target = x @ start.T + residual
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    draw, losses = rng(), []
    for _ in range(20):
        seen = 0.0
        order = torch.randperm(150, generator=draw)
        for i in range(0, 150, 64):
            rows = order[i : i + 64]
            loss = (layer(x[rows]) - target[rows]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += loss.item() * len(rows)
        schedule.step()
        losses.append(seen / 150)

    found = Recipe().fit(start, x, residual, rng())

    torch.testing.assert_close(found.delta, layer.weight.detach() - start, rtol=1e-4, atol=1e-5)
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert len(found.losses) == 20


def test_the_loss_falls_and_the_original_matrix_stays_as_it_was() -> None:
    x, start = random(400, 10, seed=1), random(4, 10, seed=3)
    before = start.clone()

    found = Recipe().fit(start, x, 0.1 * x @ random(4, 10, seed=4).T, rng())

    assert found.losses[-1] < 0.1 * found.losses[0]
    assert torch.equal(start, before)


def test_the_same_seed_gives_the_same_edit_and_another_seed_another() -> None:
    given = random(4, 10, seed=3), random(150, 10, seed=1), random(150, 4, seed=2)

    one, again, other = (Recipe(epochs=2).fit(*given, rng(seed)).delta for seed in (0, 0, 1))

    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_matrix_in_bf16_is_trained_in_fp32() -> None:
    given = random(4, 10, seed=3).bfloat16(), random(150, 10, seed=1), random(150, 4, seed=2)

    found = Recipe(epochs=1).fit(*given, rng())

    assert found.delta.dtype == torch.float32
    assert found.delta.abs().max() < 0.1


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    residual = random(150, 4, seed=2)
    residual[7, 1] = torch.inf

    with pytest.raises(DivergedError, match="diverged in epoch 0"):
        Recipe().fit(random(4, 10, seed=3), random(150, 10, seed=1), residual, rng())


@pytest.mark.parametrize("method", [RSV(steering_coeff=4.0), AdaptiveRMU(beta=2.0, norm="token")])
def test_rows_are_the_counted_tokens_of_all_corpora(layers: LayerSlice, tiny_batch: Any, method: Any) -> None:
    forget = [tiny_batch((6, 3), seed=seed, count="no-first") for seed in range(3)]
    topics = [Topic(name="a", batches=tuple(forget[:2])), Topic(name="b", batches=(forget[2],))]
    retain = [tiny_batch((5, 8), seed=9)]

    x, residual = collect_rows(layers, method, topics, retain, rng())

    assert x.shape == (3 * 7 + 13, 64)
    assert residual.shape == (3 * 7 + 13, 32)
    assert torch.equal(x[-13:], matrix_inputs(layers, retain[0])[0])
    assert not residual[-13:].any()
    draw = rng()
    states = [method.prepare(layers, topic, draw) for topic in topics]
    for i, (batch, state) in enumerate(zip(forget, (states[0], states[0], states[1]), strict=True)):
        recording = layers.record(batch)
        expected = (method.forget_target(recording.frozen, state) - recording.frozen.h)[recording.batch.mask]
        torch.testing.assert_close(residual[7 * i : 7 * i + 7], expected)


def test_rows_fit_the_matrix_of_the_model(layers: LayerSlice, tiny_batch: Any) -> None:
    topic = Topic(name="a", batches=(tiny_batch((9, 9), seed=1),))
    x, residual = collect_rows(layers, RSV(steering_coeff=1.0), [topic], [tiny_batch((9, 9), seed=2)], rng())

    found = Recipe(epochs=40).fit(matrix(layers), x, residual, rng())

    assert found.delta.shape == (32, 64)
    assert found.losses[-1] < 0.5 * found.losses[0]


def test_corpora_without_a_counted_token_are_an_error(layers: LayerSlice, tiny_batch: Any) -> None:
    batch = tiny_batch((9, 9), seed=1)
    empty = replace(batch, mask=torch.zeros_like(batch.mask))

    with pytest.raises(EmptyBatchError, match="no token counts"):
        collect_rows(layers, RSV(), [Topic(name="a", batches=(empty,))], [empty], rng())
