"""The closed form against the published AdamW recipe (20 epochs, 64 rows a step), on the same rows, in one process."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import tyro
from torch import Tensor

from lethe import LayerSlice, load_model
from lethe.data.batches import batches as padded
from lethe.data.batches import encode_rows
from lethe.methods.lunar import LUNAR
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.model.layers import trainable_names
from lethe.model.loading import load_tokenizer
from lethe.solvers.least_squares import Rows, Term, losses, solve, solve_shift
from lethe.solvers.one_matrix import matrix, matrix_inputs
from lethe.solvers.pooled import Recipe, collect_rows
from lethe.solvers.sums import Accumulator, Moments, forget_moments, retain_moments
from lethe.suites import world
from lethe.suites.world import exam
from lethe.types import Batch, Topic

RECIPE = Recipe()
LAM = 1e-3
FORGET_SHARE = 0.05
RANK = 256
GENERAL_TARGET, LUNAR_TARGET = 10, 100
LAYER = 6
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A matrix with d outputs and p inputs, and the rows it is fitted on."""

    p: int
    d: int
    rows: int

    @property
    def steps(self) -> int:
        """Of the whole recipe."""
        return RECIPE.epochs * -(-self.rows // RECIPE.batch_size)


LARGE = Size(p=14336, d=4096, rows=16384)
SMALL = Size(p=1024, d=256, rows=4096)


class Problem:
    """Rows of falling variance in a few hundred shared directions, and noise; forget rows lean one way.

    Forget rows come first. The weights are those of the recipe, a plain mean over rows.
    """

    def __init__(self, size: Size):
        rng = torch.Generator().manual_seed(0)
        self.forget_rows = round(size.rows * FORGET_SHARE)
        self.alpha = (size.rows - self.forget_rows) / self.forget_rows
        self.share = self.forget_rows / size.rows
        spectrum = torch.arange(1, RANK + 1).float().rsqrt()
        lean = 2 * torch.randn(RANK, generator=rng)
        shared = torch.randn(RANK, size.p, generator=rng) * spectrum[:, None] / RANK**0.5
        noise = torch.arange(1, size.p + 1).float().pow(-0.25)[torch.randperm(size.p, generator=rng)]
        self.x = torch.empty(size.rows, size.p)
        for start in range(0, size.rows, 1024):
            part = self.x[start : start + 1024]
            part.normal_(generator=rng).mul_(noise)
            mixed = torch.randn(len(part), RANK, generator=rng)
            mixed[: max(0, self.forget_rows - start)] += lean
            part.addmm_(mixed, shared)
        self.matrix = torch.randn(size.d, size.p, generator=rng) / size.p**0.5
        self.shift = torch.randn(size.d, generator=rng)
        # Like RMU's: a fixed vector less what the layer holds already.
        self.general = self.shift - torch.randn(self.forget_rows, size.d, generator=rng)

    def rows(self) -> Rows:
        """Forget rows and retain rows."""
        return Rows(forget=(self.x[: self.forget_rows],), retain=self.x[self.forget_rows :])

    def residual(self, forget: Tensor) -> Tensor:
        """Of every row; `forget` holds the forget rows' or is one vector for all of them."""
        found = torch.zeros(len(self.x), len(self.shift))
        found[: self.forget_rows] = forget
        return found

    def sums(self) -> tuple[Moments, Moments]:
        """For the general target; residuals at coefficient 0 and slopes differ, as they do for RMU."""
        forget, retain = Accumulator(torch.float32), Accumulator(torch.float32)
        forget.add(self.x[: self.forget_rows], self.general - self.shift, self.shift.expand_as(self.general))
        for part in self.x[self.forget_rows :].split(512):
            retain.add(part)
        return forget.moments(), retain.moments()

    def mean(self, forget_loss: float, retain_loss: float) -> float:
        """The plain mean over rows that the recipe descends."""
        return self.share * (forget_loss + self.alpha * retain_loss)

    def mean_of(self, delta: Tensor, forget: Tensor) -> float:
        """The same for any edit, from the rows."""
        total = 0.0
        residual = forget.expand(self.forget_rows, -1)
        for x, target in ((self.x[: self.forget_rows], residual), (self.x[self.forget_rows :], None)):
            for start in range(0, len(x), 2048):
                gained = x[start : start + 2048] @ delta.T
                if target is not None:
                    gained -= target[start : start + 2048]
                total += gained.square_().sum().item()
        return total / (len(self.x) * len(delta))


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def report(name: str, recipe: float, ours: float, target: int) -> None:
    verdict = "" if target == 0 else f"  (target {target}x)"
    print(f"{name}: {ours:.3g} s against {recipe:.4g} s: {recipe / ours:.0f}x{verdict}")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def compare(size: Size, *, whole: bool, repeats: int, timed_steps: int = 12) -> None:
    """Print times and objectives of the three sides; `whole` runs the recipe to its end, else it is extrapolated."""
    print(f"\n{size.rows} rows ({FORGET_SHARE:.0%} forget), p {size.p}, d {size.d}, fp32, lam {LAM:g}")
    problem = Problem(size)
    residual = problem.residual(problem.general)
    if whole:
        recipe, fit = timed(lambda: RECIPE.fit(problem.matrix, problem.x, residual, rng()))
        shifted = RECIPE.fit(problem.matrix, problem.x, problem.residual(problem.shift), rng()).delta
        print(f"AdamW, {size.steps} steps: {recipe:.3g} s, mean square {fit.losses[0]:.5f} -> {fit.losses[-1]:.5f}")
        reached = [problem.mean_of(fit.delta, problem.general), problem.mean_of(shifted, problem.shift)]
    else:
        # Twice as many epochs on the same rows, less once: what a fit costs beside its steps cancels.
        chosen = torch.randperm(size.rows, generator=rng())[: RECIPE.batch_size * timed_steps]
        x, y, times = problem.x[chosen], residual[chosen], []
        for _ in range(repeats + 1):
            once, _ = timed(lambda: Recipe(epochs=1).fit(problem.matrix, x, y, rng()))
            twice, fit = timed(lambda: Recipe(epochs=2).fit(problem.matrix, x, y, rng()))
            times.append((twice - once) / timed_steps)
        step = statistics.median(times[1:])
        recipe = step * size.steps
        print(
            f"AdamW: {step:.3f} s a step ({min(times[1:]):.3f}-{max(times[1:]):.3f}); {size.steps} "
            f"steps would take {recipe:.0f} s: EXTRAPOLATED from {timed_steps} steps a round"
        )
        reached = [problem.mean_of(fit.delta, problem.general)]
        print(f"its objective after {2 * timed_steps} steps: {reached[0]:.5f} (before: ", end="")
        print(f"{problem.share * problem.general.square().mean().item():.5f})")
        del fit, x, y
    del residual

    gather, solving = [], []
    for _ in range(repeats):
        seconds, (forget, retain) = timed(problem.sums)
        gather.append(seconds)
        seconds, found = timed(
            lambda f=forget, r=retain: solve([Term(moments=f, coefficient=1.0)], [r], alpha=problem.alpha, lam=LAM)
        )
        solving.append(seconds)
        general, ours = found.delta, problem.mean(found.forget_loss, found.retain_loss)
        del found, forget, retain
    print(
        f"objective, general target: AdamW{'' if whole else ' so far'} {reached[0]:.5f}, closed form {ours:.5f}", end=""
    )
    print(f" (from the rows {problem.mean_of(general, problem.general):.5f})")
    report("general target", recipe, statistics.median(gather) + statistics.median(solving), GENERAL_TARGET)
    del general
    rate = product_rate(problem.x, repeats)
    triangle = size.p * (size.p + 1)
    needed = {
        "accumulation": (size.rows * triangle + 4 * problem.forget_rows * size.p * size.d, statistics.median(gather)),
        # Cholesky, two triangular solves, one product for each of the two losses.
        "solve": (size.p**3 / 3 + 2 * size.p**2 * size.d + 4 * size.p**2 * size.d, statistics.median(solving)),
    }
    for name, (flops, seconds) in needed.items():
        print(
            f"  {name} {seconds:.3g} s; a plain product of its {flops / 1e9:.0f} GFLOP takes {flops / rate:.3g} s",
            end="",
        )
        print(f" ({flops / rate / seconds:.0%})")

    rows, times = problem.rows(), []
    for _ in range(repeats + 1):
        seconds, found = timed(lambda: solve_shift(rows, [problem.shift], alpha=problem.alpha, lam=LAM))
        times.append(seconds)
    shift_mean = problem.mean(found.forget_loss, found.retain_loss)
    if whole:
        print(f"objective, one shift: AdamW {reached[1]:.5f}, closed form {shift_mean:.5f}")
    else:
        before = problem.share * problem.shift.square().mean().item()
        print(f"objective, one shift: closed form {shift_mean:.5f} (before: {before:.5f})")
    report("LUNAR's shift", recipe, statistics.median(times[1:]), LUNAR_TARGET)
    v = torch.randn(size.p, 1, generator=rng())
    once = statistics.median([timed(lambda: problem.x.T @ (problem.x @ v))[0] for _ in range(3)])
    print(f"  as long as {statistics.median(times[1:]) / once:.0f} plain products X^T (X v), of {once:.3g} s each")


def product_rate(x: Tensor, repeats: int) -> float:
    """FLOP/s of a plain product X^T X; of a quarter of the rows, to save time."""
    part = x[: len(x) // 4]
    times = [timed(lambda: part.T @ part)[0] for _ in range(repeats + 1)]
    return 2 * len(part) * x.shape[1] ** 2 / statistics.median(times[1:])


def builtin(repeats: int) -> None:
    """The same on the built-in model's own activations: LUNAR's shift, and RMU for a general target."""
    model, tokenizer = load_model(world.MODEL_FOLDER, layers=LAYER + 1), load_tokenizer(world.MODEL_FOLDER)
    layers = LayerSlice(model, LAYER, LAYER + 1, trainable_names(model, LAYER))

    def batches(prompts: Sequence[str], many: int = 50) -> tuple[Batch, ...]:
        rows = encode_rows(list(prompts), tokenizer, max_length=128)
        return padded(rows, tokenizer, batch_size=many, count="no-bos", padding_side="left")

    forget = [question.prompt for asked in exam.forget_prompts().values() for question in asked]
    topic = Topic(
        name="all",
        batches=batches(forget),
        reference=batches([question.prompt for question in exam.reference_prompts()]),
    )
    retain = batches([question.prompt for question in exam.retain_prompts()])
    width, inputs = matrix(layers).shape
    print(f"\nbuilt-in model, layer {LAYER}, p {inputs}, d {width}; recording the activations is in no side's time")
    for method, target in ((RMU(steering_coeff=160.0), GENERAL_TARGET), (LUNAR(), LUNAR_TARGET)):
        compare_builtin(layers, method, topic, retain, target, repeats)


def compare_builtin(
    layers: LayerSlice, method: SteeringMethod, topic: Topic, retain: Sequence[Batch], target: int, repeats: int
) -> None:
    name = type(method).__name__
    x, residual = collect_rows(layers, method, [topic], retain, rng())
    recipe, fit = timed(lambda: RECIPE.fit(matrix(layers), x, residual, rng()))
    state = method.prepare(layers, topic, rng())
    term = Term(
        moments=forget_moments(layers, method, topic.batches, state)[0],
        coefficient=getattr(method, method.coefficient),
    )
    kept = retain_moments(layers, retain)
    share = term.moments.tokens / len(x)
    alpha = 1 / share - 1
    forget_loss, retain_loss = losses(fit.delta.double(), [term], [kept])
    trained = share * (forget_loss + alpha * retain_loss)

    def accumulate() -> None:
        sums = Accumulator(torch.float64)
        sums.add(x)
        sums.moments()

    gather = statistics.median([timed(accumulate)[0] for _ in range(repeats + 1)][1:])
    times = []
    for _ in range(repeats + 1):
        seconds, found = timed(lambda: solve([term], [kept], alpha=alpha, lam=LAM))
        times.append(seconds)
    ours = share * (found.forget_loss + alpha * found.retain_loss)
    print(f"{name}, {len(x)} rows: AdamW reaches {trained:.4f}, the closed form {ours:.4f}")
    report(f"{name}, sums and Cholesky", recipe, gather + statistics.median(times[1:]), GENERAL_TARGET)
    if isinstance(method, LUNAR):
        rows = Rows(
            forget=(torch.cat([matrix_inputs(layers, batch)[0] for batch in topic.batches]),),
            retain=torch.cat([matrix_inputs(layers, batch)[0] for batch in retain]),
        )
        times = []
        for _ in range(repeats + 1):
            seconds, found = timed(lambda: solve_shift(rows, [method.shift(state)], alpha=alpha, lam=LAM))
            times.append(seconds)
        ours = share * (found.forget_loss + alpha * found.retain_loss)
        print(f"{name}, one right-hand side: the closed form reaches {ours:.4f}")
        report(f"{name}, one right-hand side", recipe, statistics.median(times[1:]), target)


def main(small: bool = False, threads: int = 2, repeats: int = 3) -> None:
    """Compare on a size where the recipe runs to its end, on the built-in model, and (without --small) at 7B size."""
    torch.set_num_threads(threads)
    print(f"{threads} threads, medians of {repeats}")
    compare(SMALL, whole=True, repeats=repeats)
    builtin(repeats)
    if not small:
        compare(LARGE, whole=False, repeats=repeats)


if __name__ == "__main__":
    tyro.cli(main)
