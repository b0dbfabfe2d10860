"""What a method, a metric and an attack are, and how a folder of them is discovered."""

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.slice import LayerSlice
from lethe.types import Activation, EvalSet, InvalidValueError, Scores, State, Topic


@dataclass(frozen=True, kw_only=True)
class SteeringMethod:
    """A rule for two targets at one layer; subclass it, add fields, write `prepare` and `forget_target`.

    A method does not know its solver. It keeps no state of its own: what it finds before training is the
    `State` that it returns, a dict of tensors that the solver hands back and saves with its checkpoints.
    """

    source: ClassVar[str] = ""
    """The paper, and the section or equation, that the method comes from."""

    on_builtin: ClassVar[Mapping[str, float]] = {}
    """Settings, by field, that suit the small built-in model; they are the command line's defaults for it."""

    alpha: float = 10.0
    """Weight of the retain loss."""

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
        """Where retain activations should stay: where the untouched model puts them."""
        return frozen.h

    def update(self, frozen: Activation, state: State) -> State:
        """The state after one more forget batch was seen; most methods learn nothing on the way."""
        return state

    def as_published(self) -> "SteeringMethod":
        """The same method with the settings that its authors' code has hard-wired."""
        return self


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under measurement, and the weights that an edit replaced in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Untouched values of the edited parameters, by name; empty for an unedited model."""

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The untouched model, for as long as the context lasts; the edit is put back on exit, bit for bit."""
        parameters = dict(self.model.named_parameters())
        edited = {name: parameters[name].detach().clone() for name in self.originals}
        try:
            with torch.no_grad():
                for name, value in self.originals.items():
                    parameters[name].copy_(value)
            yield self.model
        finally:
            with torch.no_grad():
                for name, value in edited.items():
                    parameters[name].copy_(value)


@runtime_checkable
class Metric(Protocol):
    """Measures one number of a subject on one set.

    A metric is a frozen dataclass with these two members; it returns None for a set that has nothing
    it could measure (no questions, no texts).
    """

    source: ClassVar[str]

    def __call__(self, subject: Subject, data: EvalSet) -> Scores | None:
        """The score with its standard error."""
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
