"""What a method, a metric and an attack are, and how a folder of them is discovered."""

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.directions import gaussian_like
from lethe.patch import swapped
from lethe.slice import LayerSlice
from lethe.types import Activation, EvalSet, InvalidValueError, Scores, State, Topic

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class SteeringMethod:
    """A rule for two targets at one layer; subclass it, add fields, write `prepare` and `forget_target`.

    A method does not know its solver. It keeps no state of its own: what it finds before training is the
    `State` that it returns, a dict of tensors that the solver hands back and saves with its checkpoints.
    """

    source: ClassVar[str] = ""
    """The paper, and the section or equation, that the method comes from."""

    on_builtin: ClassVar[Mapping[str, Any]] = {}
    """Settings that suit the small built-in model, by field of the method or of RunConfig; they are the command line's
    defaults for it."""

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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under measurement, and the weights that an edit replaced in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Untouched values of the edited parameters, by name; empty for an unedited model."""
    retain_only: "Subject | None" = None
    """The same model trained without the forget set, for metrics that compare with it."""
    known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was already found out about this subject and is asked for by several metrics."""

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns, found out once for each key: generated answers serve many metrics."""
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The untouched model, for as long as the context lasts; the edit is put back on exit, bit for bit."""
        with swapped(self.model, self.originals):
            yield self.model


@runtime_checkable
class Metric(Protocol):
    """Measures one number of a subject on one set.

    A metric is a frozen dataclass with these members; it returns None for a set that has nothing
    it could measure (no questions, no texts).
    """

    source: ClassVar[str]
    """The paper or code that it comes from."""
    better: ClassVar[str]
    """"higher", "lower" or "neither": which way is good on a retain set, as in its scores."""
    chance: ClassVar[str]
    """What no knowledge scores, in words; empty where there is no such level."""
    needs: ClassVar[str]
    """What a set, or a subject, must bring: "questions with choices"; without it the metric returns None."""

    def __call__(self, subject: Subject, data: EvalSet) -> Scores | Mapping[str, Scores] | None:
        """The score with its standard error; or several, by what the metric's name is continued with ("" for one)."""
        ...


@runtime_checkable
class Combination(Protocol):
    """A metric that is worked out from scores of others, such as one number for forget and retain together.

    It says the same of itself as a `Metric`; what it needs are the scores that it combines.
    """

    source: ClassVar[str]
    better: ClassVar[str]
    chance: ClassVar[str]
    needs: ClassVar[str]

    def combine(self, scores: Mapping[str, Scores]) -> Scores | None:
        """The score from those by `metric/set`; None where one that it needs was not measured."""
        ...


def kebab(name: str) -> str:
    """CamelCase to kebab-case: `AdaptiveRMU` is `adaptive-rmu`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def discover(folder: ModuleType) -> dict[str, type]:
    """The public dataclasses of every module in a package, by kebab-case name, sorted."""
    found = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        for name, thing in vars(module).items():
            defined_here = getattr(thing, "__module__", None) == module.__name__
            if (
                isinstance(thing, type)
                and defined_here
                and dataclasses.is_dataclass(thing)
                and not name.startswith("_")
            ):
                found[kebab(name)] = thing
    return dict(sorted(found.items()))
