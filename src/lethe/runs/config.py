"""RunConfig: the settings of a run, put together from the sections of the rooms that read them."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import solvers
from lethe.data.settings import Batching, DataSettings
from lethe.errors import InvalidLayerError, InvalidValueError, UnknownNameError, check_choices
from lethe.evaluation.settings import EvalSettings
from lethe.model.settings import ModelSettings
from lethe.system.plugins import load, name_of, nearest

if TYPE_CHECKING:
    from lethe.solvers.protocol import Solver

GRADIENT = "gradient"
"""The solver that takes any method."""

SECTIONS: Mapping[str, type[Any]] = {
    "base": ModelSettings,
    "data": DataSettings,
    "batching": Batching,
    "evaluation": EvalSettings,
}
"""Sections by their field of RunConfig; the solver's settings are one more."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is steered, and where the run is written."""

    layer: int = 7
    """Layer l, counted from 0, at whose output activations are steered; on the command line `auto` takes the one that
    `lethe advise` proposes."""
    train_layers: tuple[int, ...] = ()
    """Layers whose matrices are trained; by default l-2, l-1 and l (those that exist), or l alone if the solver is not
    gradient."""
    train: Literal["matrices", "lora", "everything"] = "matrices"
    """What moves: matrices of the trained layers, LoRA factors beside these, merged in the end (needs PEFT), or every
    parameter, for methods that see tokens."""
    lora_rank: int = 16
    """Rank of LoRA factors."""
    lora_alpha: float = 16.0
    """LoRA's alpha: the factors' product is multiplied by alpha / rank."""
    train_modules: tuple[str, ...] = ()
    """Matrices to train in each of these layers, `mlp.down_proj`; by default the MLP output matrices."""
    on: Path | None = None
    """Run folder of an earlier request on the same model: this one is added to it."""
    withdraw: str | None = None
    """Name of a request in `on` that is taken back instead of adding one (ridge only); a request is named by its run
    folder."""
    seed: int = 0
    """Seed of directions and of the order of rows."""
    as_published: bool = False
    """Repeat the authors' code with every quirk: padding counts in both losses and is on the left, rows in the corpus's
    order, the same retain rows for each topic, 512 tokens for the first topic and the retain corpus and 768 for others,
    raw JSON lines as text, norm of the first batch, no fp32 masters."""
    out: Path = Path("runs/latest")
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Everything about a run but its method. Defaults are the published settings for 7B models.

    `RunConfig.of(model="builtin", layer=5, lr=1e-2)` takes settings of all sections by their own names.
    """

    base: ModelSettings
    data: DataSettings = field(default_factory=DataSettings)
    batching: Batching = field(default_factory=Batching)
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    solver: "Solver" = field(default_factory=lambda: solver_of(GRADIENT, {}))

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise InvalidValueError(f"'seed' must be in [0, 2^63). Got {self.seed}.")
        if self.withdraw is not None and (self.on is None or not self.solver.keeps_requests):
            raise InvalidValueError("'withdraw' needs --on RUN and --solver ridge: it takes a request out of that run.")
        check_choices(self)
        if self.lora_rank < 1:
            raise InvalidValueError(f"'lora_rank' must be at least 1. Got {self.lora_rank}.")
        if self.layer < 0:
            raise InvalidLayerError(f"'layer' must be 0 or more. Got {self.layer}.")
        outside = [layer for layer in self.train_layers if not 0 <= layer <= self.layer]
        if outside:
            raise InvalidLayerError(
                f"'train_layers' must lie in [0, {self.layer}]: a layer after --layer {self.layer} cannot change its "
                f"output. Got {', '.join(map(str, outside))}."
            )
        if self.as_published:
            # Once, here: whoever reads a setting finds what holds.
            for part in ("data", "batching", "solver"):
                object.__setattr__(self, part, getattr(self, part).as_published())

    @classmethod
    def of(cls, **settings: Any) -> "RunConfig":
        """A config from settings of any section by name, `solver` by name or as an object.

        Raises: UnknownNameError for a name that no section has, and what the sections raise.
        """
        own = {field.name for field in dataclasses.fields(RunSettings)}
        parts = dict(_split(settings))
        solver = settings.get("solver", GRADIENT)
        rest = parts.pop("solver", {})
        made = solver_of(solver, rest) if isinstance(solver, str) else _with(solver, rest)
        sections = {name: kind(**parts.get(name, {})) for name, kind in SECTIONS.items()}
        return cls(solver=made, **sections, **{key: value for key, value in settings.items() if key in own})

    def changed(self, **settings: Any) -> "RunConfig":
        """The same with other settings, of any section, by name.

        Another `solver` starts from its own defaults, and keeps what it has in common with the one before.
        Raises: UnknownNameError, as `of`.
        """
        own = {field.name for field in dataclasses.fields(RunSettings)}
        parts = dict(_split(settings))
        changes: dict[str, Any] = {key: value for key, value in settings.items() if key in own}
        changes |= {name: replace(getattr(self, name), **parts[name]) for name in SECTIONS if name in parts}
        solver, rest = settings.get("solver", self.solver), parts.get("solver", {})
        if isinstance(solver, str):
            solver = solver_of(solver, {**_common(solver, self.solver), **rest})
        else:
            solver = _with(solver, rest)
        return replace(self, **changes, solver=solver)

    def settings(self) -> dict[str, Any]:
        """Every setting by name, those of the sections too; the solver by its name."""
        parts = [getattr(self, name) for name in (*SECTIONS, "solver")]
        whole = {key: value for part in parts for key, value in vars(part).items()}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunSettings)}
        return {**whole, **own, "solver": self.solver_name}

    @property
    def solver_name(self) -> str:
        """The name that the solver goes by at the command line and in files."""
        return name_of(type(self.solver))

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """`train_layers`; by default `layer` alone for solvers of one matrix, else l-2, l-1, l as far as these exist.

        The gradient solver moves all of them for one target at `layer`; the others solve each layer for a target of
        its own at its own output.
        """
        if self.solver.is_one_matrix and not self.train_layers:
            return (self.layer,)
        return tuple(sorted(set(self.train_layers))) or tuple(range(max(0, self.layer - 2), self.layer + 1))


def solver_of(name: str, settings: Mapping[str, Any]) -> "Solver":
    """A solver by its name, with these settings.

    Raises: UnknownNameError for a solver, or a setting of it, that does not exist; what the solver raises.
    """
    return _with(load(name, solvers)(), settings)


def _with(solver: "Solver", settings: Mapping[str, Any]) -> "Solver":
    """The solver with other settings.

    Raises: UnknownNameError for a setting that it does not have; what the solver raises.
    """
    fields = list(vars(solver))
    for key in settings:
        if key not in fields:
            raise UnknownNameError(
                f"the solver '{name_of(type(solver))}' has no setting '{key}'.{nearest(key, fields)}\n"
                f"It has {', '.join(fields) or 'none'}. See `lethe ls solvers`."
            )
    return type(solver)(**{**vars(solver), **settings})


def _common(name: str, solver: "Solver") -> dict[str, Any]:
    """Settings of a solver that one of this name has as well."""
    fields = vars(solver_of(name, {}))
    return {key: value for key, value in vars(solver).items() if key in fields}


def _split(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of each section; what no section has is taken for one of the solver."""
    own = {field.name for field in dataclasses.fields(RunSettings)}
    rest = {key: value for key, value in settings.items() if key not in own and key != "solver"}
    for name, kind in SECTIONS.items():
        mine = {field.name for field in dataclasses.fields(kind)}
        if part := {key: rest.pop(key) for key in list(rest) if key in mine}:
            yield name, part
    if rest:
        yield "solver", rest
