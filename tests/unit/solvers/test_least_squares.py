import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe.data.batches import Schedule
from lethe.errors import InvalidValueError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.model.layers import trainable_names
from lethe.model.losses import masked_mse
from lethe.model.slice import LayerSlice
from lethe.solvers import least_squares
from lethe.solvers.gradient import Gradient
from lethe.solvers.least_squares import Rows, Term, choose_lam, losses, solve, solve_shift
from lethe.solvers.one_matrix import edited, matrix_inputs
from lethe.solvers.pooled import Recipe
from lethe.solvers.sums import Moments, forget_moments, retain_moments
from lethe.types import Batch, Topic

WIDTH, INPUTS = 6, 20


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, seed: int) -> Tensor:
    return random(tokens, INPUTS, seed=seed) * torch.logspace(0, -2, INPUTS, dtype=torch.float64) + 0.3


def sums(x: Tensor, base: Tensor | None = None, slope: Tensor | None = None) -> Moments:
    if base is None or slope is None:
        return Moments(tokens=len(x), gram=x.T @ x)
    squares = ((base**2).sum().item(), 2 * (base * slope).sum().item(), (slope**2).sum().item())
    return Moments(tokens=len(x), gram=x.T @ x, cross=base.T @ x, slope=slope.T @ x, squares=squares)


class Problem:
    """Two topics of unlike size and two retain corpora, of as many tokens as asked for."""

    def __init__(self, tokens: int = 40, coefficient: float = 3.0):
        self.coefficient = coefficient
        self.x = [correlated(tokens, 1), correlated(tokens + 7, 2)]
        base = [random(len(x), WIDTH, seed=3 + i) for i, x in enumerate(self.x)]
        slope = [random(len(x), WIDTH, seed=5 + i) for i, x in enumerate(self.x)]
        self.residual = [b + coefficient * s for b, s in zip(base, slope, strict=True)]
        self.kept = [correlated(2 * tokens, 7), correlated(tokens // 2, 8)]
        self.forget = [
            Term(moments=sums(x, b, s), coefficient=coefficient) for x, b, s in zip(self.x, base, slope, strict=True)
        ]
        self.retain = [sums(x) for x in self.kept]

    def scale(self, alpha: float) -> float:
        kept = torch.cat(self.kept)
        diagonal = sum((x**2).sum(0) / (2 * len(x)) for x in self.x) + alpha * (kept**2).sum(0) / len(kept)
        return diagonal.mean().item()

    def augmented(self, alpha: float, lam: float) -> tuple[Tensor, Tensor]:
        """Rows and targets whose plain sum of squares is d times the objective."""
        kept = torch.cat(self.kept)
        rows = [x / math.sqrt(2 * len(x)) for x in self.x] + [kept * math.sqrt(alpha / len(kept))]
        targets = [r / math.sqrt(2 * len(r)) for r in self.residual] + [kept.new_zeros(len(kept), WIDTH)]
        penalty = math.sqrt(lam * self.scale(alpha)) * torch.eye(INPUTS, dtype=torch.float64)
        return torch.cat([*rows, penalty]), torch.cat([*targets, kept.new_zeros(INPUTS, WIDTH)])


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("lam", [0.0, 1e-4, 0.1, 5.0])
def test_the_edit_is_that_of_the_normal_equations_and_of_lstsq(alpha: float, lam: float) -> None:
    problem = Problem()
    x, y = problem.augmented(alpha, lam)

    found = solve(problem.forget, problem.retain, alpha=alpha, lam=lam)

    normal = torch.linalg.solve(x.T @ x, x.T @ y).T
    least = torch.linalg.lstsq(x, y, driver="gelsd").solution.T
    for expected in (normal, least):
        torch.testing.assert_close(found.delta, expected, rtol=1e-6, atol=1e-6 * least.abs().max().item())
    assert found.lam == lam
    assert found.objective == pytest.approx(((x @ found.delta.T - y) ** 2).sum().item() / WIDTH, rel=1e-9)
    assert found.before == pytest.approx((y**2).sum().item() / WIDTH, rel=1e-9)
    assert found.objective < found.before


def test_losses_are_means_over_tokens_and_coordinates_and_then_over_topics() -> None:
    problem = Problem()
    delta = 0.1 * random(WIDTH, INPUTS, seed=9)

    forget_loss, retain_loss = losses(delta, problem.forget, problem.retain)

    each = [((x @ delta.T - r) ** 2).mean().item() for x, r in zip(problem.x, problem.residual, strict=True)]
    assert forget_loss == pytest.approx(sum(each) / 2, rel=1e-9)
    assert retain_loss == pytest.approx(((torch.cat(problem.kept) @ delta.T) ** 2).mean().item(), rel=1e-9)
    assert losses(delta, problem.forget, []) == (forget_loss, 0)


@pytest.mark.parametrize("lam", [1e14, math.inf])
def test_an_infinite_lam_leaves_the_matrix_as_it_was(lam: float) -> None:
    problem = Problem()

    found = solve(problem.forget, problem.retain, alpha=1.0, lam=lam)

    assert found.delta.abs().max() < 1e-12
    assert (found.forget_loss, found.retain_loss) == pytest.approx((found.before, 0))
    assert found.objective == pytest.approx(found.before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lam_0_is_refused_where_the_tokens_do_not_determine_the_edit(dtype: torch.dtype) -> None:
    problem = Problem(tokens=4)
    forget = [
        Term(moments=sums(x.to(dtype), r.to(dtype), r.to(dtype)), coefficient=1.0)
        for x, r in zip(problem.x, problem.residual, strict=True)
    ]

    with pytest.raises(InvalidValueError, match=r"(?s)singular with lam 0: 15 tokens .* 20 inputs.*--lam .* 0.001 say"):
        solve(forget, [], alpha=0.0, lam=0.0)

    assert solve(forget, [], alpha=0.0, lam=1e-3).objective < 0.9 * solve(forget, [], alpha=0.0, lam=1e-3).before


def test_an_input_that_is_always_zero_is_singular_too() -> None:
    x = correlated(50, 1)
    x[:, 3] = 0
    term = Term(moments=sums(x, random(50, WIDTH, seed=2), random(50, WIDTH, seed=3)), coefficient=1.0)

    with pytest.raises(InvalidValueError, match="singular"):
        solve([term], [sums(x)], alpha=1.0, lam=0.0)
    assert solve([term], [sums(x)], alpha=1.0, lam=1e-3).delta[:, 3].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1.0}, "'alpha' must be a number of 0 or more. Got -1.0"),
        ({"alpha": math.inf}, "'alpha' must be"),
        ({"lam": -1e-3}, "'lam' must be a number of 0 or more. Got -0.001"),
        ({"lam": math.nan}, "'lam' must be"),
        ({"forget": []}, "at least one forget topic"),
        ({"retain": []}, "there are no retain tokens"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    problem = Problem()
    given = {"forget": problem.forget, "retain": problem.retain, "alpha": 1.0, "lam": 1e-3, **change}

    with pytest.raises(InvalidValueError, match=message):
        solve(given.pop("forget"), given.pop("retain"), **given)


def test_retain_sums_in_place_of_forget_sums_are_refused() -> None:
    problem = Problem()

    with pytest.raises(InvalidValueError, match="have no targets"):
        solve([Term(moments=problem.retain[0], coefficient=1.0)], problem.retain, alpha=1.0, lam=1e-3)


def test_a_request_that_was_taken_out_leaves_no_trace() -> None:
    problem, other = Problem(), Problem(tokens=25)
    merged = [
        replace(mine, moments=mine.moments + yours.moments - yours.moments)
        for mine, yours in zip(problem.forget, other.forget, strict=True)
    ]
    kept = [problem.retain[0] + other.retain[0] - other.retain[0], problem.retain[1]]

    found = solve(merged, kept, alpha=2.0, lam=1e-3)
    never = solve(problem.forget, problem.retain, alpha=2.0, lam=1e-3)

    torch.testing.assert_close(found.delta, never.delta, rtol=1e-9, atol=1e-9)
    assert found.objective == pytest.approx(never.objective, rel=1e-9)


def test_lam_is_chosen_by_tokens_that_were_held_out() -> None:
    truth = random(WIDTH, INPUTS, seed=1)

    def term(tokens: int, seed: int, noise: float) -> Term:
        x = random(tokens, INPUTS, seed=seed)
        slope = x @ truth.T + noise * random(tokens, WIDTH, seed=seed + 1)
        return Term(moments=sums(x, torch.zeros_like(slope), slope), coefficient=1.0)

    def chosen(noise: float) -> float:
        return choose_lam([term(22, 10, noise)], [], [term(300, 20, noise)], [], alpha=0.0)

    assert chosen(0.0) == 1e-4
    assert 0.1 <= chosen(20.0) <= 10
    assert choose_lam([term(22, 10, 0.0)], [], [term(300, 20, 0.0)], [], alpha=0.0, grid=(3.0, 0.5)) == 0.5


# --- one vector for all tokens: conjugate gradients


def shift_problem(tokens: Sequence[int], dtype: torch.dtype = torch.float64) -> tuple[Rows, list[Tensor], list[Term]]:
    inputs = [correlated(n, 30 + n) + 0.2 * i for i, n in enumerate(tokens)]
    shifts = [2.0 * random(WIDTH, seed=40 + i) for i in range(len(tokens))]
    terms = [
        Term(moments=sums(x, torch.zeros(len(x), WIDTH, dtype=x.dtype), r.expand(len(x), -1)), coefficient=1.0)
        for x, r in zip(inputs, shifts, strict=True)
    ]
    rows = Rows(forget=tuple(x.to(dtype) for x in inputs), retain=correlated(90, 50).to(dtype))
    return rows, [r.to(dtype) for r in shifts], terms


@pytest.fixture(params=["factorised", "conjugate gradients"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "conjugate gradients":
        monkeypatch.setattr(least_squares, "DIRECT", 0)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("tokens", [(25,), (25, 13, 40)])
@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1e-3), (20.0, 0.1), (0.0, 1e-2), (1.0, 0.0)])
def test_a_shift_is_solved_as_any_other_target(tokens: tuple[int, ...], alpha: float, lam: float) -> None:
    rows, shifts, terms = shift_problem(tokens)

    found = solve_shift(rows, shifts, alpha=alpha, lam=lam, tolerance=1e-12)

    expected = solve(terms, [sums(rows.retain)], alpha=alpha, lam=lam)
    torch.testing.assert_close(found.delta, expected.delta, rtol=1e-6, atol=1e-7)
    for name in ("forget_loss", "retain_loss", "objective", "before", "lam"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name
    assert torch.linalg.matrix_rank(found.delta) == len(tokens)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_rows_of_less_precision_are_solved_in_fp32(dtype: torch.dtype, near: float) -> None:
    rows, shifts, terms = shift_problem((25,), dtype)

    found = solve_shift(rows, shifts, alpha=1.0, lam=1e-2, tolerance=1e-5)

    expected = solve(terms, [sums(rows.retain.double())], alpha=1.0, lam=1e-2).delta
    assert found.delta.dtype == torch.float32
    assert (found.delta - expected).norm() < near * expected.norm()


@pytest.mark.usefixtures("way")
def test_a_shift_without_retain_tokens() -> None:
    rows, shifts, terms = shift_problem((25,))
    rows = replace(rows, retain=rows.retain[:0])

    found = solve_shift(rows, shifts, alpha=0.0, lam=1e-2, tolerance=1e-12)

    assert found.retain_loss == 0
    torch.testing.assert_close(found.delta, solve(terms, [], alpha=0.0, lam=1e-2).delta, rtol=1e-6, atol=1e-7)
    with pytest.raises(InvalidValueError, match="no retain tokens"):
        solve_shift(rows, shifts, alpha=1.0, lam=1e-2)


def test_an_infinite_lam_leaves_a_shift_undone() -> None:
    rows, shifts, _ = shift_problem((25,))

    found = solve_shift(rows, shifts, alpha=1.0, lam=math.inf)

    assert found.delta.abs().max() == 0
    assert found.objective == pytest.approx(found.before)


def test_too_few_steps_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "DIRECT", 0)
    rows, shifts, _ = shift_problem((25,))

    with pytest.raises(InvalidValueError, match=r"(?s)lam 0.0001 left .* after 2 steps.\nSet --lam higher"):
        solve_shift(rows, shifts, alpha=1.0, lam=1e-4, max_steps=2)


def test_a_shift_that_few_tokens_do_not_determine_is_refused_with_lam_0() -> None:
    rows, shifts, _ = shift_problem((12,))

    with pytest.raises(InvalidValueError, match="singular with lam 0: 12 tokens"):
        solve_shift(rows, shifts, alpha=0.0, lam=0.0)


def test_a_sample_of_the_rows_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(1200, 40, generator=draw, dtype=torch.float64)
    shared = torch.randn(40, 300, generator=draw, dtype=torch.float64)
    x = mixed @ shared + torch.randn(1200, 300, generator=draw, dtype=torch.float64)
    rows, shift = Rows(forget=(x[:60] + shared[0],), retain=x[60:]), torch.ones(WIDTH)
    monkeypatch.setattr(least_squares, "DIRECT", 0)

    solve_shift(rows, [shift], alpha=1.0, lam=1e-3, max_steps=55)

    monkeypatch.setattr(least_squares, "SAMPLE", 1)
    with pytest.raises(InvalidValueError, match="after 65 steps"):
        solve_shift(rows, [shift], alpha=1.0, lam=1e-3, max_steps=65)


# --- on a model


@pytest.fixture
def layers(tiny_model: Any) -> LayerSlice:
    model = tiny_model()
    return LayerSlice(model, 2, 3, trainable_names(model, 2))


@pytest.fixture
def schedule(tiny_batch: Any) -> Schedule:
    forget, retain = (tiny_batch((9, 5, 7), seed=seed, count="no-first") for seed in (1, 2))
    return Schedule(topics=(Topic(name="t", batches=(forget,) * 400),), retain=(retain,) * 400, steps=400)


def solved(layers: LayerSlice, method: SteeringMethod, forget: Batch, retain: Batch, lam: float) -> Any:
    topic = Topic(name="t", batches=(forget,))
    state = method.prepare(layers, topic, torch.Generator().manual_seed(0))
    found, _ = forget_moments(layers, method, topic.batches, state)
    term = Term(moments=found, coefficient=getattr(method, method.coefficient))
    return solve([term], [retain_moments(layers, [retain])], alpha=method.alpha, lam=lam)


@pytest.mark.parametrize(
    "method", [RMU(steering_coeff=3.0, alpha=2.0), AdaptiveRMU(alpha=2.0), RSV(steering_coeff=3.0, alpha=2.0)]
)
def test_no_training_of_the_matrix_gets_lower(layers: LayerSlice, schedule: Schedule, method: SteeringMethod) -> None:
    forget, retain = schedule.topics[0].batches[0], schedule.retain[0]
    rows: list[Any] = []

    found = solved(layers, method, forget, retain, lam=1e-7)
    Gradient(lr=3e-3).train(layers, method, schedule, torch.Generator().manual_seed(0), on_row=rows.append)

    trained = [row.forget_loss + method.alpha * row.retain_loss for row in rows]
    assert found.before == pytest.approx(trained[0], rel=1e-5)
    assert min(trained) < 0.5 * trained[0]
    assert found.objective <= min(trained)


def test_the_edited_model_has_the_losses_that_the_solution_claims(layers: LayerSlice, schedule: Schedule) -> None:
    method = RMU(steering_coeff=3.0, alpha=2.0)
    forget, retain = (layers.record(batch) for batch in (schedule.topics[0].batches[0], schedule.retain[0]))
    state = method.prepare(layers, schedule.topics[0], torch.Generator().manual_seed(0))

    found = solved(layers, method, forget.batch, retain.batch, lam=0.3)
    ((name, value),) = edited(layers, found.delta).items()
    layers.trained[name].data.copy_(value)

    with torch.no_grad():
        forget_loss = masked_mse(layers(forget), method.forget_target(forget.frozen, state), forget.batch.mask)
        retain_loss = masked_mse(layers(retain), retain.frozen.h, retain.batch.mask)
    assert found.forget_loss == pytest.approx(forget_loss.item(), rel=1e-5)
    assert found.retain_loss == pytest.approx(retain_loss.item(), rel=1e-5)
    assert found.objective > found.forget_loss + 2.0 * found.retain_loss


def test_the_published_recipe_does_not_get_lower() -> None:
    x = correlated(300, 1)
    y = x @ random(WIDTH, INPUTS, seed=2).T + 0.1 * random(300, WIDTH, seed=3)
    y[60:] = 0
    term = Term(moments=sums(x, torch.zeros_like(y), y), coefficient=1.0)
    original = random(WIDTH, INPUTS, seed=4)

    best = solve([term], [], alpha=0.0, lam=1e-8)
    fit = Recipe().fit(original.float(), x.float(), y.float(), torch.Generator().manual_seed(0))

    trained, _ = losses(fit.delta.double(), [term], [])
    assert trained < 0.95 * best.before
    assert best.objective <= trained


def test_the_edit_of_a_shift_has_rank_one_and_needs_no_square_matrix(layers: LayerSlice, schedule: Schedule) -> None:
    method = RSV(steering_coeff=3.0, alpha=2.0)
    forget, retain = schedule.topics[0].batches[0], schedule.retain[0]

    found = solved(layers, method, forget, retain, lam=1e-2)

    values = torch.linalg.svdvals(found.delta)
    assert values[1] < 1e-10 * values[0]
    shift = method.shift(method.prepare(layers, schedule.topics[0], torch.Generator().manual_seed(0)))
    rows = Rows(forget=(matrix_inputs(layers, forget)[0],), retain=matrix_inputs(layers, retain)[0])
    other = solve_shift(rows, [shift], alpha=2.0, lam=1e-2)
    assert (other.delta - found.delta).norm() < 1e-2 * found.delta.norm()
    assert other.objective == pytest.approx(found.objective, rel=1e-4)
