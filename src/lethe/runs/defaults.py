"""The settings that a run starts from: the published ones, or those that suit the model of a suite."""

import dataclasses

from lethe.methods.protocol import Method
from lethe.runs.config import GRADIENT, RunConfig, solver_of
from lethe.suites.protocol import with_model
from lethe.system.plugins import kebab

SOLVERS = {"steps", "accumulate", "lr", "lam"}
"""Settings of solvers that tables of defaults may name."""


def defaults(kind: type[Method], model: str, *, solver: str | None = None) -> tuple[Method, RunConfig]:
    """A method and a run with the settings that the command line starts from for this model, and this solver.

    Raises: InvalidValueError for a solver that does not exist.
    """
    own = {field.name for field in dataclasses.fields(kind)}
    suite = with_model(model)
    of_model = suite.settings(kebab(kind.__name__)) if suite is not None else {}
    settings = {**of_model, **kind.settings, **({"solver": solver} if solver else {})}
    name = settings.pop("solver", GRADIENT)
    # What suits a model tells of every solver, so a setting that this one lacks is none of its business.
    foreign = SOLVERS - vars(solver_of(name, {})).keys()
    method = kind(**{key: value for key, value in settings.items() if key in own})
    rest = {key: value for key, value in settings.items() if key not in own and key not in foreign}
    return method, RunConfig.of(model=model, solver=name, **rest)
