"""RSV: add one random vector to forget activations."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.methods.directions import DirectionLaw, random_unit
from lethe.methods.protocol import Shift
from lethe.model.slice import LayerSlice
from lethe.types import State, Topic


@dataclass(frozen=True, kw_only=True)
class RSV(Shift):
    """Steer forget activations to h0 + steering_coeff * v, v a random unit direction per topic."""

    source: ClassVar[str] = "Huu-Tien et al. 2025, arXiv 2501.19202 (RNA); huutiendang/llmu-robustness, trainer rsv"

    steering_coeff: float = 10.0
    """Length c of the vector that is added, in the units of the activation."""
    alpha: float = 1200.0
    """Weight of the retain loss."""
    direction: DirectionLaw = "gaussian"
    """Law of the random direction: gaussian (published), or uniform on [0, 1) per coordinate."""

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        """The topic's direction [d_model]."""
        return {"direction": random_unit(layers.d_model, self.direction, rng).to(layers.device)}

    def shift(self, state: State) -> Float[Tensor, "d_model"]:
        """C * v."""
        return self.steering_coeff * state["direction"]
