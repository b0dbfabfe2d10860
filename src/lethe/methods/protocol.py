"""What a method is: what a model should do on a batch. It knows neither its solver nor the model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import InvalidValueError, check_choices
from lethe.methods import _steering_measures as steering
from lethe.methods.directions import gaussian_like
from lethe.model.losses import divergence, masked_mean, masked_mse
from lethe.model.token_view import TokenLogProbs
from lethe.model.view import Disturbance, Recording
from lethe.types import Activation, Batch, HistoryRow, State, Topic

Seen = TypeVar("Seen")


@dataclass(frozen=True, kw_only=True, eq=False)
class Side(Generic[Seen]):
    """One side of a step, forget or retain, as the view of the model shows it."""

    batch: Batch
    frozen: Seen
    """What the untouched model gives on the batch."""
    now: Seen
    """What the current one gives; gradients reach the trained weights."""
    dtype: torch.dtype = torch.float32
    """In which losses are worked out: fp32 beside fp32 masters, else the model's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """One side's loss, and what is worth writing down about it."""

    loss: Float[Tensor, ""]
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers of one step by name, as tensors on the device: all are fetched in one transfer."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What the model should do on forget and on retain batches: a loss for each side.

    A method keeps no state of its own: what it finds before training is the `State` that `prepare` returns, a dict of
    tensors that the solver hands back and saves with its checkpoints.
    """

    source: ClassVar[str] = ""
    """The paper, and the section or equation, that the method comes from."""

    reads: ClassVar[Literal["texts", "prompts"]] = "texts"
    """What its corpora hold: running text, or questions whose answers are to be refused."""

    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings, by field of RunConfig, that differ for this method; they are the command line's defaults."""

    view: ClassVar[Literal["activations", "tokens"]] = "activations"
    """What the method sees of the model: hidden states at a layer, or log-probabilities of tokens."""

    shown: ClassVar[str] = ""
    """What a progress bar tells of a step beside its losses, a format of the step's measures."""

    alpha: float = 10.0
    """Weight of the retain loss."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(f"'{name}' must be a number of 0 or more. Got {value}.")

    @property
    def reads_retain(self) -> bool:
        """Whether retain batches are run at all."""
        return True

    def prepare(self, layers: Any, topic: Topic, rng: torch.Generator) -> State:
        """What is found once per topic through the view of the model, just before the topic's first step."""
        return {}

    def update(self, frozen: Any, state: State) -> State:
        """The state after one more forget batch was seen; most methods learn nothing on the way."""
        return state

    def disturbance(self, recording: Recording[Any], rng: torch.Generator) -> Disturbance | None:
        """What is added inside the current model on a retain batch; None for nothing."""
        return None

    def forget_loss(self, side: Side[Any], state: State) -> Term:
        """What is to be made small on a forget batch."""
        raise NotImplementedError

    def retain_loss(self, side: Side[Any], state: State, rng: torch.Generator) -> Term:
        """What is to be kept small on a retain batch, before `alpha` weighs it."""
        raise NotImplementedError

    def warnings(self, history: Sequence[HistoryRow]) -> tuple[str, ...]:
        """What a user should know about a training so far, each beginning with `topic NAME:`."""
        return ()

    def as_published(self) -> "Method":
        """The same method with the settings that its authors' code has hard-wired."""
        return self


@dataclass(frozen=True, kw_only=True)
class SteeringMethod(Method):
    """A rule for two targets at one layer; subclass it, add fields, write `prepare` and `forget_target`.

    Its loss is the mean squared distance to the targets, and because it has targets, a solver may also ask for these.
    """

    coefficient: ClassVar[str] = "steering_coeff"
    """The field that the forget target is linear in: raising it steers further."""

    shown: ClassVar[str] = "norm {forget_norm_mean:.3g} of {target_norm:.3g}"

    nu: float = 0.0
    """RNA (random noise augmentation, arXiv 2501.19202): standard deviation, per coordinate, of Gaussian noise drawn
    afresh at each step on the retain side; 0 is without. The paper tries 0.01 to 0.1 on 7B models."""
    noise: Literal["target", "input"] = "target"
    """Where RNA's noise goes: on the retain target, the untouched activation (published), or on the hidden state that
    enters the trained layers of the current model, while the target stays clean (what its theory describes)."""

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        """Where forget activations should go; `frozen` is the untouched model's activation on the same tokens."""
        raise NotImplementedError

    def retain_target(self, frozen: Activation, rng: torch.Generator) -> Float[Tensor, "#batch #pos d_model"]:
        """Where retain activations should stay: where the untouched model puts them, give or take RNA's noise."""
        if self.nu == 0 or self.noise != "target":
            return frozen.h
        return frozen.h + self.nu * gaussian_like(frozen.h, rng)

    def forget_loss(self, side: Side[Activation], state: State) -> Term:
        """Mean squared distance to the forget target over counted tokens."""
        target = self.forget_target(side.frozen, state)
        return Term(
            loss=masked_mse(side.now.h.to(side.dtype), target.to(side.dtype), side.batch.mask),
            measures=steering.of_forget(side.now, side.frozen, target, state.get("direction")),
        )

    def retain_loss(self, side: Side[Activation], state: State, rng: torch.Generator) -> Term:
        """Mean squared distance to the retain target over counted tokens."""
        target = self.retain_target(side.frozen, rng)
        # What alpha times the loss averages to at best, because of noise on its target.
        floor = self.alpha * self.nu**2 if self.noise == "target" else 0.0
        return Term(
            loss=masked_mse(side.now.h.to(side.dtype), target.to(side.dtype), side.batch.mask),
            measures={**steering.of_retain(side.now, side.frozen), "retain_floor": torch.tensor(floor)},
        )

    def disturbance(self, recording: Recording[Any], rng: torch.Generator) -> Disturbance | None:
        """RNA's noise, if it goes on the input."""
        if self.nu == 0 or self.noise != "input":
            return None
        return self.nu * gaussian_like(recording.hidden, rng)

    def warnings(self, history: Sequence[HistoryRow]) -> tuple[str, ...]:
        """Topics whose forget norm does not move towards its target."""
        return steering.stalled(history)


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


@dataclass(frozen=True, kw_only=True)
class TokenMethod(Method):
    """A loss of token log-probabilities; subclasses write `forget_loss`. The retain side is one for all of them.

    The untouched model's log-probabilities are those of the recording: a method that compares with it needs no second
    model.
    """

    view: ClassVar[Literal["activations", "tokens"]] = "tokens"

    alpha: float = 1.0
    """Weight of the retain loss; with 0 no retain batch is read."""
    retain_with: Literal["cross-entropy", "kl"] = "cross-entropy"
    """What holds the retain side: the cross-entropy of its tokens, or the KL divergence from the untouched model's
    predictions to the current ones, each a mean over predicted tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    @property
    def reads_retain(self) -> bool:
        """Whether retain batches are run."""
        return self.alpha > 0

    def retain_loss(self, side: Side[TokenLogProbs], state: State, rng: torch.Generator) -> Term:
        """Cross-entropy of retain tokens, or divergence from the untouched model, in nats a token."""
        mask = side.now.mask
        nll = -masked_mean(side.now.of_tokens, mask)
        measures = {"retain_nll": nll, "retain_nll_frozen": -masked_mean(side.frozen.of_tokens, mask)}
        if self.retain_with == "cross-entropy":
            return Term(loss=nll, measures=measures)
        moved = divergence(side.frozen.distribution, side.now.distribution)
        return Term(loss=masked_mean(moved, mask), measures=measures)
