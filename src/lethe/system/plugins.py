"""Shelves of plug-ins: what a package's files define, by name."""

import dataclasses
import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable
from types import ModuleType


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?`, or nothing if no known name is as near as `cutoff`, in [0, 1]."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{found[0]}'?" if found else ""


def kebab(name: str) -> str:
    """CamelCase to kebab-case: `AdaptiveRMU` is `adaptive-rmu`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def discover(folder: ModuleType) -> dict[str, type]:
    """The plug-ins of a package, by kebab-case name, sorted: public dataclasses that name their `source`."""
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
                and getattr(thing, "source", "")
            ):
                found[kebab(name)] = thing
    return dict(sorted(found.items()))
