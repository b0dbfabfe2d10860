"""What a solver is: how weights move until a model does what a method says."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lethe.data.batches import Schedule
from lethe.methods.protocol import Method
from lethe.model.slice import LayerSlice
from lethe.model.view import View
from lethe.solvers.training_state import Checkpoint
from lethe.system.last import Last
from lethe.system.progress import Progress
from lethe.types import Batch, HistoryRow, Topic


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """New values of some parameters of `model`, and how they were found."""

    model: PreTrainedModel = field(repr=False)
    """The part of the model that was loaded for it."""
    values: dict[str, Tensor] = field(repr=False)
    history: tuple[HistoryRow, ...] = ()
    warnings: tuple[str, ...] = ()
    facts: tuple[dict[str, Any], ...] = ()
    """What a solver without steps has to say, per matrix."""
    recording_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The size of what a solver would be given."""

    layers: tuple[int, ...]
    """Parameters of each layer that is loaded."""
    first: int
    """The first trained layer."""
    trained: Mapping[str, tuple[int, ...]]
    """Shapes of the trained matrices."""
    d_model: int
    batch_tokens: int
    """Tokens of a batch of the longest rows."""
    topics: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What solving takes beside the loaded weights, by estimate."""

    nbytes: int
    """Memory of copies, gradients, moments or sums."""
    flops: float
    """Of one step; of a closed form, of all solves together, without reading the corpora."""
    passes: int = 1
    """Steps."""


class Log:
    """Hears of a training as it goes; this one keeps its rows and forgets its states."""

    every: int = 10
    """Steps from one state that it is handed to the next."""

    def __init__(self) -> None:
        self.history: list[HistoryRow] = []

    def resume(self) -> Checkpoint | None:
        """Where an interrupted training stopped; `history` then holds its rows so far."""
        return None

    def row(self, row: HistoryRow) -> None:
        """One batch is done."""
        self.history.append(row)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """What is needed to go on from here; its tensors are the live ones, to be saved before it returns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a solver may ask for; parts that take time or memory are made when they are asked for."""

    name: str
    """The run's, by which requests are told apart."""
    seed: int
    view: Callable[[], View[Any, Any]]
    """What the method sees of the model, with what is to be trained in it free to move."""
    layers: Callable[[], tuple[LayerSlice, ...]]
    """For each trained layer, the slice of it alone."""
    schedule: Callable[[int, int], Schedule]
    """The batches of so many steps, each of so many batches."""
    rows: Callable[[], tuple[tuple[Topic, ...], tuple[Batch, ...]]]
    """Every row of the corpora once."""
    rows_key: Hashable = None
    """Equal for works of one seed whose rows are the same."""
    log: Log = field(default_factory=Log)
    progress: Progress = field(default_factory=Progress)
    memo: Mapping[str, Last[Any]]
    """What a solver found for one run and may use for the next, by a name of its own."""
    sums: Path | None = None
    """Where sums are kept, so that requests can be added and withdrawn later."""
    earlier: Path | None = None
    """Sums of the run that this one is put on top of."""
    withdraw: str | None = None
    """Name of a request that is taken back instead of adding one."""


class Solver(Protocol):
    """Moves weights until a model does what a method says; a frozen dataclass with these members."""

    source: ClassVar[str]
    """The paper or code that it comes from."""
    is_one_matrix: ClassVar[bool]
    """Whether it solves each trained layer apart, for a target at its own output."""
    keeps_requests: ClassVar[bool]
    """Whether requests can be added to its edit, and withdrawn."""

    def accepts(self, method: Method) -> str | None:
        """Why it cannot solve for a method; None if it can."""
        ...

    def cost(self, problem: Problem) -> Cost:
        """What it would take, without loading a weight."""
        ...

    def solve(self, method: Method, work: Work) -> Edit:
        """The edit; the model is left untouched.

        Raises: DivergedError, and what `accepts` says as UsageError.
        """
        ...

    def as_published(self) -> "Solver":
        """The same solver with what the authors' code has hard-wired."""
        ...
