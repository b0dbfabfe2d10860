"""LUNAR's published recipe: AdamW on one matrix, over the pooled inputs and targets of all prompts.

Nothing of the model runs while it trains; the closed form (`ridge`) solves the same problem without a loop.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from lethe.errors import DivergedError, EmptyBatchError, UsageError
from lethe.methods.protocol import Method, SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.solvers.one_matrix import check_linear, cost_of_sums, edited, matrix, matrix_inputs, refusal, residual
from lethe.solvers.protocol import Cost, Edit, Problem, Work
from lethe.types import Batch, Topic


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """AdamW on each matrix's pooled inputs and outputs, as LUNAR's code does."""

    source: ClassVar[str] = "Shen et al. 2025, LUNAR, arXiv 2502.07218; facebookresearch/LUNAR"
    is_one_matrix: ClassVar[bool] = True
    keeps_requests: ClassVar[bool] = False

    def accepts(self, method: Method) -> str | None:
        """A steering method without noise."""
        return refusal(method, "pooled")

    def as_published(self) -> "Pooled":
        """Itself: it is the published recipe."""
        return self

    def cost(self, problem: Problem) -> Cost:
        """The sums over all rows, and their solves."""
        return cost_of_sums(problem)

    def solve(self, method: Method, work: Work) -> Edit:
        """Train each matrix for its own targets on the untouched model.

        Raises: UnknownModuleError if a layer's output is not linear in its matrix; DivergedError; UsageError on top of
        an earlier run.
        """
        assert isinstance(method, SteeringMethod)
        if work.earlier is not None:
            raise UsageError("--solver pooled has no sums that a request could be added to.\nPass --solver ridge.")
        slices, (topics, retain) = work.layers(), work.rows()
        work.progress.phase("solve (pooled)", len(slices))
        values: dict[str, Tensor] = {}
        facts: list[dict[str, Any]] = []
        for place, layers in enumerate(slices):
            (name,) = layers.trained
            work.memo[f"linear {place}"](name, lambda layers=layers: check_linear(layers, topics[0].batches[0]))
            rng = torch.Generator().manual_seed(work.seed)
            started = time.perf_counter()
            x, gained = collect_rows(layers, method, topics, retain, rng)
            read = time.perf_counter()
            fit = Recipe().fit(matrix(layers), x, gained, rng)
            values |= edited(layers, fit.delta)
            facts.append(
                {
                    "matrix": name,
                    "solver": "pooled",
                    "losses": list(fit.losses),
                    "solve_seconds": time.perf_counter() - read,
                    "accumulate_seconds": read - started,
                    "tokens": len(x),
                }
            )
            work.progress.advance(name)
        return Edit(
            model=slices[0].model,
            values=values,
            facts=tuple(facts),
            recording_seconds=sum(layers.recording_seconds for layers in slices),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What training found."""

    delta: Float[Tensor, "d_model p"]
    losses: tuple[float, ...]
    """Mean squared error per coordinate over each epoch, as it went on."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW from the original matrix on the plain mean over rows: a forget row weighs as much as a retain row.

    Source: facebookresearch/LUNAR (arXiv 2502.07218), in fp32 where its code has bf16 throughout.
    """

    lr: float = 1e-2
    """Learning rate of the first epoch."""
    decay: float = 0.9
    """What the learning rate is multiplied by after each epoch."""
    weight_decay: float = 0.01
    """AdamW's; it pulls the matrix itself towards zero, not its change."""
    epochs: int = 20
    """Passes over all rows."""
    batch_size: int = 64
    """Rows of one step."""

    def fit(
        self,
        matrix: Float[Tensor, "d_model p"],
        x: Float[Tensor, "n p"],
        residual: Float[Tensor, "n d_model"],
        rng: torch.Generator,
    ) -> Fit:
        """Train a copy of `matrix` until its outputs have gained the residuals.

        Raises: DivergedError if the loss of an epoch is not finite.
        """
        original = matrix.detach().float()
        weight = original.clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([weight], lr=self.lr, weight_decay=self.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)
        x, target = x.float(), torch.addmm(residual.float(), x.float(), original.T)
        losses: list[float] = []
        for epoch in range(self.epochs):
            total = 0.0
            for rows in torch.randperm(len(x), generator=rng).to(x.device).split(self.batch_size):
                loss = mse_loss(x[rows] @ weight.T, target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(rows)
            schedule.step()
            losses.append(total / len(x))
            if not torch.tensor(losses[-1]).isfinite():
                raise DivergedError(
                    f"training on pooled rows diverged in epoch {epoch}: the loss is {losses[-1]}.\n"
                    "Lower the coefficient, or pass --solver ridge, which needs no learning rate."
                )
        return Fit(delta=weight.detach() - original, losses=tuple(losses))


def collect_rows(
    layers: LayerSlice,
    method: SteeringMethod,
    topics: Sequence[Topic],
    retain: Sequence[Batch],
    rng: torch.Generator,
) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n d_model"]]:
    """Input of the trained matrix and the residual it should gain, at every counted token, in fp32.

    Raises: EmptyBatchError if no token counts.
    """
    inputs, residuals = [], []
    for topic in topics:
        state = method.prepare(layers, topic, rng)
        for batch in topic.batches:
            x, recording = matrix_inputs(layers, batch)
            state = method.update(recording.frozen, state)
            inputs.append(x.float())
            residuals.append(residual(method, recording, state, torch.float32))
    for batch in retain:
        inputs.append(matrix_inputs(layers, batch)[0].float())
        residuals.append(inputs[-1].new_zeros(len(inputs[-1]), layers.d_model))
    x = torch.cat(inputs)
    if len(x) == 0:
        raise EmptyBatchError("no token counts in the batches of any corpus.\nGive texts of more than one token.")
    return x, torch.cat(residuals)
