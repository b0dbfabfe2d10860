"""What a method, a metric and an attack are, and how a folder of them is discovered."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import InvalidValueError
from lethe.methods.directions import gaussian_like
from lethe.model.slice import LayerSlice
from lethe.types import Activation, State, Topic


@dataclass(frozen=True, kw_only=True)
class SteeringMethod:
    """A rule for two targets at one layer; subclass it, add fields, write `prepare` and `forget_target`.

    A method does not know its solver. It keeps no state of its own: what it finds before training is the
    `State` that it returns, a dict of tensors that the solver hands back and saves with its checkpoints.
    """

    source: ClassVar[str] = ""
    """The paper, and the section or equation, that the method comes from."""

    coefficient: ClassVar[str] = "steering_coeff"
    """The field that the forget target is linear in: raising it steers further."""

    reads: ClassVar[Literal["texts", "prompts"]] = "texts"
    """What its corpora hold: running text, or questions whose answers are to be refused."""

    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings, by field of RunConfig, that differ for this method; they are the command line's defaults."""

    alpha: float = 10.0
    """Weight of the retain loss."""
    nu: float = 0.0
    """RNA (random noise augmentation, arXiv 2501.19202): standard deviation, per coordinate, of Gaussian noise drawn
    afresh at each step on the retain side; 0 is without. The paper tries 0.01 to 0.1 on 7B models."""
    noise: Literal["target", "input"] = "target"
    """Where RNA's noise goes: on the retain target, the untouched activation (published), or on the hidden state that
    enters the trained layers of the current model, while the target stays clean (what its theory describes)."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(f"'{name}' must be a number of 0 or more. Got {value}.")

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        """What is found once per topic, just before the topic's first step."""
        raise NotImplementedError

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        """Where forget activations should go; `frozen` is the untouched model's activation on the same tokens."""
        raise NotImplementedError

    def retain_target(self, frozen: Activation, rng: torch.Generator) -> Float[Tensor, "#batch #pos d_model"]:
        """Where retain activations should stay: where the untouched model puts them, give or take RNA's noise."""
        if self.nu == 0 or self.noise != "target":
            return frozen.h
        return frozen.h + self.nu * gaussian_like(frozen.h, rng)

    @property
    def retain_floor(self) -> float:
        """What alpha times the retain loss averages to at best: alpha * nu^2 with noise on the target, else 0."""
        return self.alpha * self.nu**2 if self.noise == "target" else 0.0

    def update(self, frozen: Activation, state: State) -> State:
        """The state after one more forget batch was seen; most methods learn nothing on the way."""
        return state

    def as_published(self) -> "SteeringMethod":
        """The same method with the settings that its authors' code has hard-wired."""
        return self


@dataclass(frozen=True, kw_only=True)
class Shift(SteeringMethod):
    """A steering method that adds one and the same vector to every forget activation; subclasses write `shift`."""

    steering_coeff: float = 1.0
    """Multiple of the method's vector that is added."""

    def shift(self, state: State) -> Float[Tensor, "d_model"]:
        """The vector that is added to the untouched activation, in fp32."""
        raise NotImplementedError

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        """The untouched activation plus the shift."""
        return (frozen.h.float() + self.shift(state)).to(frozen.h.dtype)
