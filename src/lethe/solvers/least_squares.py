"""The closed form of steering by one matrix: linear least squares, anchored at the original weights.

The objective of an edit D, per coordinate, is the one that the gradient solver descends, plus a penalty:

    J(D) = 1/d * [ mean over topics of 1/n_k sum |D x - R|^2  +  alpha * 1/n_r sum |D x|^2  +  lam * s * |D|^2 ]

with the sums over forget and retain tokens and s the mean of the diagonal of the weighted Gram matrix, which makes
lam a number without unit. Its optimum is D = B A^-1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import InvalidValueError
from lethe.solvers.sums import ROWS, Accumulator, Moments

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of lam that are tried where none is given."""


SUGGESTED = 1e-3
"""The lam that an error recommends."""


SAMPLE = 2048
"""Rows, at most, that the preconditioner of conjugate gradients knows."""


SAMPLE_SHARE = 8
"""It knows one row of this many."""


DIRECT = 2048
"""Up to this many inputs a square matrix is sooner made and factorised than conjugate gradients converge."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """One topic of the forget loss: its sums, and how far to steer it."""

    moments: Moments
    coefficient: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The best edit, and its losses per coordinate as the gradient solver counts them."""

    delta: Float[Tensor, "d_model p"]
    lam: float
    forget_loss: float
    retain_loss: float
    """Before it is weighted by alpha; 0 where there are no retain tokens."""
    objective: float
    """Forget loss, plus alpha times retain loss, plus the penalty."""
    before: float
    """The objective without an edit."""


def solve(forget: Sequence[Term], retain: Sequence[Moments], *, alpha: float, lam: float) -> Solution:
    """The edit that minimises the objective, by Cholesky factorisation, in the dtype of the sums.

    Raises: InvalidValueError if the sums do not determine the edit (lam 0 and fewer tokens than inputs, say).
    """
    _check(alpha, lam, len(forget), sum(m.tokens for m in retain))
    gram, scale = _weighted_gram(forget, retain, alpha)
    if math.isinf(lam):
        delta = torch.zeros_like(_residuals(forget[0]))
        return _solution(delta, forget, retain, alpha, lam, 0.0)
    target = _residuals(forget[0]) / (len(forget) * forget[0].moments.tokens)
    for term in forget[1:]:
        target += _residuals(term) / (len(forget) * term.moments.tokens)
    tokens = sum(term.moments.tokens for term in forget) + sum(m.tokens for m in retain)
    delta = _cholesky(gram, scale, target.T, lam, tokens).T
    return _solution(delta, forget, retain, alpha, lam, lam * scale)


def losses(delta: Float[Tensor, "d_model p"], forget: Sequence[Term], retain: Sequence[Moments]) -> tuple[float, float]:
    """Forget and retain loss of any edit, per coordinate; the retain loss is 0 where there are no retain tokens.

    The forget loss is a difference of sums: it is exact to the rounding of the loss without an edit.
    """
    width = len(delta)
    forget_loss = 0.0
    for term in forget:
        moments = term.moments
        error = _quadratic(delta, moments.gram) - 2 * (delta * _residuals(term)).sum().item()
        error = max(0.0, error + moments.square(term.coefficient))
        forget_loss += error / (len(forget) * moments.tokens * width)
    tokens = sum(moments.tokens for moments in retain)
    retained = sum(_quadratic(delta, moments.gram) for moments in retain)
    return forget_loss, retained / (tokens * width) if tokens else 0.0


def choose_lam(
    fit_forget: Sequence[Term],
    fit_retain: Sequence[Moments],
    held_forget: Sequence[Term],
    held_retain: Sequence[Moments],
    *,
    alpha: float,
    grid: Sequence[float] = GRID,
) -> float:
    """The lam of the grid whose edit has the lowest objective, without the penalty, on tokens that were held out."""

    def held_out(lam: float) -> float:
        delta = solve(fit_forget, fit_retain, alpha=alpha, lam=lam).delta
        forget_loss, retain_loss = losses(delta, held_forget, held_retain)
        return forget_loss + alpha * retain_loss

    return min(grid, key=held_out)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Inputs of the matrix at every counted token, for problems that need no sums of them."""

    forget: tuple[Float[Tensor, "_ p"], ...]
    """By topic."""
    retain: Float[Tensor, "_ p"]


def solve_shift(
    rows: Rows,
    shifts: Sequence[Float[Tensor, "d_model"]],
    *,
    alpha: float,
    lam: float,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
) -> Solution:
    """The best edit where topic k's forget tokens are all to gain the vector `shifts[k]`: of rank one per topic.

    It is the sum of r_k s_k^T, r_k the shift and s_k = A^-1 (mean input of the topic) / topics. Where A would be
    large, s is found by conjugate gradients on the rows themselves, in fp32 or their own fp64; `tolerance` bounds
    the residual relative to the right-hand side.

    Raises: InvalidValueError if `max_steps` do not reach the tolerance, or a small A is singular.
    """
    _check(alpha, lam, len(rows.forget), len(rows.retain))
    dtype = torch.promote_types(rows.retain.dtype, torch.float32)
    forget, retain = [x.to(dtype) for x in rows.forget], rows.retain.to(dtype)
    topics, shift = len(forget), torch.stack([vector.to(dtype) for vector in shifts])
    weighted = [(x, 1 / (topics * len(x))) for x in forget]
    if alpha > 0:
        weighted.append((retain, alpha / len(retain)))
    # The columns share every pass over the rows.
    target = torch.stack([x.mean(dim=0) / topics for x in forget], dim=1)
    if math.isinf(lam):
        found, penalty = torch.zeros_like(target), 0.0
    elif len(target) <= DIRECT:
        found, penalty = _direct(weighted, target, lam)
    else:
        found, penalty = _conjugate_gradients(weighted, target, lam, tolerance, max_steps)

    width, overlap = shift.shape[1], shift @ shift.T
    forget_loss = 0.0
    for topic, x in enumerate(forget):
        gained = x @ found
        gained[:, topic] -= 1
        forget_loss += _energy(gained, overlap) / (topics * len(x) * width)
    retain_loss = _energy(retain @ found, overlap) / (len(retain) * width) if len(retain) else 0.0
    return Solution(
        delta=shift.T @ found.T,
        lam=lam,
        forget_loss=forget_loss,
        retain_loss=retain_loss,
        objective=forget_loss + alpha * retain_loss + penalty * _energy(found, overlap) / width,
        before=overlap.diagonal().mean().item() / width,
    )


def _energy(gained: Tensor, overlap: Tensor) -> float:
    """Sum of |c_1 r_1 + c_2 r_2 + ...|^2 over rows of coefficients, given the products of the r."""
    return (gained @ overlap).mul_(gained).sum().item()


def _direct(weighted: Sequence[tuple[Tensor, float]], target: Tensor, lam: float) -> tuple[Tensor, float]:
    """The solution for each column of `target`, and the penalty lam s."""
    gram = target.new_zeros(len(target), len(target))
    for x, weight in weighted:
        sums = Accumulator(target.dtype)
        for chunk in x.split(ROWS):
            sums.add(chunk)
        gram.add_(sums.moments().gram, alpha=weight)
    tokens = sum(len(x) for x, _ in weighted)
    scale = gram.diagonal().mean().item()
    return _cholesky(gram, scale, target, lam, tokens), lam * scale


def _cholesky(gram: Tensor, scale: float, target: Tensor, lam: float, tokens: int) -> Tensor:
    """Solve (gram + lam scale I) s = b for each column b of `target`; overwrites the Gram matrix."""
    gram.diagonal().add_(lam * scale)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square() / gram.diagonal()
    # A pivot that is all rounding belongs to an input that the others already determine.
    noise = 8 * torch.finfo(gram.dtype).eps
    if info.item() != 0 or (lam == 0 and not bool((pivots > noise).all())):
        raise InvalidValueError(
            f"the Gram matrix is singular with lam {lam:g}: {tokens} tokens do not determine an edit of "
            f"{len(gram)} inputs.\nSet --lam to a positive number, {SUGGESTED:g} say."
        )
    return torch.cholesky_solve(target, factor)


def _conjugate_gradients(
    weighted: Sequence[tuple[Tensor, float]], target: Tensor, lam: float, tolerance: float, max_steps: int
) -> tuple[Tensor, float]:
    """The solution for each column of `target`, and the penalty lam s."""
    diagonal = torch.zeros_like(target[:, 0])
    for x, weight in weighted:
        for chunk in x.split(ROWS):
            diagonal.add_(chunk.square().sum(dim=0), alpha=weight)
    penalty = lam * diagonal.mean().item()

    def product(v: Tensor) -> Tensor:
        total = penalty * v
        # Portions that stay in the cache until they are read again were slower: threads wait for each other.
        for x, weight in weighted:
            total.addmm_(x.T, x @ v, alpha=weight)
        return total

    tiny = torch.finfo(target.dtype).tiny
    precondition = _preconditioner(weighted, diagonal + penalty)
    solution, rest = torch.zeros_like(target), target.clone()
    allowed = tolerance * target.norm(dim=0)
    direction, energy = torch.zeros_like(target), torch.full_like(allowed, torch.inf)
    for _ in range(max_steps):
        if bool((rest.norm(dim=0) <= allowed).all()):
            return solution, penalty
        scaled = precondition(rest)
        previous, energy = energy, (rest * scaled).sum(dim=0)
        # A column that is solved exactly has nothing left to divide by.
        direction = scaled + energy / previous.clamp_min(tiny) * direction
        moved = product(direction)
        step = energy / (direction * moved).sum(dim=0).clamp_min(tiny)
        solution, rest = solution + step * direction, rest - step * moved
    left = (rest.norm(dim=0) / target.norm(dim=0)).max().item()
    raise InvalidValueError(
        f"conjugate gradients with lam {lam:g} left {left:.2g} of the right-hand side after {max_steps} steps.\n"
        f"Set --lam higher, {max(SUGGESTED, 10 * lam):g} say."
    )


def _preconditioner(weighted: Sequence[tuple[Tensor, float]], diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse, by Woodbury's identity, of the diagonal plus the weighted X^T X as a sample of the rows shows it.

    A row is drawn with a probability in proportion to its weight. With a few hundred strong directions in the rows,
    an eighth of them halves the steps.
    """
    scale = torch.where(diagonal > 0, diagonal, 1)[:, None]
    lengths = [len(x) for x, _ in weighted]
    weights = torch.cat([torch.full((n,), weight) for n, (_, weight) in zip(lengths, weighted, strict=True)])
    drawn = torch.multinomial(
        weights, max(1, min(SAMPLE, len(weights) // SAMPLE_SHARE)), generator=torch.Generator().manual_seed(0)
    )
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sample = torch.cat([
        x[(drawn[(drawn >= start) & (drawn < start + len(x))] - start).to(x.device)]
        for start, (x, _) in zip(starts, weighted, strict=True)
    ])  # fmt: skip
    sample *= (weights.sum() / len(sample)).sqrt().item()
    inner = sample @ (sample.T / scale)
    inner.diagonal().add_(1)
    # As a matrix: triangular solves with one column keep threads waiting for each other.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))

    def apply(rest: Tensor) -> Tensor:
        scaled = rest / scale
        return scaled - sample.T @ (inverse @ (sample @ scaled)) / scale

    return apply


def _solution(
    delta: Tensor, forget: Sequence[Term], retain: Sequence[Moments], alpha: float, lam: float, penalty: float
) -> Solution:
    forget_loss, retain_loss = losses(delta, forget, retain)
    squares = sum(term.moments.square(term.coefficient) / term.moments.tokens for term in forget)
    return Solution(
        delta=delta,
        lam=lam,
        forget_loss=forget_loss,
        retain_loss=retain_loss,
        objective=forget_loss + alpha * retain_loss + penalty * delta.square().sum().item() / len(delta),
        before=squares / (len(forget) * len(delta)),
    )


def _weighted_gram(forget: Sequence[Term], retain: Sequence[Moments], alpha: float) -> tuple[Tensor, float]:
    """The weighted Gram matrix, and the mean of its diagonal."""
    tokens = sum(moments.tokens for moments in retain)
    weighted = [(term.moments.gram, 1 / (len(forget) * term.moments.tokens)) for term in forget]
    weighted += [(moments.gram, alpha / tokens) for moments in retain if alpha > 0]
    gram = torch.zeros_like(weighted[0][0])
    for matrix, weight in weighted:
        gram.add_(matrix, alpha=weight)
    return gram, gram.diagonal().mean().item()


def _residuals(term: Term) -> Tensor:
    found = term.moments.residuals(term.coefficient)
    if found is None:
        raise InvalidValueError("the sums of a forget topic have no targets.\nAccumulate them with forget_moments.")
    return found


def _quadratic(delta: Tensor, gram: Tensor) -> float:
    """Sum over tokens of |D x|^2."""
    return (delta @ gram).mul_(delta).sum().item()


def _check(alpha: float, lam: float, topics: int, retain_tokens: int) -> None:
    if not (math.isfinite(alpha) and alpha >= 0):
        raise InvalidValueError(f"'alpha' must be a number of 0 or more. Got {alpha}.")
    if not lam >= 0:
        raise InvalidValueError(f"'lam' must be a number of 0 or more. Got {lam}.")
    if topics == 0:
        raise InvalidValueError("an edit needs at least one forget topic. Got none.")
    if alpha > 0 and retain_tokens == 0:
        raise InvalidValueError(f"'alpha' is {alpha:g}, but there are no retain tokens.\nGive a retain corpus.")
