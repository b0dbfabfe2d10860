"""Sums over tokens from which the best edit of one matrix follows in closed form.

With x the matrix's input at a token and D the edit, the layer's output becomes h0 + D x, so a steering loss is linear
least squares in D. All that it needs of a corpus are sums over its tokens: X^T X and the residuals' products with X.
Targets are linear in a method's coefficient, hence sums at coefficients 0 and 1 serve every coefficient.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import EmptyBatchError, InvalidValueError
from lethe.methods.protocol import Shift, SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.solvers.one_matrix import matrix_inputs, residual
from lethe.types import Batch, State

ROWS = 2048
"""Tokens that are gathered before they are added up: each addition passes over the whole p x p matrix."""


PANEL = 1024
"""Rows of the Gram matrix that one product fills, at most: the narrower, the less is computed twice."""


Method = TypeVar("Method", bound=SteeringMethod)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over the counted tokens of one corpus; `+` joins corpora, `-` takes one out again."""

    tokens: int
    gram: Float[Tensor, "p p"]
    """Sum of x x^T."""
    cross: Float[Tensor, "d_model p"] | None = None
    """Sum of R x^T at coefficient 0, R = target - h0; None for retain tokens, whose R is 0."""
    slope: Float[Tensor, "d_model p"] | None = None
    """What a coefficient of 1 adds to `cross`."""
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sum of |R|^2 as a polynomial in the coefficient, constant first."""

    def __add__(self, other: "Moments") -> "Moments":
        return self._joined(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        if other.tokens > self.tokens:
            raise InvalidValueError(
                f"cannot take the sums over {other.tokens} tokens out of sums over {self.tokens}.\n"
                "Remove only what was added before."
            )
        return self._joined(other, -1)

    def to(self, device: torch.device | str) -> "Moments":
        """The same sums on `device`."""
        cross, slope = (None if t is None else t.to(device) for t in (self.cross, self.slope))
        return replace(self, gram=self.gram.to(device), cross=cross, slope=slope)

    def residuals(self, coefficient: float) -> Float[Tensor, "d_model p"] | None:
        """Sum of R x^T at a coefficient; None for retain tokens."""
        if self.cross is None or self.slope is None:
            return None
        return self.cross + coefficient * self.slope

    def square(self, coefficient: float) -> float:
        """Sum of |R|^2 at a coefficient."""
        constant, linear, quadratic = self.squares
        return constant + coefficient * (linear + coefficient * quadratic)

    def _joined(self, other: "Moments", sign: int) -> "Moments":
        if (self.cross is None) != (other.cross is None):
            raise InvalidValueError(
                "sums over forget tokens and over retain tokens cannot be joined: they have different targets.\n"
                "Give them to the solver side by side."
            )

        def both(mine: Tensor | None, yours: Tensor | None) -> Tensor | None:
            return None if mine is None or yours is None else torch.add(mine, yours, alpha=sign)

        a, b, c = (mine + sign * yours for mine, yours in zip(self.squares, other.squares, strict=True))
        return Moments(
            tokens=self.tokens + sign * other.tokens,
            gram=torch.add(self.gram, other.gram, alpha=sign),
            cross=both(self.cross, other.cross),
            slope=both(self.slope, other.slope),
            squares=(a, b, c),
        )


def forget_moments(
    layers: LayerSlice,
    method: SteeringMethod,
    batches: Iterable[Batch],
    state: State,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Moments, State]:
    """Sums over the counted tokens of a topic's batches, accumulated in `dtype`, and the method's state after them.

    Raises: EmptyBatchError if no token counts.
    """
    sums = Accumulator(dtype)
    for batch in batches:
        x, recording = matrix_inputs(layers, batch)
        state = method.update(recording.frozen, state)
        if isinstance(method, Shift):
            sums.add(x)
        else:
            base = residual(_at(method, 0.0), recording, state, dtype)
            sums.add(x, base, residual(_at(method, 1.0), recording, state, dtype) - base)
    found = sums.moments()
    if isinstance(method, Shift):
        # One vector for every token: exact, where differences of rounded targets would not be.
        shift = _at(method, 1.0).shift(state).to(dtype)
        slope = torch.outer(shift, sums.total)
        squares = (0.0, 0.0, found.tokens * shift.square().sum().item())
        found = replace(found, cross=torch.zeros_like(slope), slope=slope, squares=squares)
    return found, state


def retain_moments(layers: LayerSlice, batches: Iterable[Batch], *, dtype: torch.dtype = torch.float64) -> Moments:
    """Sums over the counted tokens of retain batches, accumulated in `dtype`.

    Raises: EmptyBatchError if no token counts.
    """
    sums = Accumulator(dtype)
    for batch in batches:
        sums.add(matrix_inputs(layers, batch)[0])
    return sums.moments()


def _at(method: Method, coefficient: float) -> Method:
    return replace(method, **{method.coefficient: coefficient})


class Accumulator:
    """Adds up products over any number of tokens in the memory of the sums themselves."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.waiting: list[tuple[Tensor, ...]] = []
        self.tokens = 0
        self.gram = self.total = self.crossed = torch.empty(0)
        self.squares = (0.0, 0.0, 0.0)

    def add(self, x: Float[Tensor, "token p"], *residuals: Float[Tensor, "token d_model"]) -> None:
        """Count tokens with their inputs and, for forget tokens, residuals at coefficient 0 and their slope."""
        if residuals:
            base, slope = residuals
            products = (base * base).sum(), 2 * (base * slope).sum(), (slope * slope).sum()
            a, b, c = (old + new.item() for old, new in zip(self.squares, products, strict=True))
            self.squares = (a, b, c)
        self.waiting.append((x, *residuals))
        if sum(len(rows[0]) for rows in self.waiting) >= ROWS:
            self._flush()

    def moments(self) -> Moments:
        """The sums so far; the accumulator is spent."""
        self._flush()
        if self.tokens == 0:
            raise EmptyBatchError("no token counts in the batches of a corpus.\nGive texts of more than one token.")
        panel = _panel(len(self.gram))
        for start in range(0, len(self.gram), panel):
            end = start + panel
            self.gram[end:, start:end] = self.gram[start:end, end:].T
        cross, slope = self.crossed.chunk(2) if self.crossed.numel() else (None, None)
        return Moments(tokens=self.tokens, gram=self.gram, cross=cross, slope=slope, squares=self.squares)

    def _flush(self) -> None:
        if not self.waiting:
            return
        x, *residuals = (torch.cat(rows).to(self.dtype) for rows in zip(*self.waiting, strict=True))
        self.waiting.clear()
        p = x.shape[1]
        if not self.gram.numel():
            self.gram, self.total = x.new_zeros(p, p), x.new_zeros(p)
            self.crossed = x.new_zeros(sum(r.shape[1] for r in residuals), p)
        # The upper triangle alone is half the work.
        panel = _panel(p)
        for start in range(0, p, panel):
            self.gram[start : start + panel, start:].addmm_(x[:, start : start + panel].T, x[:, start:])
        if residuals:
            self.crossed.addmm_(torch.cat(residuals, dim=1).T, x)
        self.total += x.sum(dim=0)
        self.tokens += len(x)


def _panel(p: int) -> int:
    """An eighth of the matrix; products of fewer than 128 rows are slow."""
    return min(PANEL, max(128, p // 8))
