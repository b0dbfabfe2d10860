"""Edits of one matrix per layer: the least squares of a new request together with those made before."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lethe.errors import InvalidValueError, UsageError
from lethe.methods.protocol import Method, Shift, SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.solvers import least_squares, request_sums
from lethe.solvers import sums as sums_module
from lethe.solvers.least_squares import Solution, Term
from lethe.solvers.one_matrix import FP64_WIDTH, check_linear, cost_of_sums, edited, matrix_inputs, refusal
from lethe.solvers.protocol import Cost, Edit, Problem, Work
from lethe.solvers.request_sums import Request, Sums
from lethe.solvers.sums import Moments
from lethe.types import Batch, Topic

HELD_OUT = 5
"""Every fifth batch is held out where lambda is to be chosen."""


LAM = 1e-3
"""Lambda where there are too few batches to hold one out, or no sums to choose it with."""


Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Least squares in closed form, for one matrix of each trained layer: the optimum, without a step."""

    source: ClassVar[str] = "Lethe's own: a steering loss at one layer is linear least squares in its output matrix"
    is_one_matrix: ClassVar[bool] = True
    keeps_requests: ClassVar[bool] = True

    lam: float | None = None
    """Weight of the distance to the untouched matrix, as a multiple of the mean diagonal of the normal equations'
    matrix; by default the best of several on held-out rows."""
    keep_sums: bool = True
    """Keep the sums that the solution is made of, so that requests can be added and withdrawn later; without, methods
    that add one vector are solved by conjugate gradients, without a square matrix."""

    def __post_init__(self) -> None:
        if self.lam is not None and not (self.lam >= 0 and math.isfinite(self.lam)):
            raise InvalidValueError(f"'lam' must be a number of 0 or more. Got {self.lam}.")

    def accepts(self, method: Method) -> str | None:
        """A steering method without noise."""
        return refusal(method, "ridge")

    def as_published(self) -> "Ridge":
        """Itself: it solves what the authors' loops approach."""
        return self

    def cost(self, problem: Problem) -> Cost:
        """The sums over all rows, and their solves."""
        return cost_of_sums(problem)

    def solve(self, method: Method, work: Work) -> Edit:
        """Solve each layer for its own targets on the untouched model; earlier requests are solved again with it.

        Raises: UnknownModuleError if a layer's output is not linear in its matrix; InvalidValueError for a lambda of 0
        with a singular problem; UsageError if the earlier requests edit other matrices.
        """
        assert isinstance(method, SteeringMethod)
        earlier = request_sums.load(work.earlier) if work.earlier is not None else ()
        slices = work.layers()
        work.progress.phase("solve (ridge)", len(slices))
        names = [name for layers in slices for name in layers.trained]
        if work.withdraw is not None:
            held = request_sums.withdraw(earlier, work.withdraw)
            request_sums.check_fit(held, "", names)
            sums = {}
        else:
            request_sums.check_fit(earlier, work.name, names)
            sums = self._sums(method, slices, work)
            held = (*earlier, *_requests(method, work.name, sums))
        values: dict[str, Tensor] = {}
        facts: list[dict[str, Any]] = []
        for layers, name in zip(slices, names, strict=True):
            if sums or work.withdraw is not None:
                delta, found = solve_requests(held, name, method.alpha, self.lam)
                found |= {"accumulate_seconds": sums[name][1]} if sums else {}
            else:
                delta, found = self._conjugate_gradients(method, layers, work)
            values |= edited(layers, delta)
            facts.append({"matrix": name, "solver": "ridge", **found})
            work.progress.advance(name)
        if held and (self.keep_sums or work.withdraw is not None) and work.sums is not None:
            request_sums.save(held, work.sums)
        return Edit(
            model=slices[0].model,
            values=values,
            facts=tuple(facts),
            recording_seconds=sum(layers.recording_seconds for layers in slices),
        )

    def _sums(self, method: SteeringMethod, slices: Sequence[LayerSlice], work: Work) -> dict[str, tuple[Sums, float]]:
        """By matrix, the sums of this request and the seconds that they took; none where they are not needed."""
        topics, retain = work.rows()
        if isinstance(method, Shift) and not self.keep_sums:
            if work.earlier is not None:
                raise UsageError(
                    "without its sums a request cannot be put on an earlier one.\nLeave --no-keep-sums out."
                )
            return {}
        found: dict[str, tuple[Sums, float]] = {}
        hold_out = self.lam is None
        for place, layers in enumerate(slices):
            (name,) = layers.trained
            work.memo[f"linear {place}"](name, lambda layers=layers: check_linear(layers, topics[0].batches[0]))
            started = time.perf_counter()
            sums = work.memo[f"sums {place}"](
                (work.rows_key, name, hold_out, _without_weights(method)),
                lambda layers=layers: _sums(
                    method, layers, topics, retain, torch.Generator().manual_seed(work.seed), hold_out=hold_out
                ),
            )
            found[name] = sums, time.perf_counter() - started
        return found

    def _conjugate_gradients(
        self, method: SteeringMethod, layers: LayerSlice, work: Work
    ) -> tuple[Tensor, dict[str, Any]]:
        assert isinstance(method, Shift)
        topics, retain = work.rows()
        rng = torch.Generator().manual_seed(work.seed)
        check_linear(layers, topics[0].batches[0])
        started = time.perf_counter()
        rows, shifts = [], []
        for topic in topics:
            shifts.append(method.shift(method.prepare(layers, topic, rng)))
            rows.append(torch.cat([matrix_inputs(layers, batch)[0] for batch in topic.batches]))
        kept = torch.cat([matrix_inputs(layers, batch)[0] for batch in retain])
        read = time.perf_counter() - started
        started = time.perf_counter()
        found = least_squares.solve_shift(
            least_squares.Rows(forget=tuple(rows), retain=kept),
            shifts,
            alpha=method.alpha,
            lam=LAM if self.lam is None else self.lam,
        )
        facts = _facts(found, time.perf_counter() - started)
        tokens = {"forget_tokens": sum(map(len, rows)), "retain_tokens": len(kept)}
        return found.delta, facts | tokens | {"accumulate_seconds": read}


def _requests(method: SteeringMethod, name: str, sums: Mapping[str, tuple[Sums, float]]) -> tuple[Request, ...]:
    if not sums:
        return ()
    coefficient = getattr(method, method.coefficient)
    return (Request(name=name, coefficient=coefficient, sums={matrix: of for matrix, (of, _) in sums.items()}),)


def solve_requests(
    held: Sequence[Request], name: str, alpha: float, lam: float | None
) -> tuple[Tensor, dict[str, Any]]:
    """The change of one matrix that serves all requests, [d_model, input width], and what is to be said of it."""
    started = time.perf_counter()
    parts = [(request.coefficient, request.sums[name]) for request in held]
    chosen = _choose(parts, alpha) if lam is None else lam
    whole = [(coefficient, _whole(sums)) for coefficient, sums in parts]
    found = least_squares.solve(
        [Term(moments=part, coefficient=c) for c, sums in whole for part in sums.forget.values()],
        [sums.retain for _, sums in whole],
        alpha=alpha,
        lam=chosen,
    )
    facts = _facts(found, time.perf_counter() - started)
    tokens = {"forget_tokens": sum(part.tokens for _, sums in whole for part in sums.forget.values())}
    return found.delta, facts | tokens | {"retain_tokens": sum(sums.retain.tokens for _, sums in whole)}


def _choose(parts: Sequence[tuple[float, Sums]], alpha: float) -> float:
    held_retain = [sums.held_retain for _, sums in parts if sums.held_retain is not None]
    held_forget = [Term(moments=part, coefficient=c) for c, sums in parts for part in sums.held_forget.values()]
    if not (held_retain and held_forget):
        return LAM
    return least_squares.choose_lam(
        [Term(moments=part, coefficient=c) for c, sums in parts for part in sums.forget.values()],
        [sums.retain for _, sums in parts],
        held_forget,
        held_retain,
        alpha=alpha,
    )


def _whole(sums: Sums) -> Sums:
    """With what was held out."""
    if sums.held_retain is None:
        return sums
    held = sums.held_forget
    return Sums(
        forget={topic: part + held[topic] if topic in held else part for topic, part in sums.forget.items()},
        retain=sums.retain + sums.held_retain,
    )


def _without_weights(method: SteeringMethod) -> SteeringMethod:
    """The method as its sums know it: they serve every coefficient and every weight of the retain loss."""
    return replace(method, **{method.coefficient: 1.0, "alpha": 0.0})


def _sums(
    method: SteeringMethod,
    layers: LayerSlice,
    topics: Sequence[Topic],
    retain: Sequence[Batch],
    rng: torch.Generator,
    *,
    hold_out: bool,
) -> Sums:
    (parameter,) = layers.trained.values()
    dtype = torch.float64 if max(parameter.shape) <= FP64_WIDTH else torch.float32
    forget: dict[str, Moments] = {}
    held_forget: dict[str, Moments] = {}
    kept, held = _split(retain, hold_out)
    for topic in topics:
        state = method.prepare(layers, topic, rng)
        fit, rest = _split(topic.batches, hold_out and bool(held))
        forget[topic.name], state = sums_module.forget_moments(layers, method, fit, state, dtype=dtype)
        if rest:
            held_forget[topic.name], _ = sums_module.forget_moments(layers, method, rest, state, dtype=dtype)
    return Sums(
        forget=forget,
        retain=sums_module.retain_moments(layers, kept, dtype=dtype),
        held_forget=held_forget,
        held_retain=sums_module.retain_moments(layers, held, dtype=dtype) if held else None,
    )


def _split(batches: Sequence[Thing], hold_out: bool) -> tuple[list[Thing], list[Thing]]:
    if not hold_out or len(batches) < 2:
        return list(batches), []
    every = min(HELD_OUT, len(batches))
    held = list(batches[every - 1 :: every])
    return [batch for i, batch in enumerate(batches) if i % every != every - 1], held


def _facts(found: Solution, seconds: float) -> dict[str, Any]:
    named = ("lam", "before", "forget_loss", "retain_loss", "objective")
    return {name: getattr(found, name) for name in named} | {"solve_seconds": seconds}
