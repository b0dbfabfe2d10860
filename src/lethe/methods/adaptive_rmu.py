"""Adaptive RMU: RMU whose target length follows the norm of the untouched forget activation."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.methods.directions import DirectionLaw, random_unit
from lethe.methods.protocol import SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.types import Activation, State, Topic


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(SteeringMethod):
    """Steer forget activations to beta * ||h0|| * u, u a random unit direction per topic."""

    source: ClassVar[str] = (
        "Dang et al. 2025, On Effects of Steering Latent Representation, arXiv 2408.06223, section 5"
    )
    coefficient: ClassVar[str] = "beta"

    beta: float = 5.0
    """Length of the forget target as a multiple of the untouched activation's norm; the paper tries 2, 3, 5, 10."""
    alpha: float = 1200.0
    """Weight of the retain loss."""
    norm: Literal["first-batch", "sample", "token", "running"] = "first-batch"
    """Which norm is multiplied: the mean token norm of the topic's first batch, as the published code measures it
    (on the current model, when the topic's turn first comes); of each sample (the paper's text); of each token
    itself; or the running mean over the forget batches seen so far."""
    direction: DirectionLaw = "uniform"
    """Law of the random direction: uniform on [0, 1) per coordinate (published) or gaussian."""

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        """The topic's direction [d_model] and, for `first-batch`, its norm [1]."""
        state = {"direction": random_unit(layers.d_model, self.direction, rng).to(layers.device)}
        if self.norm == "first-batch":
            recording = layers.record(topic.batches[0])
            with torch.no_grad():
                state["norm"] = _mean_norm(Activation(h=layers(recording), mask=recording.batch.mask))
        if self.norm == "running":
            state["norm_sum"] = torch.zeros(1, device=layers.device)
            state["batches"] = torch.zeros(1, device=layers.device)
        return state

    def update(self, frozen: Activation, state: State) -> State:
        """Count one more batch into the running norm."""
        if self.norm != "running":
            return state
        return {
            **state,
            "norm_sum": state["norm_sum"] + _mean_norm(frozen),
            "batches": state["batches"] + 1,
        }

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        """Beta * norm * u, with one norm for all tokens, per sample or per token."""
        if self.norm == "first-batch":
            length = state["norm"][None, None]
        elif self.norm == "running":
            length = (state["norm_sum"] / state["batches"])[None, None]
        elif self.norm == "sample":
            counted = frozen.mask.sum(dim=1).clamp(min=1)
            length = (frozen.norms().masked_fill(~frozen.mask, 0).sum(dim=1) / counted)[:, None, None]
        else:
            length = frozen.norms()[..., None]
        return (self.beta * length * state["direction"]).to(frozen.h.dtype)

    def as_published(self) -> "AdaptiveRMU":
        """With the norm of the first batch and the direction drawn from the positive orthant."""
        return replace(self, norm="first-batch", direction="uniform")


def _mean_norm(activation: Activation) -> Float[Tensor, "1"]:
    return activation.norms().masked_fill(~activation.mask, 0).sum()[None] / activation.mask.sum()
