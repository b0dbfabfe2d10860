"""The settings that a run starts from: a method's own, and those that suit the built-in model."""

import dataclasses
from typing import Any

from lethe.runs.config import RunConfig
from lethe.suites.world.settings import BUILTIN, ON_BUILTIN


def defaults(method: type, model: str) -> tuple[Any, RunConfig]:
    """A method, of this class or of its stand-in's, and a run on a model, with what the command line starts from."""
    facts: Any = method
    if model != BUILTIN:
        return method(), RunConfig(model=model, **facts.settings)
    own = {field.name for field in dataclasses.fields(method)}
    fields = {name: value for name, value in facts.on_builtin.items() if name in own}
    rest = {name: value for name, value in facts.on_builtin.items() if name not in own}
    return method(**fields), RunConfig(model=model, **{**ON_BUILTIN, **facts.settings, **rest})
