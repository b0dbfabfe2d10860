import math
from typing import Any

import pytest
import torch

from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.directions import DirectionLaw, random_unit
from lethe.methods.rmu import RMU
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.types import Activation, State, Topic


@pytest.fixture
def layers(tiny_model: Any) -> LayerSlice:
    model = tiny_model()
    return LayerSlice(model, 1, 4, trainable_names(model, 1))


@pytest.fixture
def topic(tiny_batch: Any) -> Topic:
    return Topic(name="t", batches=tuple(tiny_batch((9, 5, 7), seed=i, count="no-first") for i in range(3)))


@pytest.fixture
def frozen(layers: LayerSlice, topic: Topic) -> Activation:
    return layers.record(topic.batches[1]).frozen


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- directions


def test_uniform_directions_crowd_in_one_orthant_and_gaussian_ones_do_not() -> None:
    source = rng()
    uniform = [random_unit(4096, "uniform", source) for _ in range(2)]
    gaussian = [random_unit(4096, "gaussian", source) for _ in range(2)]

    assert (uniform[0] @ uniform[1]).item() == pytest.approx(0.75, abs=0.02)
    assert (uniform[0] @ torch.full((4096,), 1 / 64)).item() == pytest.approx(math.sqrt(0.75), abs=0.02)
    assert (gaussian[0] @ gaussian[1]).item() == pytest.approx(0, abs=0.05)
    assert (uniform[0] >= 0).all()
    for direction in (*uniform, *gaussian):
        assert direction.dtype == torch.float32
        assert direction.norm().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("law", ["uniform", "gaussian"])
def test_a_direction_is_its_seed(law: DirectionLaw) -> None:
    torch.manual_seed(5)
    first = random_unit(64, law, rng())
    torch.manual_seed(6)

    assert torch.equal(random_unit(64, law, rng()), first)
    assert not torch.equal(random_unit(64, law, rng(1)), first)


# --- RMU


def test_rmu_steers_every_token_to_c_times_u(layers: LayerSlice, topic: Topic, frozen: Activation) -> None:
    method = RMU(steering_coeff=6.5)

    state = method.prepare(layers, topic, rng())
    target = method.forget_target(frozen, state)

    assert torch.equal(state["direction"], random_unit(32, "uniform", rng()))
    assert torch.equal(target, (6.5 * state["direction"])[None, None])
    assert method.retain_target(frozen, rng()) is frozen.h
    assert method.update(frozen, state) is state


# --- Adaptive RMU


def target_lengths(method: AdaptiveRMU, frozen: Activation, state: State) -> torch.Tensor:
    """The factor of u at every token; the target must be a multiple of u."""
    target = method.forget_target(frozen, state).expand_as(frozen.h)
    lengths = target @ state["direction"]
    torch.testing.assert_close(target, lengths[..., None] * state["direction"])
    return lengths


def test_first_batch_takes_the_mean_norm_of_the_topics_first_batch(
    layers: LayerSlice, topic: Topic, frozen: Activation
) -> None:
    method = AdaptiveRMU(beta=5.0, norm="first-batch")
    first = layers.record(topic.batches[0]).frozen

    lengths = target_lengths(method, frozen, method.prepare(layers, topic, rng()))

    torch.testing.assert_close(lengths, (5 * first.norms()[first.mask].mean()).expand_as(lengths))


def test_first_batch_is_measured_on_the_current_model(layers: LayerSlice, topic: Topic, frozen: Activation) -> None:
    method = AdaptiveRMU(beta=5.0, norm="first-batch")
    with torch.no_grad():
        for parameter in layers.trained.values():
            parameter *= 5
        recording = layers.record(topic.batches[0])
        current = Activation(h=layers(recording), mask=recording.batch.mask)

    lengths = target_lengths(method, frozen, method.prepare(layers, topic, rng()))

    torch.testing.assert_close(lengths[0, 0], 5 * current.norms()[current.mask].mean())
    assert (current.norms().mean() - recording.frozen.norms().mean()).abs() > 0.01


def test_token_takes_each_tokens_own_norm(layers: LayerSlice, topic: Topic, frozen: Activation) -> None:
    method = AdaptiveRMU(beta=2.0, norm="token")

    lengths = target_lengths(method, frozen, method.prepare(layers, topic, rng()))

    torch.testing.assert_close(lengths, 2 * frozen.h.norm(dim=-1))


def test_sample_takes_the_mean_norm_of_each_row(layers: LayerSlice, topic: Topic, frozen: Activation) -> None:
    method = AdaptiveRMU(beta=2.0, norm="sample")

    lengths = target_lengths(method, frozen, method.prepare(layers, topic, rng()))

    for row in range(3):
        expected = 2 * frozen.h[row][frozen.mask[row]].norm(dim=-1).mean()
        torch.testing.assert_close(lengths[row], expected.expand_as(lengths[row]))


def test_running_takes_the_mean_over_the_batches_seen(layers: LayerSlice, topic: Topic) -> None:
    method = AdaptiveRMU(beta=3.0, norm="running")
    state = method.prepare(layers, topic, rng())
    means: list[torch.Tensor] = []
    for batch in topic.batches:
        frozen = layers.record(batch).frozen
        means.append(frozen.norms()[frozen.mask].mean())

        state = method.update(frozen, state)

        lengths = target_lengths(method, frozen, state)
        torch.testing.assert_close(lengths, (3 * torch.stack(means).mean()).expand_as(lengths))


@pytest.mark.parametrize("norm", ["first-batch", "running", "sample", "token"])
@pytest.mark.parametrize("junk", [1e6, math.nan])
def test_what_stands_on_padding_sets_no_length(
    layers: LayerSlice, topic: Topic, frozen: Activation, norm: Any, junk: float
) -> None:
    method = AdaptiveRMU(norm=norm)
    state = method.prepare(layers, topic, rng())
    dirty = Activation(h=frozen.h.masked_fill(~frozen.mask[..., None], junk), mask=frozen.mask)

    def target(activation: Activation) -> torch.Tensor:
        return method.forget_target(activation, method.update(activation, state)).expand_as(frozen.h)[frozen.mask]

    torch.testing.assert_close(target(dirty), target(frozen))


@pytest.mark.parametrize("norm", ["first-batch", "running", "sample", "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_targets_have_the_models_number_type_and_state_is_fp32(
    layers: LayerSlice, topic: Topic, frozen: Activation, norm: Any, dtype: torch.dtype
) -> None:
    narrow = Activation(h=frozen.h.to(dtype), mask=frozen.mask)
    for method in (RMU(), AdaptiveRMU(norm=norm)):
        state = method.update(narrow, method.prepare(layers, topic, rng()))

        assert method.forget_target(narrow, state).dtype == dtype
        assert {value.dtype for value in state.values()} == {torch.float32}


# --- as published


def test_as_published_undoes_only_what_the_authors_code_has_hard_wired() -> None:
    assert RMU(direction="gaussian", steering_coeff=3.0, alpha=7.0).as_published() == RMU(steering_coeff=3.0, alpha=7.0)
    assert AdaptiveRMU(direction="gaussian", norm="token", beta=3.0, alpha=7.0).as_published() == AdaptiveRMU(
        norm="first-batch", direction="uniform", beta=3.0, alpha=7.0
    )


def test_the_defaults_are_the_papers_settings() -> None:
    assert (RMU().steering_coeff, RMU().alpha) == (6.5, 1200.0)
    assert (AdaptiveRMU().beta, AdaptiveRMU().alpha) == (5.0, 1200.0)
    assert RMU() == RMU().as_published()
    assert AdaptiveRMU() == AdaptiveRMU().as_published()
