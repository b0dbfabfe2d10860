import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe.data.batches import Schedule
from lethe.errors import DivergedError, InvalidValueError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.solvers import gradient
from lethe.solvers.gradient import Gradient
from lethe.solvers.training_state import Checkpoint
from lethe.types import Activation, Batch, HistoryRow, State, Topic

METHOD = RMU(steering_coeff=20.0, alpha=10.0)


@pytest.fixture
def make_layers(tiny_model: Any) -> Any:
    def make(dtype: torch.dtype = torch.float32, of: torch.dtype | None = None) -> LayerSlice:
        """A slice of a tiny model in `dtype`, its weights rounded to `of` first."""
        model = tiny_model(dtype=of or dtype).to(dtype)
        return LayerSlice(model, 1, 4, sum((trainable_names(model, i) for i in (1, 2, 3)), ()))

    return make


def make_schedule(tiny_batch: Any, *, steps: int, topics: int = 1, distinct: int | None = None) -> Schedule:
    """Random batches; after `distinct` of them a corpus starts again."""

    def corpus(seed: int, count: int) -> tuple[Batch, ...]:
        found = [tiny_batch((8, 4, 6), seed=seed + i, count="no-first") for i in range(distinct or count)]
        return tuple(found[i % len(found)] for i in range(count))

    each = math.ceil(steps / topics)
    return Schedule(
        topics=tuple(Topic(name=f"folder/topic {n}", batches=corpus(100 * (n + 1), each)) for n in range(topics)),
        retain=corpus(0, steps),
        steps=steps,
    )


def solve(layers: LayerSlice, schedule: Schedule, method: SteeringMethod = METHOD, **options: Any) -> list[HistoryRow]:
    rows: list[HistoryRow] = []
    seed = options.pop("seed", 0)
    more = {key: options.pop(key) for key in ("resume", "on_checkpoint", "checkpoint_every") if key in options}
    solver = Gradient(**{"lr": 1e-3, **options})
    solver.train(layers, method, schedule, torch.Generator().manual_seed(seed), on_row=rows.append, **more)
    return rows


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- what training does


def test_the_forget_activation_goes_to_its_target_and_the_retain_activation_stays(
    make_layers: Any, tiny_batch: Any
) -> None:
    rows = solve(
        make_layers(), make_schedule(tiny_batch, steps=40, distinct=2), RMU(steering_coeff=5.0, alpha=10.0), lr=1e-2
    )

    first, last = rows[0], rows[-1]
    assert first.measures["forget_norm_mean"] < 1
    assert last.measures["forget_norm_mean"] == pytest.approx(5, abs=0.5)
    assert last.forget_loss < 0.1 * first.forget_loss
    assert last.measures["cos_direction"] > 0.9 > 0.3 > first.measures["cos_direction"]
    assert last.measures["retain_cos_frozen"] > 0.9 > 0.3 > last.measures["forget_cos_frozen"]
    assert [row.step for row in rows] == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_before_the_first_step_the_retain_loss_is_exactly_zero(
    make_layers: Any, tiny_batch: Any, dtype: torch.dtype
) -> None:
    (row,) = solve(make_layers(dtype), make_schedule(tiny_batch, steps=1))

    assert row.retain_loss == 0
    assert row.measures["retain_error"] == 0
    assert row.measures["retain_cos_frozen"] == row.measures["forget_cos_frozen"] == 1
    assert row.forget_loss > 0


def test_the_first_forget_loss_is_that_of_the_formula(make_layers: Any, tiny_batch: Any) -> None:
    layers, schedule = make_layers(), make_schedule(tiny_batch, steps=1)
    frozen = layers.record(schedule.topics[0].batches[0]).frozen
    target = 20.0 * METHOD.prepare(layers, schedule.topics[0], torch.Generator().manual_seed(0))["direction"]

    (row,) = solve(layers, schedule)

    assert row.forget_loss == pytest.approx((frozen.h - target)[frozen.mask].square().mean().item(), rel=1e-6)
    assert row.measures["target_norm"] == pytest.approx(20.0, rel=1e-6)


def test_the_gradient_norm_is_that_of_both_sides_together(make_layers: Any, tiny_batch: Any) -> None:
    layers, schedule = make_layers(), make_schedule(tiny_batch, steps=1)
    method = RMU(steering_coeff=20.0, alpha=3.0, nu=0.5)
    forget, retain = layers.record(schedule.topics[0].batches[0]), layers.record(schedule.retain[0])
    draw = torch.Generator().manual_seed(0)
    target = 20.0 * method.prepare(layers, schedule.topics[0], draw)["direction"]
    kept = method.retain_target(retain.frozen, draw)
    losses = [
        (layers(side) - wanted)[side.batch.mask].square().mean() for side, wanted in ((forget, target), (retain, kept))
    ]
    gradients = torch.autograd.grad(losses[0] + 3.0 * losses[1], list(layers.trained.values()))

    (row,) = solve(layers, schedule, method)

    assert row.measures["gradient"] == pytest.approx(
        torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_named_matrices_changes(make_layers: Any, tiny_batch: Any, dtype: torch.dtype) -> None:
    layers = make_layers(dtype)
    before = {name: value.clone() for name, value in layers.model.state_dict().items()}

    solve(layers, make_schedule(tiny_batch, steps=3), lr=1e-2)

    changed = {name for name, value in layers.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2, 3)}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(make_layers: Any, tiny_batch: Any) -> None:
    schedule = make_schedule(tiny_batch, steps=4, topics=2)
    first, again, other = make_layers(), make_layers(), make_layers()

    rows, rows_again = solve(first, schedule), solve(again, schedule)
    torch.rand(7)  # The global generator has no say.
    solve(other, schedule, seed=1)

    assert same(first.delta(), again.delta())
    assert [row.forget_loss for row in rows] == [row.forget_loss for row in rows_again]
    assert not same(first.delta(), other.delta())


def test_topics_take_turns_and_have_directions_of_their_own(make_layers: Any, tiny_batch: Any) -> None:
    kept: list[dict[str, State]] = []

    rows = solve(
        make_layers(),
        make_schedule(tiny_batch, steps=5, topics=2),
        on_checkpoint=lambda checkpoint: kept.append(dict(checkpoint.states)),
    )

    assert [row.topic for row in rows] == ["folder/topic 0", "folder/topic 1"] * 2 + ["folder/topic 0"]
    first, second = (kept[-1][f"folder/topic {n}"]["direction"] for n in (0, 1))
    assert not torch.equal(first, second)
    assert first.norm().item() == pytest.approx(1)


def test_what_a_method_learns_on_the_way_reaches_its_next_step(make_layers: Any, tiny_batch: Any) -> None:
    schedule = make_schedule(tiny_batch, steps=6, topics=2)
    layers = make_layers()
    recorded = [[layers.record(batch).frozen for batch in topic.batches] for topic in schedule.topics]
    means = [[frozen.norms()[frozen.mask].mean().item() for frozen in topic] for topic in recorded]

    rows = solve(layers, schedule, AdaptiveRMU(beta=3.0, norm="running"))

    for i, row in enumerate(rows):
        seen = means[i % 2][: i // 2 + 1]
        assert row.measures["target_norm"] == pytest.approx(3 * sum(seen) / len(seen), rel=1e-5)


def test_more_padding_changes_no_loss(make_layers: Any, tiny_batch: Any) -> None:
    schedule = make_schedule(tiny_batch, steps=3)

    def wider(batch: Batch) -> Batch:
        def pad(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, 5))

        return Batch(input_ids=pad(batch.input_ids), attention_mask=pad(batch.attention_mask), mask=pad(batch.mask))

    padded = dataclasses.replace(
        schedule,
        topics=tuple(dataclasses.replace(t, batches=tuple(map(wider, t.batches))) for t in schedule.topics),
        retain=tuple(map(wider, schedule.retain)),
    )
    layers, layers_padded = make_layers(), make_layers()

    rows, rows_padded = solve(layers, schedule), solve(layers_padded, padded)

    for row, row_padded in zip(rows, rows_padded, strict=True):
        for name in ("forget_loss", "retain_loss"):
            assert getattr(row_padded, name) == pytest.approx(getattr(row, name), rel=1e-4), name
        for name in ("cos_direction", "retain_error"):
            assert row_padded.measures[name] == pytest.approx(row.measures[name], rel=1e-4), name
        name = "forget_norm_median"
        assert row_padded.measures[name] == pytest.approx(row.measures[name], rel=1e-5)
    for name, value in layers.delta().items():
        torch.testing.assert_close(layers_padded.delta()[name], value, rtol=0, atol=1e-5)


def test_two_accumulated_batches_are_one_of_twice_the_rows(make_layers: Any, tiny_batch: Any) -> None:
    def joined(a: Batch, b: Batch) -> Batch:
        return Batch(
            input_ids=torch.cat([a.input_ids, b.input_ids]),
            attention_mask=torch.cat([a.attention_mask, b.attention_mask]),
            mask=torch.cat([a.mask, b.mask]),
        )

    forget = tuple(tiny_batch((6, 6), seed=i) for i in range(6))
    retain = tuple(tiny_batch((6, 6), seed=50 + i) for i in range(6))
    small = Schedule(topics=(Topic(name="t", batches=forget),), retain=retain, steps=6)
    pairs = [(0, 1), (2, 3), (4, 5)]
    large = Schedule(
        topics=(Topic(name="t", batches=tuple(joined(forget[a], forget[b]) for a, b in pairs)),),
        retain=tuple(joined(retain[a], retain[b]) for a, b in pairs),
        steps=3,
    )
    accumulated, at_once = make_layers(), make_layers()

    rows, rows_at_once = solve(accumulated, small, accumulate=2), solve(at_once, large)

    assert [row.step for row in rows] == [0, 0, 1, 1, 2, 2]
    for (a, b), row in zip(pairs, rows_at_once, strict=True):
        assert (rows[a].forget_loss + rows[b].forget_loss) / 2 == pytest.approx(row.forget_loss, rel=1e-5)
    for name, value in at_once.delta().items():
        assert (value - at_once.originals[name]).abs().max() > 2e-3
        torch.testing.assert_close(accumulated.delta()[name], value, rtol=0, atol=1e-5)


# --- number types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_follow_the_fp32_run_where_half_precision_weights_cannot(
    make_layers: Any, tiny_batch: Any, dtype: torch.dtype
) -> None:
    schedule = make_schedule(tiny_batch, steps=12, distinct=2)

    def moved(layers: LayerSlice, **more: Any) -> Tensor:
        solve(layers, schedule, lr=1e-4, **more)
        return torch.cat([(v.float() - layers.originals[n].float()).flatten() for n, v in layers.delta().items()])

    exact = moved(make_layers(of=dtype))
    with_masters = moved(make_layers(dtype))
    without = moved(make_layers(dtype), fp32_masters=False)

    def error(other: Tensor) -> float:
        return ((other - exact).norm() / exact.norm()).item()

    assert error(with_masters) < 0.15
    assert error(without) > 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretched(SteeringMethod):
    """Steers to a multiple of the untouched activation, so the factor sets the size of the gradient."""

    factor: float

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        return {}

    def forget_target(self, frozen: Activation, state: State) -> Tensor:
        return self.factor * frozen.h.float()


@pytest.mark.parametrize("factor", [1.0005, 1e4], ids=["tiny", "huge"])
def test_fp16_gradients_neither_vanish_nor_overflow(make_layers: Any, tiny_batch: Any, factor: float) -> None:
    schedule = make_schedule(tiny_batch, steps=1)

    def gradients(layers: LayerSlice) -> Tensor:
        kept: list[Tensor] = []
        solve(
            layers,
            schedule,
            Stretched(factor=factor),
            on_checkpoint=lambda saved: kept.extend(saved.tensors[f"{name}/exp_avg"] for name in layers.trained),
        )
        return torch.cat([value.flatten() for value in kept])

    exact, found = gradients(make_layers(of=torch.float16)), gradients(make_layers(torch.float16))

    assert ((found - exact).norm() / exact.norm()).item() < 0.02


def test_an_alpha_as_published_fits_fp16(make_layers: Any, tiny_batch: Any) -> None:
    layers = make_layers(torch.float16)

    solve(layers, make_schedule(tiny_batch, steps=4), RMU(steering_coeff=50.0, alpha=1200.0), lr=1e-2)

    assert not any(torch.equal(value, layers.originals[name]) for name, value in layers.delta().items())


def test_fp32_weights_are_their_own_masters(make_layers: Any, tiny_batch: Any) -> None:
    schedule = make_schedule(tiny_batch, steps=3)
    with_masters, without = make_layers(), make_layers()

    solve(with_masters, schedule)
    solve(without, schedule, fp32_masters=False)

    assert same(with_masters.delta(), without.delta())


# --- going on from a checkpoint


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (AdaptiveRMU(beta=3.0, alpha=10.0, norm="running"), torch.float32),
        (AdaptiveRMU(beta=3.0, alpha=10.0), torch.bfloat16),
    ],
    ids=["running-fp32", "first-batch-bf16"],
)
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(
    make_layers: Any, tiny_batch: Any, tmp_path: Path, method: SteeringMethod, dtype: torch.dtype, accumulate: int
) -> None:
    schedule = make_schedule(tiny_batch, steps=6 * accumulate, topics=2, distinct=2)
    whole = make_layers(dtype)
    rows = solve(
        whole,
        schedule,
        method,
        accumulate=accumulate,
        checkpoint_every=1,
        on_checkpoint=lambda checkpoint: checkpoint.save(tmp_path / f"{checkpoint.step}.safetensors"),
    )
    assert len(list(tmp_path.iterdir())) == 6

    for step in range(1, 7):
        resumed = make_layers(dtype)
        checkpoint = Checkpoint.load(tmp_path / f"{step}.safetensors")
        rest = solve(resumed, schedule, method, accumulate=accumulate, resume=checkpoint, seed=99)

        assert checkpoint.step == step
        assert same(resumed.delta(), whole.delta()), step
        assert [row.step for row in rest] == [row.step for row in rows if row.step >= step]
        assert [row.forget_loss for row in rest] == [row.forget_loss for row in rows if row.step >= step]


def test_checkpoints_come_at_their_interval_and_at_the_end(make_layers: Any, tiny_batch: Any) -> None:
    seen: list[int] = []

    solve(
        make_layers(),
        make_schedule(tiny_batch, steps=7),
        checkpoint_every=3,
        on_checkpoint=lambda checkpoint: seen.append(checkpoint.step),
    )

    assert seen == [3, 6, 7]


# --- divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rigged(RMU):
    """RMU whose target is multiplied once, at one forget batch."""

    targets: Iterator[float]

    def forget_target(self, frozen: Activation, state: State) -> Tensor:
        return super().forget_target(frozen, state) * next(self.targets)


@pytest.mark.parametrize(
    ("factor", "dtype"), [(math.nan, torch.float32), (math.inf, torch.bfloat16), (1e4, torch.float32)]
)
@pytest.mark.parametrize("at", [5, 13])
def test_divergence_stops_the_run_and_keeps_the_last_good_weights(
    make_layers: Any, tiny_batch: Any, dtype: torch.dtype, factor: float, at: int
) -> None:
    layers = make_layers(dtype)
    kept: dict[int, dict[str, Tensor]] = {}
    method = Rigged(steering_coeff=20.0, alpha=10.0, targets=iter([1.0] * at + [factor] + [1.0] * 9))

    with pytest.raises(DivergedError) as error:
        solve(
            layers,
            make_schedule(tiny_batch, steps=20, distinct=3),
            method,
            checkpoint_every=2,
            on_checkpoint=lambda checkpoint: kept.update({checkpoint.step: layers.delta()}),
        )

    first, second = str(error.value).split("\n")
    assert first.startswith(f"training diverged at step {at}: forget loss ")
    assert second == (
        f"The weights of step {at - 1} were kept. Lower --lr (now 0.001), --alpha or the target's length."
    )
    assert list(kept) == list(range(2, at, 2))
    assert same(layers.delta(), kept[at - 1])


def test_divergence_at_the_first_step_keeps_the_original_weights(make_layers: Any, tiny_batch: Any) -> None:
    layers = make_layers()

    with pytest.raises(DivergedError, match=r"at step 0: forget loss nan.*\nThe weights of step 0 were kept"):
        solve(layers, make_schedule(tiny_batch, steps=2), Rigged(targets=iter([math.nan])))

    assert same(layers.delta(), layers.originals)


# --- recordings


def test_batches_that_come_again_are_recorded_once(
    make_layers: Any, tiny_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Batch] = []
    record = LayerSlice.record

    def counted(self: LayerSlice, batch: Batch) -> Any:
        calls.append(batch)
        return record(self, batch)

    monkeypatch.setattr(LayerSlice, "record", counted)
    schedule = make_schedule(tiny_batch, steps=9, distinct=3)
    reused, recorded_again = make_layers(), make_layers()

    solve(reused, schedule)
    assert len(calls) == 6
    calls.clear()
    monkeypatch.setattr(gradient, "free_bytes", lambda device: 0)
    solve(recorded_again, schedule)

    assert len(calls) == 18
    assert same(reused.delta(), recorded_again.delta())


def test_recordings_that_are_not_used_again_are_let_go(make_layers: Any, tiny_batch: Any) -> None:
    schedule = make_schedule(tiny_batch, steps=4, distinct=2)
    batches = [batch for _, *pair in map(schedule.at, range(4)) for batch in pair]
    recordings = gradient._Recordings(make_layers(), batches)
    budget = recordings.budget

    for used, batch in enumerate(batches, start=1):
        recordings.of(batch)
        assert len(recordings.kept) == min(used, 8 - used)

    assert recordings.budget == budget


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "'lr' must be a positive number. Got 0.0."),
        ({"lr": math.inf}, "'lr' must be a positive number. Got inf."),
        ({"lr": math.nan}, "'lr' must be a positive number. Got nan."),
        ({"accumulate": 0}, "'accumulate' must be at least 1. Got 0."),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as error:
        Gradient(**settings)

    assert str(error.value) == message
