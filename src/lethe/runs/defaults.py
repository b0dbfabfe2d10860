"""The settings that a run starts from: the published ones, or those that suit the model of a suite."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lethe import solvers, suites
from lethe.runs.config import GRADIENT, RunConfig
from lethe.system.plugins import catalogue, kebab, load


def defaults(
    kind: type, model: str, *, solver: str | None = None, find: Callable[[str, ModuleType], type] = load
) -> tuple[Any, RunConfig]:
    """A method, of this class or of its stand-in's, and a run on a model, with what the command line starts from.

    `find` is how a solver is found by its name: `look_up` finds a stand-in, which needs no torch.

    Raises: UnknownNameError for a solver that does not exist.
    """
    facts: Any = kind
    suite: Any = catalogue(suites).get(model)
    suited = getattr(suite, "suits", {}), getattr(suite, "suits_methods", {}).get(kebab(kind.__name__), {})
    settings = {**suited[0], **facts.settings, **suited[1]}
    name = solver or settings.pop("solver", GRADIENT)
    settings.pop("solver", None)
    of_method = {field.name for field in dataclasses.fields(kind)}
    solver_kind = find(name, solvers)
    of_solver = {field.name for field in dataclasses.fields(solver_kind)}
    # What suits a model tells of every solver, so a setting that this one lacks is none of its business.
    of_others = {field.name for other in catalogue(solvers).values() for field in dataclasses.fields(other)} - of_solver
    chosen = solver_kind(**{key: value for key, value in settings.items() if key in of_solver})
    rest = {key: value for key, value in settings.items() if key not in of_method | of_solver | of_others}
    method = kind(**{key: value for key, value in settings.items() if key in of_method})
    return method, RunConfig.of(model=model, solver=chosen, **rest)
