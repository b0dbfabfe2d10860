"""Edits of one matrix per layer: the least squares of a new request together with those made before."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lethe.errors import InvalidValueError, UsageError
from lethe.methods.protocol import Shift, SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.runs import config as configs
from lethe.runs.config import RunConfig
from lethe.runs.sharing import Sharing
from lethe.solvers import least_squares, one_matrix, pooled, request_sums
from lethe.solvers import sums as sums_module
from lethe.solvers.least_squares import Solution, Term
from lethe.solvers.request_sums import Request, Sums
from lethe.solvers.sums import Moments
from lethe.system.progress import Progress
from lethe.types import Batch, Topic

HELD_OUT = 5
"""Every fifth batch is held out where lambda is to be chosen."""


LAM = 1e-3
"""Lambda where there are too few batches to hold one out, or no sums to choose it with."""


FP64_WIDTH = 4096
"""Sums of wider matrices are kept in fp32: at 14336 one of them is 0.8 GB already."""


Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedForm:
    """The solved edit."""

    values: dict[str, Tensor] = field(repr=False)
    """New value of each edited parameter."""
    requests: tuple[Request, ...] = ()
    """All requests that it is the solution for; empty if no sums were kept."""
    facts: tuple[dict[str, Any], ...] = ()
    """Per matrix: losses, lambda, rows and seconds, for the report."""


def check(method: SteeringMethod, config: RunConfig) -> None:
    """Refuse settings that these solvers have no answer for.

    Raises: InvalidValueError, UsageError.
    """
    if method.nu > 0:
        raise InvalidValueError(
            f"'nu' must be 0 for --solver {config.solver}: noise of mean zero does not move the optimum of least "
            f"squares. Got {method.nu}.\nPass --solver gradient to train with noise."
        )
    if config.as_published and config.solver == "ridge" and method.reads == "texts":
        raise UsageError("--as-published repeats the authors' training loop.\nPass --solver gradient.")
    if config.solver == "pooled" and config.on is not None:
        raise UsageError("--solver pooled has no sums that a request could be added to.\nPass --solver ridge.")


def solve(
    method: SteeringMethod,
    config: RunConfig,
    slices: Iterable[LayerSlice],
    topics: Sequence[Topic],
    retain: Sequence[Batch],
    earlier: Sequence[Request],
    progress: Progress,
    sharing: Sharing | None = None,
) -> ClosedForm:
    """Solve each layer of `slices` for its own targets on the untouched model; `earlier` requests are solved again.

    Raises: UnknownModuleError if a layer's output is not linear in its matrix; InvalidValueError for a lambda of 0
    with a singular problem; UsageError if the earlier requests edit other matrices.
    """
    sharing = sharing or Sharing()
    slices = list(slices)
    request_sums.check_fit(earlier, config.out.name, [name for layers in slices for name in layers.trained])
    progress.phase(f"solve ({config.solver})", len(slices))
    values, facts, sums = {}, [], {}
    for layers in slices:
        rng = torch.Generator().manual_seed(config.seed)
        (name,) = layers.trained
        sharing.once("linear", name, lambda layers=layers: one_matrix.check_linear(layers, topics[0].batches[0]))
        if config.solver == "pooled":
            delta, found = _pooled(method, layers, topics, retain, rng)
        elif config.keep_sums or not isinstance(method, Shift):
            started = time.perf_counter()
            hold_out = config.lam is None
            sums[name] = sharing.once(
                f"sums {len(sums)}",
                (configs.of_corpora(config), name, hold_out, _without_weights(method)),
                lambda layers=layers, rng=rng, held=hold_out: _sums(method, layers, topics, retain, rng, hold_out=held),
            )
            seconds = time.perf_counter() - started
            request = Request(
                name=config.out.name, coefficient=getattr(method, method.coefficient), sums={name: sums[name]}
            )
            delta, found = solve_requests((*earlier, request), name, method.alpha, config.lam)
            found |= {"accumulate_seconds": seconds}
        else:
            delta, found = _conjugate_gradients(method, config, layers, topics, retain, rng)
        values |= one_matrix.edited(layers, delta)
        facts.append({"matrix": name, "solver": config.solver, **found})
        progress.advance(name)
    if not (sums and config.keep_sums):
        return ClosedForm(values=values, facts=tuple(facts))
    new = Request(name=config.out.name, coefficient=getattr(method, method.coefficient), sums=sums)
    return ClosedForm(values=values, facts=tuple(facts), requests=(*earlier, new))


def solve_again(
    method: SteeringMethod, config: RunConfig, slices: Iterable[LayerSlice], held: Sequence[Request]
) -> ClosedForm:
    """The edit for these requests and no other, from their sums alone.

    Raises: UsageError if they edit other matrices than the slices'.
    """
    slices = list(slices)
    request_sums.check_fit(held, "", [name for layers in slices for name in layers.trained])
    values, facts = {}, []
    for layers in slices:
        (name,) = layers.trained
        delta, found = solve_requests(held, name, method.alpha, config.lam)
        values |= one_matrix.edited(layers, delta)
        facts.append({"matrix": name, "solver": config.solver, **found})
    return ClosedForm(values=values, facts=tuple(facts), requests=tuple(held))


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


def _conjugate_gradients(
    method: Shift,
    config: RunConfig,
    layers: LayerSlice,
    topics: Sequence[Topic],
    retain: Sequence[Batch],
    rng: torch.Generator,
) -> tuple[Tensor, dict[str, Any]]:
    started = time.perf_counter()
    rows, shifts = [], []
    for topic in topics:
        shifts.append(method.shift(method.prepare(layers, topic, rng)))
        rows.append(torch.cat([one_matrix.matrix_inputs(layers, batch)[0] for batch in topic.batches]))
    kept = torch.cat([one_matrix.matrix_inputs(layers, batch)[0] for batch in retain])
    read = time.perf_counter() - started
    started = time.perf_counter()
    found = least_squares.solve_shift(
        least_squares.Rows(forget=tuple(rows), retain=kept),
        shifts,
        alpha=method.alpha,
        lam=LAM if config.lam is None else config.lam,
    )
    facts = _facts(found, time.perf_counter() - started)
    tokens = {"forget_tokens": sum(map(len, rows)), "retain_tokens": len(kept)}
    return found.delta, facts | tokens | {"accumulate_seconds": read}


def _pooled(
    method: SteeringMethod,
    layers: LayerSlice,
    topics: Sequence[Topic],
    retain: Sequence[Batch],
    rng: torch.Generator,
) -> tuple[Tensor, dict[str, Any]]:
    started = time.perf_counter()
    x, residual = pooled.collect_rows(layers, method, topics, retain, rng)
    read = time.perf_counter() - started
    started = time.perf_counter()
    found = pooled.Pooled().fit(one_matrix.matrix(layers), x, residual, rng)
    return found.delta, {
        "losses": list(found.losses),
        "solve_seconds": time.perf_counter() - started,
        "accumulate_seconds": read,
        "tokens": len(x),
    }


def _facts(found: Solution, seconds: float) -> dict[str, Any]:
    named = ("lam", "before", "forget_loss", "retain_loss", "objective")
    return {name: getattr(found, name) for name in named} | {"solve_seconds": seconds}
