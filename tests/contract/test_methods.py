"""What every method promises, tried on each one that is found: a new file in methods/ needs no test of its own here."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from tests.contract.documented import explained
from torch import Tensor
from transformers import PreTrainedModel

from lethe import methods
from lethe.data.batches import Schedule
from lethe.methods.protocol import Method, Side, SteeringMethod, TokenMethod
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model
from lethe.model.losses import masked_mse
from lethe.model.patch import Patch
from lethe.model.slice import LayerSlice
from lethe.model.token_view import TokenView
from lethe.model.view import View
from lethe.runs import config_file as configs
from lethe.runs.config import RunConfig
from lethe.runs.defaults import defaults
from lethe.solvers.gradient import Gradient
from lethe.solvers.training_state import Checkpoint
from lethe.suites.builtin import Builtin
from lethe.system.plugins import discover, kebab
from lethe.types import Activation, Batch, HistoryRow, State, Topic

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
    if issubclass(kind, SteeringMethod)
    for noise in ("target", "input")
}
VARIANTS |= {
    f"{name} that reads retain text and keeps its {kept}": kind(alpha=1.0, retain_with=kept)
    for name, kind in METHODS.items()
    if issubclass(kind, TokenMethod)
    for kept in ("cross-entropy", "kl")
}
"""Each method by default, with each other choice of a setting that has choices, those that steer with RNA's noise, and
those that see tokens with each way to keep retain text."""
STEERING = {name: method for name, method in VARIANTS.items() if isinstance(method, SteeringMethod)}
TOKENS = {name: method for name, method in VARIANTS.items() if isinstance(method, TokenMethod)}
LAYER = 3
TRAINED = (1, 2, 3)

TinyModel = Callable[..., PreTrainedModel]
TinyBatch = Callable[..., Batch]


@pytest.fixture(params=METHODS)
def kind(request: pytest.FixtureRequest) -> type[Method]:
    return METHODS[request.param]


@pytest.fixture(params=VARIANTS)
def method(request: pytest.FixtureRequest) -> Method:
    return VARIANTS[request.param]


@pytest.fixture(params=STEERING)
def steering(request: pytest.FixtureRequest) -> SteeringMethod:
    return STEERING[request.param]


@pytest.fixture(params=TOKENS)
def of_tokens(request: pytest.FixtureRequest) -> TokenMethod:
    return TOKENS[request.param]


@pytest.fixture
def view(method: Method, tiny_model: TinyModel) -> View[Any, Any]:
    return view_of(method, tiny_model())


@pytest.fixture
def layers(tiny_model: TinyModel) -> LayerSlice:
    return cut(tiny_model())


@pytest.fixture
def tokens(tiny_model: TinyModel) -> TokenView:
    return TokenView(tiny_model(), names(tiny_model()))


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


def names(model: PreTrainedModel) -> tuple[str, ...]:
    return sum((trainable_names(model, layer) for layer in TRAINED), ())


def cut(model: PreTrainedModel) -> LayerSlice:
    return LayerSlice(model, TRAINED[0], LAYER + 1, names(model))


def view_of(method: Method, model: PreTrainedModel) -> View[Any, Any]:
    """What the method sees of a model."""
    return cut(model) if method.view == "activations" else TokenView(model, names(model))


def side(view: View[Any, Any], batch: Batch) -> Side[Any]:
    """One side of a step, as the solver shows it."""
    recording = view.record(batch)
    return Side(batch=recording.batch, frozen=recording.frozen, now=view.see(recording))


def seen(reading: Any) -> Tensor:
    """What a view shows, as one tensor."""
    return reading.h if isinstance(reading, Activation) else reading.of_tokens


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(
    view: View[Any, Any],
    method: Method,
    topic: Topic,
    retain: Batch,
    *,
    steps: int = 10,
    on_row: Callable[[HistoryRow], None] = lambda row: None,
) -> State:
    """Train on the same few batches again and again; what the method knows of the topic in the end."""
    batches = tuple(topic.batches[step % len(topic.batches)] for step in range(steps))
    plan = Schedule(topics=(dataclasses.replace(topic, batches=batches),), retain=(retain,) * steps, steps=steps)
    found: list[Checkpoint] = []
    Gradient(lr=1e-3).train(view, method, plan, generator(), on_checkpoint=found.append, on_row=on_row)
    return found[-1].states[topic.name]


def loss(view: View[Any, Any], method: Method, state: State, topic: Topic, retain: Batch) -> float:
    """The method's own objective on all batches, without noise, which has no part in the expected optimum."""
    if isinstance(method, SteeringMethod):
        method = dataclasses.replace(method, nu=0.0)
    with torch.no_grad():
        total = method.alpha * method.retain_loss(side(view, retain), state, generator()).loss.item()
        for batch in topic.batches:
            total += method.forget_loss(side(view, batch), state).loss.item()
    return total


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_there_are_methods() -> None:
    assert {"rmu", "adaptive-rmu", "grad-diff", "finetune"} <= set(METHODS)
    assert {"rmu", "adaptive-rmu"} <= set(STEERING)
    assert {"grad-diff", "finetune"} <= set(TOKENS)


# What it is


def test_it_is_a_frozen_dataclass_with_a_default_for_every_setting(kind: type[Method]) -> None:
    method = kind()
    assert isinstance(method, SteeringMethod if kind.view == "activations" else TokenMethod)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert kind() == method


def test_it_says_what_it_does_and_where_it_comes_from(kind: type[Method]) -> None:
    assert (inspect.getdoc(kind) or "").endswith(".")
    assert "arXiv" in kind.source or "http" in kind.source or any(c.isdigit() for c in kind.source)


def test_every_setting_is_explained(kind: type[Method]) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= explained(kind)


def test_what_suits_the_built_in_model_are_settings_of_it(kind: type[Method]) -> None:
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


def test_as_published_is_a_method_of_the_same_kind(kind: type[Method]) -> None:
    published = kind().as_published()
    assert type(published) is kind
    assert published.as_published() == published


def test_its_settings_survive_config_yaml(kind: type[Method], tmp_path: Path) -> None:
    method = dataclasses.replace(kind(), alpha=3.25)
    config = RunConfig.of(model="some/model", forget=("a.jsonl", "b.txt"), forget_questions=Path("q.csv"), out=tmp_path)
    written = yaml.safe_dump(configs.plain(method, config), sort_keys=False, allow_unicode=True)
    (tmp_path / "config.yaml").write_text(written, encoding="utf-8")
    assert configs.read_config(tmp_path / "config.yaml") == (method, config)


# What it finds


def test_the_same_seed_finds_the_same(method: Method, view: View[Any, Any], topic: Topic) -> None:
    torch.manual_seed(1)
    first = method.prepare(view, topic, generator())
    torch.manual_seed(2)
    assert equal(first, method.prepare(view, topic, generator()))


def test_another_seed_finds_another_direction(method: Method, view: View[Any, Any], topic: Topic) -> None:
    rng = generator()
    state = method.prepare(view, topic, rng)
    other = method.prepare(view, topic, generator(1))
    draws = not torch.equal(rng.get_state(), generator().get_state())
    assert draws is not equal(state, other)
    # What has a law for its direction draws one.
    assert draws or not any(field.name == "direction" for field in dataclasses.fields(method))
    if "direction" in state:
        assert state["direction"].shape == (view.d_model,)
        assert state["direction"].norm().item() == pytest.approx(1, abs=1e-5)


def test_finding_moves_no_weight(method: Method, view: View[Any, Any], topic: Topic) -> None:
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    state = method.prepare(view, topic, generator())
    method.update(view.record(topic.batches[0]).frozen, state)
    assert equal(before, dict(view.model.state_dict()))
    assert not any(value.requires_grad for value in state.values())


def test_what_it_found_survives_a_checkpoint(
    method: Method, view: View[Any, Any], topic: Topic, tmp_path: Path
) -> None:
    rng = generator()
    state = method.update(view.record(topic.batches[0]).frozen, method.prepare(view, topic, rng))
    Checkpoint(step=3, tensors={}, states={"a/b": state}, rng=rng).save(tmp_path / "checkpoint")
    loaded = Checkpoint.load(tmp_path / "checkpoint")
    assert equal(loaded.states["a/b"], state)
    forget = side(view, topic.batches[1])
    read = loaded.states["a/b"]
    assert torch.equal(method.forget_loss(forget, read).loss, method.forget_loss(forget, state).loss)
    if isinstance(method, SteeringMethod):
        assert torch.equal(method.forget_target(forget.frozen, read), method.forget_target(forget.frozen, state))
    assert torch.equal(loaded.rng.get_state(), rng.get_state())


# Its targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_targets_fit_the_activation(
    steering: SteeringMethod, dtype: torch.dtype, tiny_model: TinyModel, topic: Topic
) -> None:
    layers = cut(tiny_model(dtype=dtype))
    frozen = layers.record(topic.batches[0]).frozen
    state = steering.update(frozen, steering.prepare(layers, topic, generator()))
    for target in (steering.forget_target(frozen, state), steering.retain_target(frozen, generator())):
        assert target.dtype == dtype
        assert target.broadcast_to(frozen.h.shape)[frozen.mask].isfinite().all()
        assert not target.requires_grad


def test_asking_for_targets_changes_nothing(steering: SteeringMethod, layers: LayerSlice, topic: Topic) -> None:
    frozen = layers.record(topic.batches[0]).frozen
    h, mask = frozen.h.clone(), frozen.mask.clone()
    state = steering.update(frozen, steering.prepare(layers, topic, generator()))
    before = {name: value.clone() for name, value in state.items()}
    steering.forget_target(frozen, state)
    steering.retain_target(frozen, generator())
    assert torch.equal(frozen.h, h)
    assert torch.equal(frozen.mask, mask)
    assert equal(state, before)


def test_padding_changes_no_target_of_a_counted_token(
    steering: SteeringMethod, layers: LayerSlice, topic: Topic
) -> None:
    frozen = layers.record(topic.batches[0]).frozen
    noisy = Activation(h=torch.where(frozen.mask[..., None], frozen.h, 1e6), mask=frozen.mask)
    prepared = steering.prepare(layers, topic, generator())
    targets = [
        steering.forget_target(seen, steering.update(seen, prepared)).broadcast_to(seen.h.shape)[seen.mask]
        for seen in (frozen, noisy)
    ]
    torch.testing.assert_close(targets[0], targets[1], rtol=0, atol=0)


def test_what_it_keeps_stays_where_it_was_unless_it_says_otherwise(
    steering: SteeringMethod, layers: LayerSlice, retain: Batch
) -> None:
    if type(steering).retain_target is not SteeringMethod.retain_target:
        return
    frozen = layers.record(retain).frozen
    kept = steering.retain_target(frozen, generator())
    if steering.nu == 0 or steering.noise == "input":
        assert torch.equal(kept, frozen.h)
    else:
        assert (kept - frozen.h).std().item() == pytest.approx(steering.nu, rel=0.15)
        assert torch.equal(kept, steering.retain_target(frozen, generator()))
        assert not torch.equal(kept, steering.retain_target(frozen, generator(1)))


def test_its_forget_target_is_linear_in_its_coefficient(
    steering: SteeringMethod, layers: LayerSlice, topic: Topic
) -> None:
    def target(coefficient: float) -> Tensor:
        scaled = dataclasses.replace(steering, **{steering.coefficient: coefficient})
        frozen = layers.record(topic.batches[0]).frozen
        state = scaled.update(frozen, scaled.prepare(layers, topic, generator()))
        return scaled.forget_target(frozen, state).broadcast_to(frozen.h.shape)[frozen.mask]

    at_0, at_1, at_3 = map(target, (0.0, 1.0, 3.0))
    assert not torch.equal(at_0, at_1)
    torch.testing.assert_close(at_3, at_0 + 3 * (at_1 - at_0))


def test_its_losses_are_the_distances_to_its_targets(
    steering: SteeringMethod, layers: LayerSlice, topic: Topic, retain: Batch
) -> None:
    state = train(layers, steering, topic, retain, steps=2)
    forget, kept = side(layers, topic.batches[0]), side(layers, retain)
    for found, shown, target in (
        (steering.forget_loss(forget, state), forget, steering.forget_target(forget.frozen, state)),
        (steering.retain_loss(kept, state, generator()), kept, steering.retain_target(kept.frozen, generator())),
    ):
        assert torch.equal(found.loss, masked_mse(shown.now.h, target, shown.batch.mask))
        assert found.loss > 0


# Its losses of tokens


def test_asking_for_losses_of_tokens_changes_nothing(
    of_tokens: TokenMethod, tokens: TokenView, topic: Topic, retain: Batch
) -> None:
    forget, kept = side(tokens, topic.batches[0]), side(tokens, retain)
    state = of_tokens.update(forget.frozen, of_tokens.prepare(tokens, topic, generator()))
    shown = [reading.of_tokens.clone() for one in (forget, kept) for reading in (one.frozen, one.now)]
    before = {name: value.clone() for name, value in state.items()}
    weights = {name: value.clone() for name, value in tokens.model.state_dict().items()}
    of_tokens.forget_loss(forget, state)
    of_tokens.retain_loss(kept, state, generator())
    found = [reading.of_tokens for one in (forget, kept) for reading in (one.frozen, one.now)]
    assert all(map(torch.equal, found, shown))
    assert equal(state, before)
    assert equal(weights, dict(tokens.model.state_dict()))


def test_padding_changes_no_loss_of_tokens(
    of_tokens: TokenMethod, tokens: TokenView, topic: Topic, retain: Batch
) -> None:
    state = train(tokens, of_tokens, topic, retain, steps=2)

    def losses(padding: int) -> tuple[Tensor, Tensor]:
        forget, kept = (
            side(
                tokens,
                dataclasses.replace(batch, input_ids=batch.input_ids.masked_fill(~batch.attention_mask, padding)),
            )
            for batch in (topic.batches[0], retain)
        )
        return of_tokens.forget_loss(forget, state).loss, of_tokens.retain_loss(kept, state, generator()).loss

    torch.testing.assert_close(losses(2), losses(50), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_losses_of_tokens_are_finite_and_reach_what_moves(
    of_tokens: TokenMethod, dtype: torch.dtype, tiny_model: TinyModel, topic: Topic, retain: Batch
) -> None:
    tokens = TokenView(tiny_model(dtype=dtype), names(tiny_model()))
    forget, kept = side(tokens, topic.batches[0]), side(tokens, retain)
    state = of_tokens.update(forget.frozen, of_tokens.prepare(tokens, topic, generator()))
    for term in (of_tokens.forget_loss(forget, state), of_tokens.retain_loss(kept, state, generator())):
        assert term.loss.dtype == torch.float32
        gradients = torch.autograd.grad(term.loss, list(tokens.trained.values()))
        assert all(value.isfinite().all() for value in (term.loss, *gradients, *term.measures.values()))


def test_what_it_keeps_is_what_it_says(of_tokens: TokenMethod, tokens: TokenView, topic: Topic, retain: Batch) -> None:
    if type(of_tokens).retain_loss is not TokenMethod.retain_loss:
        return
    untouched = of_tokens.retain_loss(side(tokens, retain), {}, generator()).loss.item()
    plan = dataclasses.replace(of_tokens, alpha=0.0)
    train(tokens, plan, topic, retain, steps=5)
    moved = side(tokens, retain)
    found = of_tokens.retain_loss(moved, {}, generator()).loss.item()
    counted = retain.mask & moved.now.mask
    with torch.no_grad():
        logits = tokens.model(retain.input_ids, retain.attention_mask.long(), use_cache=False).logits
        now = logits[:, :-1].log_softmax(-1)
        with tokens.untouched():
            logits = tokens.model(retain.input_ids, retain.attention_mask.long(), use_cache=False).logits
        frozen = logits[:, :-1].log_softmax(-1)
    if of_tokens.retain_with == "kl":
        expected = (frozen.exp() * (frozen - now)).sum(-1)[counted[:, 1:]].mean().item()
        assert untouched == 0
        assert found > 0
    else:
        expected = -now.gather(-1, retain.input_ids[:, 1:, None])[..., 0][counted[:, 1:]].mean().item()
        assert untouched != found
    assert found == pytest.approx(expected, rel=1e-4)


# What it does to a model


def test_it_comes_nearer_to_its_own_targets(method: Method, view: View[Any, Any], topic: Topic, retain: Batch) -> None:
    state = train(view, method, topic, retain)
    after = loss(view, method, state, topic, retain)
    for name, parameter in view.trained.items():
        parameter.data.copy_(view.originals[name])
    assert after < loss(view, method, state, topic, retain)


def test_it_moves_the_named_matrices_and_nothing_else(
    method: Method, view: View[Any, Any], topic: Topic, retain: Batch
) -> None:
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    train(view, method, topic, retain, steps=2)
    moved = {name for name, value in view.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in TRAINED}
    with view.untouched():
        assert equal(before, dict(view.model.state_dict()))


def test_the_same_seed_gives_the_same_weights(
    method: Method, tiny_model: TinyModel, topic: Topic, retain: Batch
) -> None:
    runs = [view_of(method, tiny_model()) for _ in range(2)]
    for global_seed, view in enumerate(runs):
        torch.manual_seed(global_seed)
        train(view, method, topic, retain, steps=3)
    assert equal(runs[0].delta(), runs[1].delta())


def test_its_patch_gives_the_trained_activations(
    method: Method, tiny_model: TinyModel, topic: Topic, retain: Batch, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    view = view_of(method, load_model(base, layers=LAYER + 1 if method.view == "activations" else None))
    train(view, method, topic, retain, steps=3)
    about = configs.plain(method, RunConfig.of(model=str(base), layer=LAYER))
    Patch.from_parameters(
        view.model, view.delta(), base=base, method=configs.method_name(method), config=about, versions={}
    ).save(tmp_path / "patch.safetensors")

    whole = load_model(base)
    Patch.load(tmp_path / "patch.safetensors").apply_in_memory(whole)
    with torch.no_grad():
        trained = seen(view.see(view.record(retain)))
    assert torch.equal(seen(view_of(method, whole).record(retain).frozen), trained)
    assert not torch.equal(seen(view.record(retain).frozen), trained)


def test_a_progress_bar_can_show_what_it_measures(
    method: Method, view: View[Any, Any], topic: Topic, retain: Batch
) -> None:
    rows: list[HistoryRow] = []
    train(view, method, topic, retain, steps=2, on_row=rows.append)
    assert all(math.isfinite(value) for row in rows for value in row.measures.values())
    assert (rows[0].retain_loss == rows[1].retain_loss == 0) or method.reads_retain
    assert all(bool(method.shown.format(**row.measures)) is bool(method.shown) for row in rows)
