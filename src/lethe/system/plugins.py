"""Shelves of plug-ins: what a package's files define, by name; imported, read as text, or taken from a user's file."""

import ast
import builtins
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from typing_extensions import Doc

from lethe.errors import LetheError, UnknownNameError, UsageError

IN_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?")
"""`path/to/file.py:Class`, or the file alone."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?`, or nothing if no known name is as near as `cutoff`, in [0, 1]."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean '{found[0]}'?" if found else ""


def kebab(name: str) -> str:
    """CamelCase to kebab-case: `AdaptiveRMU` is `adaptive-rmu`; one letter at the end stays: `AdamW` is `adamw`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z](?!$))|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def name_of(kind: type) -> str:
    """What `look_up` finds a plug-in by: its class's name in kebab-case, or `path/to/file.py:Class`."""
    return f"{kind.__module__}:{kind.__name__}" if IN_FILE.fullmatch(kind.__module__) else kebab(kind.__name__)


def summary(thing: object) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def discover(shelf: ModuleType) -> dict[str, type]:
    """The plug-ins of a package, by kebab-case name, sorted: public dataclasses that name their `source`."""
    found = {}
    for info in pkgutil.iter_modules(shelf.__path__):
        module = importlib.import_module(f"{shelf.__name__}.{info.name}")
        found |= {kebab(name): kind for name, kind in _defined(module).items() if not _no_plug_in(kind)}
    return dict(sorted(found.items()))


def catalogue(shelf: ModuleType) -> dict[str, type]:
    """The same by what the files say, without importing them: a stand-in for each plug-in.

    A stand-in is a dataclass with the plug-in's name, docstring, settings (with their docstrings as `Doc`) and those
    class-level values that are written out; `real` imports the class itself.
    """
    found = {}
    for info in pkgutil.iter_modules(shelf.__path__):
        text = _text(f"{shelf.__name__}.{info.name}")
        for name, node in text.classes.items():
            is_dataclass = any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
            if is_dataclass and not name.startswith("_") and (kind := _stand_in(node, text)) is not None:
                found[kebab(name)] = kind
    return dict(sorted(found.items()))


def real(kind: type) -> type:
    """The class that a stand-in stands for; any other class is its own."""
    return getattr(importlib.import_module(kind.__module__), kind.__name__)


def look_up(name: str, shelf: ModuleType, *, also: Iterable[str] = ()) -> type:
    """A stand-in by its name on the shelf, or the class that `path/to/file.py:Class` names, whose file is run.

    `also` are words that the caller takes beside names. Raises: UnknownNameError, offering the nearest name;
    UsageError for a file that fails, or a class that is no plug-in.
    """
    if match := IN_FILE.fullmatch(name):
        return _in_file(match["path"], match["name"], shelf)
    known, wanted = catalogue(shelf), name.replace("_", "-").lower()
    if wanted not in known:
        names, plural = (*known, *also), _plural(shelf)
        raise UnknownNameError(
            f"there is no {_noun(shelf)} '{wanted}'.{nearest(wanted, names)}\n"
            f"{plural.capitalize()}: {', '.join(names)}. See `lethe ls {plural}`."
        )
    return known[wanted]


def load(name: str, shelf: ModuleType) -> type:
    """The class by its name on the shelf, or `path/to/file.py:Class`. Raises: as `look_up`."""
    return real(look_up(name, shelf))


def _plural(shelf: ModuleType) -> str:
    return shelf.__name__.rpartition(".")[2]


def _noun(shelf: ModuleType) -> str:
    return {"analyses": "analysis"}.get(_plural(shelf), _plural(shelf).removesuffix("s"))


def _defined(module: ModuleType) -> dict[str, type]:
    """The public classes of a module itself."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if isinstance(thing, type) and thing.__module__ == module.__name__ and not name.startswith("_")
    }


def _no_plug_in(kind: type) -> str:
    """Why a class could stand on no shelf; empty if it could."""
    if not dataclasses.is_dataclass(kind):
        return "it is no dataclass"
    return "" if getattr(kind, "source", "") else "it has no `source`, the paper or code that it comes from"


def _lacks(kind: type, shelf: ModuleType) -> str:
    """Why a class is no plug-in of this shelf; empty if it is one."""
    if reason := _no_plug_in(kind):
        return reason
    for setting in dataclasses.fields(kind):
        if setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING:
            return f"its setting '{setting.name}' has no default"
    reasons = []
    own = {*(name for base in kind.__mro__ for name in vars(base)), *(one.name for one in dataclasses.fields(kind))}
    for contract in _defined(importlib.import_module(f"{shelf.__name__}.protocol")).values():
        named = inspect.get_annotations(contract)
        if "source" not in named:
            continue
        if getattr(contract, "_is_protocol", False):
            members = (*named, *(name for name in vars(contract) if name[0] != "_" or name == "__call__"))
            missing = [name for name in dict.fromkeys(members) if name not in own]
            reason = f"it lacks {', '.join(missing)}" if missing else ""
        else:
            reason = "" if issubclass(kind, contract) else f"it does not derive from {contract.__name__}"
        if not reason:
            return ""
        reasons.append(reason)
    return "; or ".join(reasons)


def _in_file(path: str, name: str | None, shelf: ModuleType) -> type:
    noun, defined = _noun(shelf), _defined(_run_file(path))
    reasons = {key: _lacks(kind, shelf) for key, kind in defined.items()}
    if name is None:
        fitting = [key for key, reason in reasons.items() if not reason]
        if len(fitting) != 1:
            what = ", ".join(fitting) or "; ".join(f"{key}: {reason}" for key, reason in reasons.items()) or "no class"
            raise UsageError(
                f"{path} does not hold exactly one {noun}, but {len(fitting)} ({what}).\n"
                f"Name one as {path}:Class, or see docs/adding.md."
            )
        name = fitting[0]
    if name not in defined:
        raise UnknownNameError(
            f"{path} defines no class '{name}'.{nearest(name, defined)}\n"
            f"It defines {', '.join(defined) or 'no public class'}."
        )
    if reasons[name]:
        raise UsageError(f"{path}:{name} is no {noun}: {reasons[name]}.\nSee docs/adding.md.")
    return defined[name]


def _run_file(path: str) -> ModuleType:
    """The module of a file, by the path as it was given: that is its name, so that a class of it knows its place."""
    place = Path(path).expanduser().resolve()
    if not place.is_file():
        names = sorted(str(Path(path).with_name(other.name)) for other in place.parent.glob("*.py"))
        raise UnknownNameError(
            f"there is no file {path}.{nearest(path, names)}\n"
            "Name one that is there, relative to the current folder, as path/to/file.py:Class."
        )
    if (known := sys.modules.get(path)) is not None and known.__file__ == str(place):
        return known
    spec = importlib.util.spec_from_file_location(path, place)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, and whoever reads a class's source, look its module up there.
    sys.modules[path] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[path]
        if isinstance(error, LetheError) or not isinstance(error, Exception):
            raise
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}.\nMend the file.") from error
    return module


# Reading without importing


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A module as it is written."""

    name: str
    classes: Mapping[str, ast.ClassDef]
    values: Mapping[str, ast.expr]
    """What is assigned at the top, and where the module is."""
    imports: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """For each imported name its module, and its name there."""


@functools.cache
def _text(module: str) -> _Text:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    return _Text(
        name=module,
        classes={node.name: node for node in body if isinstance(node, ast.ClassDef)},
        values={"__file__": ast.parse(repr(spec.origin), mode="eval").body, **dict(_assigned(body))},
        imports={
            name.asname or name.name: (str(node.module), name.name)
            for node in body
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        },
    )


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __name__.partition(".")[0]


class _NotWrittenOutError(Exception):
    """A value that only running the file would give."""


def _evaluated(node: ast.expr, text: _Text) -> Any:
    """An expression of literals, builtins, the standard library, and names that stand for such.

    Raises: _NotWrittenOutError for any other.
    """
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    space = {name: _named(name, text) for name in names}
    return eval(compile(ast.Expression(node), text.name, "eval"), {"__builtins__": {}}, space)


def _named(name: str, text: _Text) -> Any:
    if name in text.values:
        return _evaluated(text.values[name], text)
    module, original = text.imports.get(name, ("", name))
    if _is_ours(module):
        return _named(original, _text(module))
    if module.partition(".")[0] in sys.stdlib_module_names:
        return getattr(importlib.import_module(module), original)
    if not module and hasattr(builtins, name):
        return getattr(builtins, name)
    raise _NotWrittenOutError(f"{text.name}: {name}")


def _stand_in(node: ast.ClassDef, text: _Text) -> type | None:
    """The stand-in of a dataclass that names its source; None for any other class."""
    settings: list[tuple[str, Any, Any]] = []
    facts: dict[str, Any] = {}
    members = _members(node, text)
    for name, member in members.items():
        if member.is_fact and member.node.value is not None:
            # What only running the file would give is of no use to a list or a help screen.
            with contextlib.suppress(_NotWrittenOutError):
                facts[name] = _evaluated(member.node.value, member.text)
    if not facts.get("source"):
        return None
    for name, member in members.items():
        if isinstance(member.node, ast.AnnAssign) and not member.is_fact:
            kind = _evaluated(member.node.annotation, member.text)
            default = field() if member.node.value is None else _evaluated(member.node.value, member.text)
            settings.append((name, Annotated[kind, Doc(member.doc)] if member.doc else kind, default))
    space = {**facts, "__doc__": ast.get_docstring(node), "__module__": text.name}
    return dataclasses.make_dataclass(node.name, settings, namespace=space, frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A name in a class: annotated, or with a value."""

    node: ast.AnnAssign | ast.Assign
    doc: str
    text: _Text

    @property
    def is_fact(self) -> bool:
        return isinstance(self.node, ast.Assign) or "ClassVar" in ast.unparse(self.node.annotation)


def _members(node: ast.ClassDef, text: _Text) -> dict[str, _Member]:
    """The names in a class and in what it derives from, in the order that dataclasses give them."""
    members: dict[str, _Member] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and (inherited := _class(base.id, text)) is not None:
            members |= _members(*inherited)
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            said = after.value if isinstance(after, ast.Expr) else None
            doc = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            members[statement.target.id] = _Member(node=statement, doc=" ".join(doc.split()), text=text)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            members[statement.targets[0].id] = _Member(node=statement, doc="", text=text)
    return members


def _class(name: str, text: _Text) -> tuple[ast.ClassDef, _Text] | None:
    """Where a class that is named in a module is written, if that is in this package."""
    if name in text.classes:
        return text.classes[name], text
    module, original = text.imports.get(name, ("", ""))
    return _class(original, _text(module)) if _is_ours(module) else None
