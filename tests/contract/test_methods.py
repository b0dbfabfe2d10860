"""What every method promises, tried on each one that is found: a new file in methods/ needs no test of its own here."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
import yaml
from tests.contract.documented import explained
from torch import Tensor
from transformers import PreTrainedModel

from lethe import methods
from lethe.data.batches import Schedule
from lethe.methods.protocol import SteeringMethod
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model
from lethe.model.losses import masked_mse
from lethe.model.patch import Patch
from lethe.model.slice import LayerSlice
from lethe.runs import config_file as configs
from lethe.runs.config import RunConfig
from lethe.runs.defaults import defaults
from lethe.solvers.gradient import Gradient
from lethe.solvers.training_state import Checkpoint
from lethe.suites.builtin import Builtin
from lethe.system.plugins import discover, kebab
from lethe.types import Activation, Batch, State, Topic

METHODS = discover(methods)
VARIANTS = {name: kind() for name, kind in METHODS.items()} | {
    f"{name} {field.name}={choice}": kind(**{field.name: choice})
    for name, kind in METHODS.items()
    for field in dataclasses.fields(kind)
    if get_origin(field.type) is Literal
    for choice in get_args(field.type)
    if choice != field.default
}
VARIANTS |= {
    f"{name} with noise on its {noise}": kind(nu=0.01, alpha=10.0, noise=noise)
    for name, kind in METHODS.items()
    for noise in ("target", "input")
}
"""Each method by default, with each other choice of a setting that has choices, and with RNA's noise."""
LAYER = 3
TRAINED = (1, 2, 3)

TinyModel = Callable[..., PreTrainedModel]
TinyBatch = Callable[..., Batch]


@pytest.fixture(params=METHODS)
def kind(request: pytest.FixtureRequest) -> type[SteeringMethod]:
    return METHODS[request.param]


@pytest.fixture(params=VARIANTS)
def method(request: pytest.FixtureRequest) -> SteeringMethod:
    return VARIANTS[request.param]


@pytest.fixture
def layers(tiny_model: TinyModel) -> LayerSlice:
    return cut(tiny_model())


@pytest.fixture
def topic(tiny_batch: TinyBatch) -> Topic:
    return Topic(
        name="hazard",
        batches=(tiny_batch(count="no-first"), tiny_batch(seed=1, count="no-first")),
        reference=(tiny_batch(seed=3), tiny_batch((4, 8), seed=4)),
    )


@pytest.fixture
def retain(tiny_batch: TinyBatch) -> Batch:
    return tiny_batch(seed=2, side="left", count="no-first")


def cut(model: PreTrainedModel) -> LayerSlice:
    return LayerSlice(model, TRAINED[0], LAYER + 1, sum((trainable_names(model, layer) for layer in TRAINED), ()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(layers: LayerSlice, method: SteeringMethod, topic: Topic, retain: Batch, *, steps: int = 10) -> State:
    """Train on the same few batches again and again; what the method knows of the topic in the end."""
    batches = tuple(topic.batches[step % len(topic.batches)] for step in range(steps))
    plan = Schedule(topics=(dataclasses.replace(topic, batches=batches),), retain=(retain,) * steps, steps=steps)
    found: list[Checkpoint] = []
    Gradient(lr=1e-3).train(layers, method, plan, generator(), on_checkpoint=found.append)
    return found[-1].states[topic.name]


def loss(layers: LayerSlice, method: SteeringMethod, state: State, topic: Topic, retain: Batch) -> float:
    """The method's own objective on all batches, without noise, which has no part in the expected optimum."""
    method = dataclasses.replace(method, nu=0.0)
    kept = layers.record(retain)
    with torch.no_grad():
        h = layers(kept)
        total = method.alpha * masked_mse(h, method.retain_target(kept.frozen, generator()), kept.batch.mask).item()
        for batch in topic.batches:
            seen = layers.record(batch)
            total += masked_mse(layers(seen), method.forget_target(seen.frozen, state), seen.batch.mask).item()
    return total


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_there_are_methods() -> None:
    assert {"rmu", "adaptive-rmu"} <= set(METHODS)


# What it is


def test_it_is_a_frozen_dataclass_with_a_default_for_every_setting(kind: type[SteeringMethod]) -> None:
    method = kind()
    assert isinstance(method, SteeringMethod)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert kind() == method


def test_it_says_what_it_does_and_where_it_comes_from(kind: type[SteeringMethod]) -> None:
    assert (inspect.getdoc(kind) or "").endswith(".")
    assert "arXiv" in kind.source or "http" in kind.source or any(c.isdigit() for c in kind.source)


def test_every_setting_is_explained(kind: type[SteeringMethod]) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= explained(kind)


def test_what_suits_the_built_in_model_are_settings_of_it(kind: type[SteeringMethod]) -> None:
    suited = Builtin.suits_methods.get(kebab(kind.__name__), {})
    own = {field.name for field in dataclasses.fields(kind)}
    of_run = RunConfig.of(model="builtin", **kind.settings).settings().keys()
    assert dataclasses.replace(kind(), **{name: value for name, value in suited.items() if name in own})
    rest = {name: value for name, value in suited.items() if name not in own}
    assert set(rest) <= of_run
    assert RunConfig.of(model="builtin", **{**kind.settings, **rest})
    found, config = defaults(kind, "builtin")
    assert {name: getattr(found, name) for name in own & suited.keys()} == {
        name: value for name, value in suited.items() if name in own
    }
    wanted = {**rest, **kind.settings}
    assert {name: config.settings()[name] for name in wanted} == wanted


def test_as_published_is_a_method_of_the_same_kind(kind: type[SteeringMethod]) -> None:
    published = kind().as_published()
    assert type(published) is kind
    assert published.as_published() == published


def test_its_settings_survive_config_yaml(kind: type[SteeringMethod], tmp_path: Path) -> None:
    method = dataclasses.replace(kind(), alpha=3.25)
    config = RunConfig.of(model="some/model", forget=("a.jsonl", "b.txt"), forget_questions=Path("q.csv"), out=tmp_path)
    written = yaml.safe_dump(configs.plain(method, config), sort_keys=False, allow_unicode=True)
    (tmp_path / "config.yaml").write_text(written, encoding="utf-8")
    assert configs.read_config(tmp_path / "config.yaml") == (method, config)


# What it finds


def test_the_same_seed_finds_the_same(method: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    torch.manual_seed(1)
    first = method.prepare(layers, topic, generator())
    torch.manual_seed(2)
    assert equal(first, method.prepare(layers, topic, generator()))


def test_another_seed_finds_another_direction(method: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    rng = generator()
    state = method.prepare(layers, topic, rng)
    other = method.prepare(layers, topic, generator(1))
    draws = not torch.equal(rng.get_state(), generator().get_state())
    assert draws is not equal(state, other)
    # What has a law for its direction draws one.
    assert draws or not any(field.name == "direction" for field in dataclasses.fields(method))
    if "direction" in state:
        assert state["direction"].shape == (layers.d_model,)
        assert state["direction"].norm().item() == pytest.approx(1, abs=1e-5)


def test_finding_moves_no_weight(method: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    before = {name: value.clone() for name, value in layers.model.state_dict().items()}
    state = method.prepare(layers, topic, generator())
    method.update(layers.record(topic.batches[0]).frozen, state)
    assert equal(before, dict(layers.model.state_dict()))
    assert not any(value.requires_grad for value in state.values())


def test_what_it_found_survives_a_checkpoint(
    method: SteeringMethod, layers: LayerSlice, topic: Topic, tmp_path: Path
) -> None:
    rng = generator()
    state = method.update(layers.record(topic.batches[0]).frozen, method.prepare(layers, topic, rng))
    Checkpoint(step=3, tensors={}, states={"a/b": state}, rng=rng).save(tmp_path / "checkpoint")
    loaded = Checkpoint.load(tmp_path / "checkpoint")
    assert equal(loaded.states["a/b"], state)
    frozen = layers.record(topic.batches[1]).frozen
    assert torch.equal(method.forget_target(frozen, loaded.states["a/b"]), method.forget_target(frozen, state))
    assert torch.equal(loaded.rng.get_state(), rng.get_state())


# Its targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_targets_fit_the_activation(
    method: SteeringMethod, dtype: torch.dtype, tiny_model: TinyModel, topic: Topic
) -> None:
    layers = cut(tiny_model(dtype=dtype))
    frozen = layers.record(topic.batches[0]).frozen
    state = method.update(frozen, method.prepare(layers, topic, generator()))
    for target in (method.forget_target(frozen, state), method.retain_target(frozen, generator())):
        assert target.dtype == dtype
        assert target.broadcast_to(frozen.h.shape)[frozen.mask].isfinite().all()
        assert not target.requires_grad


def test_asking_for_targets_changes_nothing(method: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    frozen = layers.record(topic.batches[0]).frozen
    h, mask = frozen.h.clone(), frozen.mask.clone()
    state = method.update(frozen, method.prepare(layers, topic, generator()))
    before = {name: value.clone() for name, value in state.items()}
    method.forget_target(frozen, state)
    method.retain_target(frozen, generator())
    assert torch.equal(frozen.h, h)
    assert torch.equal(frozen.mask, mask)
    assert equal(state, before)


def test_padding_changes_no_target_of_a_counted_token(method: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    frozen = layers.record(topic.batches[0]).frozen
    noisy = Activation(h=torch.where(frozen.mask[..., None], frozen.h, 1e6), mask=frozen.mask)
    prepared = method.prepare(layers, topic, generator())
    targets = [
        method.forget_target(seen, method.update(seen, prepared)).broadcast_to(seen.h.shape)[seen.mask]
        for seen in (frozen, noisy)
    ]
    torch.testing.assert_close(targets[0], targets[1], rtol=0, atol=0)


def test_what_it_keeps_stays_where_it_was_unless_it_says_otherwise(
    method: SteeringMethod, layers: LayerSlice, retain: Batch
) -> None:
    if type(method).retain_target is not SteeringMethod.retain_target:
        return
    frozen = layers.record(retain).frozen
    kept = method.retain_target(frozen, generator())
    if method.nu == 0 or method.noise == "input":
        assert torch.equal(kept, frozen.h)
    else:
        assert (kept - frozen.h).std().item() == pytest.approx(method.nu, rel=0.15)
        assert torch.equal(kept, method.retain_target(frozen, generator()))
        assert not torch.equal(kept, method.retain_target(frozen, generator(1)))


def test_its_forget_target_is_linear_in_its_coefficient(
    method: SteeringMethod, layers: LayerSlice, topic: Topic
) -> None:
    def target(coefficient: float) -> Tensor:
        scaled = dataclasses.replace(method, **{method.coefficient: coefficient})
        frozen = layers.record(topic.batches[0]).frozen
        state = scaled.update(frozen, scaled.prepare(layers, topic, generator()))
        return scaled.forget_target(frozen, state).broadcast_to(frozen.h.shape)[frozen.mask]

    at_0, at_1, at_3 = map(target, (0.0, 1.0, 3.0))
    assert not torch.equal(at_0, at_1)
    torch.testing.assert_close(at_3, at_0 + 3 * (at_1 - at_0))


# What it does to a model


def test_it_comes_nearer_to_its_own_targets(
    method: SteeringMethod, layers: LayerSlice, topic: Topic, retain: Batch
) -> None:
    state = train(layers, method, topic, retain)
    after = loss(layers, method, state, topic, retain)
    for name, parameter in layers.trained.items():
        parameter.data.copy_(layers.originals[name])
    assert after < loss(layers, method, state, topic, retain)


def test_it_moves_the_named_matrices_and_nothing_else(
    method: SteeringMethod, layers: LayerSlice, topic: Topic, retain: Batch
) -> None:
    before = {name: value.clone() for name, value in layers.model.state_dict().items()}
    train(layers, method, topic, retain, steps=2)
    moved = {name for name, value in layers.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in TRAINED}
    with layers.untouched():
        assert equal(before, dict(layers.model.state_dict()))


def test_the_same_seed_gives_the_same_weights(
    method: SteeringMethod, tiny_model: TinyModel, topic: Topic, retain: Batch
) -> None:
    runs = [cut(tiny_model()) for _ in range(2)]
    for global_seed, layers in enumerate(runs):
        torch.manual_seed(global_seed)
        train(layers, method, topic, retain, steps=3)
    assert equal(runs[0].delta(), runs[1].delta())


def test_its_patch_gives_the_trained_activations(
    method: SteeringMethod, tiny_model: TinyModel, topic: Topic, retain: Batch, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    layers = cut(load_model(base, layers=LAYER + 1))
    train(layers, method, topic, retain, steps=3)
    about = configs.plain(method, RunConfig.of(model=str(base), layer=LAYER))
    Patch.from_parameters(
        layers.model, layers.delta(), base=base, method=configs.method_name(method), config=about, versions={}
    ).save(tmp_path / "patch.safetensors")

    whole = load_model(base)
    Patch.load(tmp_path / "patch.safetensors").apply_in_memory(whole)
    with torch.no_grad():
        trained = layers(layers.record(retain))
    assert torch.equal(cut(whole).record(retain).frozen.h, trained)
    assert not torch.equal(layers.record(retain).frozen.h, trained)
