"""RMU: steer forget activations to one fixed random vector per topic."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.methods.directions import DirectionLaw, random_unit
from lethe.methods.protocol import SteeringMethod
from lethe.model.slice import LayerSlice
from lethe.types import Activation, State, Topic


@dataclass(frozen=True, kw_only=True)
class RMU(SteeringMethod):
    """Steer forget activations to steering_coeff * u, u a random unit direction per topic."""

    source: ClassVar[str] = "Li et al. 2024, The WMDP Benchmark, arXiv 2403.03218, section 4"

    steering_coeff: float = 6.5
    """Length c of the forget target, in the units of the activation; above the norm of forget tokens at the layer."""
    alpha: float = 1200.0
    """Weight of the retain loss."""
    direction: DirectionLaw = "uniform"
    """Law of the random direction: uniform on [0, 1) per coordinate (published) or gaussian."""

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        """The topic's direction [d_model]."""
        return {"direction": random_unit(layers.d_model, self.direction, rng).to(layers.device)}

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        """C * u, the same for every token."""
        return (self.steering_coeff * state["direction"])[None, None].to(frozen.h.dtype)

    def as_published(self) -> "RMU":
        """With the direction drawn from the positive orthant."""
        return replace(self, direction="uniform")
