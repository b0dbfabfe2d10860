"""A grid of settings: `layer=3,7 beta=2,3` becomes runs that differ in these settings and in their seeds."""

import dataclasses
import itertools
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from lethe.errors import InvalidValueError, UnknownNameError, UsageError
from lethe.methods.protocol import Method
from lethe.runs.config import SECTIONS, RunConfig, RunSettings
from lethe.system.plugins import nearest


@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers between two, both included, as a search takes them."""

    low: float | int
    high: float | int
    is_log: bool = False
    """Whether equal factors are equally likely, not equal differences."""
    is_whole: bool = False
    """Whether it holds whole numbers only."""

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}" + ":log" * self.is_log


Axes = Mapping[str, tuple[Any, ...] | Range]
"""By field of the method or of RunConfig."""


FIXED = {
    "seed": "Pass --seeds 0 1 2.",
    "out": "Each cell has a folder of its own below --out.",
    "limit": "Pass --limit N, or --proxy N.",
    **dict.fromkeys(
        ("model", "revision", "dtype", "device", "threads", "evaluate"),
        "Make one sweep for each value: cells share it.",
    ),
    **dict.fromkeys(
        (
            "data",
            "forget_questions",
            "adjacent_questions",
            "retain_questions",
            "scoring",
            "split",
            "samples",
            "holdout",
        ),
        "Make one sweep for each value: cells are compared, so all are measured on the same questions.",
    ),
    **dict.fromkeys(("on", "withdraw"), "A sweep starts from the untouched model."),
}
"""Settings that are the same for all cells, and what to do instead."""


LONGEST = 255
"""Most bytes of a folder's name that file systems take."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid."""

    name: str
    """Its folder's name."""
    method: Method
    config: RunConfig
    settings: dict[str, Any]
    """By field of the method or of RunConfig, without the seed."""


def parse(words: Sequence[str], method: Method, config: RunConfig) -> Axes:
    """The values of each setting from words like `layer=3,7,11`; several numbers as one value are joined by `+`.

    A number may have a range, `beta=1..10` or `lr=1e-5..1e-3:log`.

    Raises: UsageError for an empty grid or a word that is no assignment; UnknownNameError for a setting that neither
    the method nor RunConfig has; InvalidValueError for a value of another type, or an empty range.
    """
    if not words:
        raise UsageError("the grid is empty.\nName settings and values: --grid layer=3,7,11 beta=2,3,5")
    kinds = {**_kinds(config), **{field.name: field.type for field in dataclasses.fields(method)}}
    axes: dict[str, tuple[Any, ...] | Range] = {}
    for word in words:
        key, is_assigned, values = word.partition("=")
        name = key.strip().lstrip("-").replace("-", "_")
        if not is_assigned:
            raise UsageError(f"'{word}' is no setting with values.\nWrite {name or 'layer'}=VALUE,VALUE,...")
        if name in FIXED:
            raise UsageError(f"'{name}' cannot stand in a grid.\n{FIXED[name]}")
        if name not in kinds:
            raise UnknownNameError(
                f"neither {type(method).__name__} nor a run has a setting '{name}'.{nearest(name, kinds)}\n"
                f"Settings of the method: {', '.join(f.name for f in dataclasses.fields(method))}."
            )
        if name in axes:
            raise UsageError(f"'{name}' stands in the grid twice.\nWrite all its values in one word: {name}=1,2")
        found = [part.strip() for part in values.split(",") if part.strip()]
        if not found:
            raise UsageError(f"'{name}' has no value in the grid.\nWrite {name}=VALUE,VALUE,...")
        number = _number(kinds[name])
        if number is not None and ".." in values:
            axes[name] = _range(name, values.strip(), number)
            continue
        axes[name] = tuple(dict.fromkeys(_value(name, text, kinds[name]) for text in found))
    return axes


def cells(method: Method, config: RunConfig, axes: Axes, seeds: Sequence[int], folder: Path) -> list[Cell]:
    """Every combination of values with every seed, in an order in which neighbours share most.

    A range stands for its ends; whole numbers that decide what is recorded stand for themselves.

    Raises: InvalidValueError for a value out of its range; UsageError without a seed.
    """
    if not seeds:
        raise UsageError("there is no seed.\nPass --seeds 0 1 2.")
    listed = {name: _ends(name, values) if isinstance(values, Range) else values for name, values in axes.items()}
    own = {field.name for field in dataclasses.fields(method)}
    found = []
    order = sorted(axes, key=lambda name: _rank(name, own))
    for seed in dict.fromkeys(seeds):
        for values in itertools.product(*(listed[name] for name in order)):
            chosen = dict(zip(order, values, strict=True))
            settings = {name: chosen[name] for name in axes}
            name = "_".join(f"{key}-{_as_name(value)}" for key, value in {**settings, "seed": seed}.items())
            of_method = {key: value for key, value in settings.items() if key in own}
            of_run = {key: value for key, value in settings.items() if key not in own}
            found.append(
                Cell(
                    name=name,
                    method=dataclasses.replace(method, **of_method),
                    config=config.changed(**of_run, seed=seed, out=folder / name),
                    settings=settings,
                )
            )
    longest = max((cell.name for cell in found), key=lambda name: len(name.encode()))
    if len(longest.encode()) > LONGEST:
        raise UsageError(
            f"the grid gives folders of names longer than {LONGEST} bytes: {longest[:40]}...\n"
            "Name files by shorter paths, or sweep fewer settings at once."
        )
    if len({cell.name for cell in found}) < len(found):
        raise UsageError(
            "two values of the grid give the same folder name.\nName files that differ in more than signs."
        )
    return found


def _kinds(config: RunConfig) -> dict[str, Any]:
    """The type of every setting of a run by name, those of its sections and of its solver among them."""
    sections = [getattr(config, name) for name in SECTIONS]
    parts: list[Any] = [RunSettings, *sections, config.solver]
    fields = (field for part in parts for field in dataclasses.fields(part))
    return {**{field.name: field.type for field in fields}, "solver": str}


def _rank(name: str, of_method: set[str]) -> int:
    """Place in the order of cells: what changes rows of corpora changes all recordings, so it changes least often."""
    if name in ("layer", "train_layers", "train_modules"):
        return 1
    return 2 if name in of_method or name in ("lr", "lam") else 0


def _number(kind: Any) -> type[int] | type[float] | None:
    """The type of a setting that is one number (or none)."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return next((part for part in (int, float) if part in kinds), None)


def _range(name: str, text: str, kind: type[int] | type[float]) -> Range:
    span, is_scaled, scale = text.partition(":")
    if "," in text or (is_scaled and scale != "log"):
        raise UsageError(f"'{text}' is no range of '{name}'.\nWrite {name}=LOW..HIGH or {name}=LOW..HIGH:log")
    low, high = (_value(name, part.strip(), kind) for part in span.split("..", 1))
    if not low < high:
        raise InvalidValueError(f"'{name}' has an empty range. Got {text}.\nWrite the lower end first.")
    if is_scaled and low <= 0:
        raise InvalidValueError(f"'{name}' has no logarithm at {low:g}. Got {text}.\nBegin the range above 0.")
    return Range(low=low, high=high, is_log=bool(is_scaled), is_whole=kind is int)


def _ends(name: str, values: Range) -> tuple[Any, ...]:
    if values.is_whole and name == "layer":
        return tuple(range(int(values.low), int(values.high) + 1))
    return (values.low, values.high)


def _value(name: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(_value(name, part, get_args(kind)[0]) for part in text.split("+"))
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [part for part in get_args(kind) if part is not type(None)]
        return None if text.lower() == "none" else _value(name, text, kinds[0])
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise InvalidValueError(
                f"'{name}' must be one of {', '.join(get_args(kind))}. Got {text}.{nearest(text, get_args(kind))}"
            )
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InvalidValueError(f"'{name}' must be true or false. Got {text}.")
        return text.lower() == "true"
    try:
        found = kind(text)
    except ValueError as error:
        wanted = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise InvalidValueError(f"'{name}' must be {wanted}. Got {text}.") from error
    if isinstance(found, float) and not math.isfinite(found):
        raise InvalidValueError(f"'{name}' must be a finite number. Got {text}.")
    return found


def spoken(value: Any) -> str:
    """A setting's value in few characters: numbers as %g, several joined by +."""
    if isinstance(value, tuple):
        return "+".join(map(spoken, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]", "-", spoken(value)) or "none"
