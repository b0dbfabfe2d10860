"""What every solver promises, tried on each one that is found: a new file in solvers/ needs no test of its own here."""

import dataclasses
import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from tests.contract.documented import explained
from torch import Tensor
from transformers import PreTrainedModel

from lethe import methods, solvers
from lethe.data.batches import Schedule
from lethe.data.text_corpora import TextCorpora
from lethe.errors import UsageError
from lethe.methods.protocol import Method, Side, SteeringMethod, Term
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.model.layers import trainable_names
from lethe.model.losses import masked_mse
from lethe.model.slice import LayerSlice
from lethe.model.token_view import TokenView
from lethe.runs import config_file as configs
from lethe.runs.config import RunConfig
from lethe.runs.solve import solve
from lethe.runs.workspace import Workspace
from lethe.solvers.protocol import Cost, Edit, Problem, Solver, Work
from lethe.system.last import Last
from lethe.system.plugins import discover
from lethe.system.progress import Progress
from lethe.types import Batch, State, Topic

SOLVERS: dict[str, Any] = discover(solvers)
LAYER = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quiet(Method):
    """Makes forget activations small, and has no target for them."""

    source: ClassVar[str] = "made up in 2025 for this test"

    def forget_loss(self, side: Side[Any], state: State) -> Term:
        return Term(loss=side.now.h.to(side.dtype)[side.batch.mask].square().mean())

    def retain_loss(self, side: Side[Any], state: State, rng: torch.Generator) -> Term:
        return Term(loss=masked_mse(side.now.h, side.frozen.h, side.batch.mask))


METHODS: dict[str, Method] = {name: kind() for name, kind in discover(methods).items()}
METHODS |= {
    "noise on the target": RMU(steering_coeff=3.0, alpha=2.0, nu=0.1),
    "noise on the input": RSV(steering_coeff=3.0, nu=0.1, noise="input"),
    "no target": Quiet(),
}
TARGET = RMU(steering_coeff=3.0, alpha=2.0, direction="gaussian")

TinyModel = Callable[..., PreTrainedModel]
TinyBatch = Callable[..., Batch]
MakeWork = Callable[..., Work]


@pytest.fixture(params=SOLVERS)
def kind(request: pytest.FixtureRequest) -> Any:
    return SOLVERS[request.param]


@pytest.fixture
def topics(tiny_batch: TinyBatch) -> tuple[Topic, ...]:
    def topic(name: str, seed: int) -> Topic:
        batches = tuple(tiny_batch((9, 5, 7), seed=seed + i, count="no-first") for i in range(2))
        return Topic(name=name, batches=batches, reference=(tiny_batch(seed=90), tiny_batch((4, 8), seed=91)))

    return topic("hazard", 10), topic("exploit", 20)


@pytest.fixture
def retain(tiny_batch: TinyBatch) -> tuple[Batch, ...]:
    return tuple(tiny_batch(seed=seed, count="no-first") for seed in range(3))


@pytest.fixture
def make_work(topics: tuple[Topic, ...], retain: tuple[Batch, ...]) -> MakeWork:
    """Work on a model: one matrix of layer 3, or of several layers."""

    def make(model: PreTrainedModel, *, trained: tuple[int, ...] = (LAYER,), seed: int = 0, **more: Any) -> Work:
        def schedule(steps: int, accumulate: int) -> Schedule:
            turns = steps * accumulate
            each = [
                dataclasses.replace(topic, batches=tuple(topic.batches[i % 2] for i in range(turns)))
                for topic in topics
            ]
            return Schedule(topics=tuple(each), retain=tuple(retain[i % 3] for i in range(turns)), steps=turns)

        names = {layer: trainable_names(model, layer) for layer in trained}
        return Work(
            name="request",
            seed=seed,
            view=lambda: LayerSlice(model, trained[0], LAYER + 1, sum(names.values(), ())),
            layers=lambda: tuple(LayerSlice(model, layer, layer + 1, names[layer]) for layer in trained),
            schedule=schedule,
            rows=lambda: (topics, retain),
            **{"memo": defaultdict(Last), **more},
        )

    return make


def quick(kind: Any) -> Any:
    """The solver with settings that suit a tiny model."""
    wanted = {"steps": 12, "lr": 1e-2, "lam": 1e-3}
    own = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in wanted.items() if name in own})


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def loss(
    model: PreTrainedModel, values: dict[str, Tensor], topics: tuple[Topic, ...], retain: tuple[Batch, ...]
) -> float:
    """The method's objective on all batches with these weights."""
    layers = LayerSlice(model, LAYER, LAYER + 1, trainable_names(model, LAYER))
    rng = torch.Generator().manual_seed(0)
    total, (kept, sides) = 0.0, (list(map(layers.record, retain)), [])
    for topic in topics:
        state = TARGET.prepare(layers, topic, rng)
        sides += [(layers.record(batch), state) for batch in topic.batches]
    with torch.no_grad():
        for name, parameter in layers.trained.items():
            parameter.copy_(values.get(name, parameter))
        for seen, state in sides:
            total += masked_mse(layers(seen), TARGET.forget_target(seen.frozen, state), seen.batch.mask).item()
        for seen in kept:
            total += TARGET.alpha * masked_mse(layers(seen), seen.frozen.h, seen.batch.mask).item()
    layers.restore()
    return total


def test_there_are_solvers() -> None:
    assert {"gradient", "ridge", "pooled"} <= set(SOLVERS)


# What it is


def test_it_is_a_frozen_dataclass_with_a_default_for_every_setting(kind: Any) -> None:
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert kind() == kind()
    assert hash(kind()) == hash(kind())


def test_it_has_all_that_a_solver_has(kind: Any) -> None:
    wanted = {*Solver.__annotations__, *(name for name in vars(Solver) if not name.startswith("_"))}
    assert wanted >= {"source", "is_one_matrix", "keeps_requests", "accepts", "cost", "solve", "as_published"}
    assert wanted <= set(dir(kind))
    assert isinstance(kind.is_one_matrix, bool)
    assert isinstance(kind.keeps_requests, bool)
    for name in ("accepts", "cost", "solve", "as_published"):
        assert (inspect.getdoc(getattr(kind, name)) or "").strip()


def test_it_says_what_it_does_and_where_it_comes_from(kind: Any) -> None:
    assert (inspect.getdoc(kind) or "").endswith(".")
    assert isinstance(kind.source, str)
    assert len(kind.source.split()) >= 3


def test_every_setting_is_explained(kind: Any) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= explained(kind)


def test_its_settings_are_of_no_other_section(kind: Any) -> None:
    """A setting goes by its name alone."""
    others = RunConfig.of(model="m", solver="pooled").settings().keys()
    assert not {field.name for field in dataclasses.fields(kind)} & others


def test_as_published_is_a_solver_of_the_same_kind(kind: Any) -> None:
    published = kind().as_published()
    assert type(published) is kind
    assert published.as_published() == published


def test_it_survives_config_yaml(kind: Any, tmp_path: Path) -> None:
    config = RunConfig.of(model="some/model", solver=quick(kind), out=tmp_path)
    assert RunConfig.of(model="some/model", solver=config.solver_name).solver == kind()
    written = yaml.safe_dump(configs.plain(RMU(), config), sort_keys=False, allow_unicode=True)
    (tmp_path / "config.yaml").write_text(written, encoding="utf-8")
    assert configs.read_config(tmp_path / "config.yaml") == (RMU(), config)


def test_its_cost_is_known_before_a_weight_is_loaded(kind: Any) -> None:
    def cost(**changes: Any) -> Cost:
        problem: dict[str, Any] = {
            "layers": (700, 700, 700, 700),
            "first": 3,
            "trained": {"w": (32, 64)},
            "d_model": 32,
            "batch_tokens": 96,
            "topics": 2,
            "dtype": torch.float32,
        }
        return kind().cost(Problem(**problem | changes))

    small, large = cost(), cost(trained={"w": (32, 64), "v": (32, 64)}, first=2)
    assert all(math.isfinite(value) and value > 0 for value in (small.nbytes, small.flops))
    assert small.passes >= 1
    assert large.nbytes > small.nbytes
    assert large.flops > small.flops
    assert cost(topics=5).nbytes >= small.nbytes


# What it takes


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_solves_what_it_accepts_and_says_why_not_else(
    kind: Any, method: Method, tiny_model: TinyModel, make_work: MakeWork
) -> None:
    solver, model = quick(kind), tiny_model()
    said = solver.accepts(method)
    if said is None:
        tokens = {"view": lambda: TokenView(model, trainable_names(model, LAYER))} if method.view == "tokens" else {}
        found = solver.solve(method, dataclasses.replace(make_work(model), **tokens))
        assert found.values
        assert all(value.isfinite().all() for value in found.values.values())
        return
    what, _, remedy = said.partition("\n")
    name = RunConfig.of(model="m", solver=solver).solver_name
    assert f"--solver {name}" in what
    assert remedy.startswith("Pass --solver ")
    config = RunConfig.of(model="builtin", solver=solver)
    workspace = Workspace(config.base)
    nothing = TextCorpora(forget={}, retain=[], tokenizer=workspace.tokenizer)
    with pytest.raises(UsageError) as caught:
        solve(method, config, workspace, nothing)
    assert str(caught.value) == said


def test_some_solver_takes_any_method() -> None:
    assert all(any(kind().accepts(method) is None for kind in SOLVERS.values()) for method in METHODS.values())


def test_a_method_with_plain_targets_is_taken_by_all(kind: Any) -> None:
    assert kind().accepts(TARGET) is None


# What it finds


@pytest.mark.parametrize("trained", [(LAYER,), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_finds_values_of_the_trained_matrices_and_leaves_the_model_as_it_was(
    kind: Any, dtype: torch.dtype, trained: tuple[int, ...], tiny_model: TinyModel, make_work: MakeWork
) -> None:
    model = tiny_model(dtype=dtype)
    before = state_of(model)

    found = quick(kind).solve(TARGET, make_work(model, trained=trained))

    assert equal(state_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert isinstance(found, Edit)
    assert found.model is model
    assert found.values.keys() == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in trained}
    for name, value in found.values.items():
        assert (value.shape, value.dtype) == (before[name].shape, before[name].dtype)
        assert value.isfinite().all()
        assert not torch.equal(value, before[name])
        assert not value.requires_grad
        assert value.untyped_storage().data_ptr() != model.get_parameter(name).untyped_storage().data_ptr()


class Broken(Progress):
    """Stops the work at its first sign of life."""

    def advance(self, note: str = "") -> None:
        raise KeyboardInterrupt


def test_interrupted_it_leaves_the_model_as_it_was(kind: Any, tiny_model: TinyModel, make_work: MakeWork) -> None:
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        quick(kind).solve(TARGET, make_work(model, progress=Broken()))
    assert equal(state_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_finds_the_same_and_another_seed_another(
    kind: Any, tiny_model: TinyModel, make_work: MakeWork
) -> None:
    model, memo = tiny_model(), defaultdict(Last)
    torch.manual_seed(1)
    first = quick(kind).solve(TARGET, make_work(model)).values
    torch.manual_seed(2)
    # On the same model, on another like it, and with what an earlier work left to be used again.
    for work in (make_work(model), make_work(tiny_model()), make_work(model, memo=memo), make_work(model, memo=memo)):
        assert equal(quick(kind).solve(TARGET, work).values, first)
    assert not equal(quick(kind).solve(TARGET, make_work(model, seed=1)).values, first)


def test_what_it_remembers_serves_no_other_work(kind: Any, tiny_model: TinyModel, make_work: MakeWork) -> None:
    model, memo = tiny_model(), defaultdict(Last)
    works: list[tuple[SteeringMethod, dict[str, Any]]] = [
        (TARGET, {"rows_key": 0}),
        (dataclasses.replace(TARGET, steering_coeff=6.0), {"rows_key": 0}),
        (dataclasses.replace(TARGET, alpha=0.5), {"rows_key": 0}),
        (dataclasses.replace(TARGET, direction="uniform"), {"rows_key": 0}),
        (TARGET, {"rows_key": 1, "seed": 1}),
        (TARGET, {"rows_key": 0, "trained": (2, LAYER)}),
    ]
    for method, more in works:
        alone = quick(kind).solve(method, make_work(model, **more)).values
        assert equal(quick(kind).solve(method, make_work(model, memo=memo, **more)).values, alone)


def test_its_edit_comes_nearer_to_the_targets(
    kind: Any,
    tiny_model: TinyModel,
    make_work: MakeWork,
    topics: tuple[Topic, ...],
    retain: tuple[Batch, ...],
) -> None:
    model = tiny_model()
    found = quick(kind).solve(TARGET, make_work(model))
    assert loss(model, found.values, topics, retain) < 0.95 * loss(model, {}, topics, retain)
