"""The flags of a run: the settings of its method, its sections and its solver, each by its own name."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from tyro.conf import arg

from lethe import solvers
from lethe.cli.console import parse
from lethe.methods.protocol import Method
from lethe.runs.config import SECTIONS, RunConfig, RunSettings
from lethe.runs.config_file import method_name
from lethe.system.plugins import discover

SOLVER = "How the matrices are found; each solver has flags of its own: --solver NAME --help."


def value_of(flag: str, argv: Sequence[str]) -> str | None:
    """The value of a flag that decides which other flags there are, read before they are parsed; the last one wins."""
    found = None
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            found = value
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def parse_run(
    command: str, method: Method, run: RunConfig, argv: list[str], *own: tuple[str, Any, Any]
) -> tuple[Any, Method, RunConfig]:
    """Parse flags of a method and a run that start from these; `own` fields are the command's, and come back first."""
    names = tuple(discover(solvers))
    about = {field.name: getattr(run, field.name) for field in dataclasses.fields(RunSettings)}
    flags = dataclasses.make_dataclass(
        "Flags",
        [
            *own,
            ("method", type(method), method),
            *((name, type(getattr(run, name)), getattr(run, name)) for name in SECTIONS),
            ("solver", Annotated[Literal[names], arg(help=SOLVER)], run.solver_name),
            ("of_solver", type(run.solver), run.solver),
            ("run", RunSettings, RunSettings(**about)),
        ],
        frozen=True,
        kw_only=True,
    )
    description = f"{type(method).__doc__}\n\nSource: {method.source}"
    chosen = parse(flags, argv, f"{command} {method_name(method)}", description)
    sections = {name: getattr(chosen, name) for name in SECTIONS}
    return chosen, chosen.method, RunConfig(**sections, solver=chosen.of_solver, **vars(chosen.run))
