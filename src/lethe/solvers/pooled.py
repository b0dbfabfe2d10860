"""LUNAR's published recipe: AdamW on one matrix, over the pooled inputs and targets of all prompts.

Nothing of the model runs while it trains; the closed form (`ridge`) solves the same problem without a loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss

from lethe.errors import DivergedError, EmptyBatchError
from lethe.methods.protocol import SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.solvers.one_matrix import matrix_inputs, residual
from lethe.types import Batch, Topic


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What training found."""

    delta: Float[Tensor, "d_model p"]
    losses: tuple[float, ...]
    """Mean squared error per coordinate over each epoch, as it went on."""


@dataclass(frozen=True, kw_only=True)
class Pooled:
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
