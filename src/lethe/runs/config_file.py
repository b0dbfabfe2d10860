"""config.yaml: a method and the settings of its run, written and read."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

import yaml

from lethe import methods
from lethe.__version__ import __version__
from lethe.errors import RunFolderError, UnknownNameError, first_line
from lethe.methods.protocol import Method
from lethe.runs.config import GRADIENT, SECTIONS, RunConfig, RunSettings, solver_of
from lethe.system.plugins import IN_FILE, catalogue, kebab, load, name_of, nearest
from lethe.types import RUN_FORMAT


def method_name(method: Method) -> str:
    """The name a method goes by at the command line and in files."""
    return name_of(type(method))


def method_class(name: str) -> type[Method]:
    """The class behind a method's name, or `path/to/file.py:Class`, whose file is run.

    Raises: UnknownNameError, offering the nearest name; UsageError for a file that fails or holds no such method.
    """
    return load(name, methods)


def as_run(method: Method, config: RunConfig) -> Method:
    """The method with the settings that it is run with: `as_published` overrides some."""
    return method.as_published() if config.as_published else method


def plain(method: Method, config: RunConfig) -> dict[str, Any]:
    """Method and config as JSON types, the content of config.yaml: a mapping for each section."""
    sections = {name: _plain(vars(getattr(config, name))) for name in SECTIONS}
    own = {field.name: getattr(config, field.name) for field in fields(RunSettings)}
    return {
        "format": RUN_FORMAT,
        "lethe": __version__,
        "method": {"name": method_name(method), **_plain(vars(as_run(method, config)))},
        "solver": {"name": config.solver_name, **_plain(vars(config.solver))},
        **sections,
        "run": _plain(own),
    }


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting of the run by name, as JSON types."""
    return _plain(config.settings())


def read_config(path: Path, *, kind: type[Method] | None = None) -> tuple[Method, RunConfig]:
    """Method and config from a config.yaml; `kind` is the method's class, where that is in a file of somebody's own.

    Raises: RunFolderError for a file that is missing, broken, of a newer version, or has an unknown key;
    UnknownNameError for a method that is none, or in a file that only the config names.
    """
    content = _content(path)
    settings = {key: value for key, value in content["method"].items() if key != "name"}
    name = str(content["method"]["name"])
    if kind is None and IN_FILE.fullmatch(name):
        raise UnknownNameError(
            f"{path} names a method in a file of its own, {name}, and a config alone never makes Lethe run a file.\n"
            f"If you trust that file, name it: lethe unlearn {path} --method {name}"
        )
    return _build(kind or method_class(name), settings, path), read_run_config(path)


def read_run_config(path: Path) -> RunConfig:
    """The config alone: of a run of anybody's own method, too.

    Raises: RunFolderError, as `read_config`.
    """
    content = _content(path)
    if content["format"] == 1:
        return _of_format_1(content["run"], path)
    settings: dict[str, Any] = {}
    for name, kind in {**SECTIONS, "run": RunSettings}.items():
        settings |= _of_section(kind, content.get(name), f"{path}: {name}")
    named = content.get("solver")
    if not isinstance(named, dict) or "name" not in named:
        raise RunFolderError(f"{path} is not the config.yaml of a run: it needs 'solver' with a 'name'.")
    try:
        kind = type(solver_of(str(named["name"]), {}))
        own = {key: value for key, value in named.items() if key != "name"}
        return RunConfig.of(solver=kind(**_of_section(kind, own, f"{path}: solver")), **settings)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: {first_line(error)}.") from error


def _of_format_1(values: Mapping[str, Any], path: Path) -> RunConfig:
    """The config of a run that Lethe 0.1 wrote: one mapping for all settings, those of every solver among them."""
    kind = type(solver_of(str(values.get("solver", GRADIENT)), {}))
    parts: list[type[Any]] = [*SECTIONS.values(), RunSettings, kind]
    types = {field.name: field.type for part in parts for field in fields(part)}
    elsewhere = {"steps", "accumulate", "lr", "lam", "keep_sums", "layers_from", "solver"} - types.keys()
    for key in values:
        if key not in types and key not in elsewhere:
            raise RunFolderError(f"{path}: RunConfig has no setting '{key}'.{nearest(key, types)}")
    try:
        settings = {key: _typed(value, types[key]) for key, value in values.items() if key in types}
        return RunConfig.of(solver=kebab(kind.__name__), **settings)
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: {first_line(error)}.") from error


def reads(path: Path) -> str:
    """Whether the method of a config.yaml reads texts or prompts; texts, for a method that is not one of Lethe's.

    Raises: RunFolderError, as `read_config`.
    """
    kind = catalogue(methods).get(str(_content(path)["method"]["name"]))
    return kind.reads if kind is not None else Method.reads  # type: ignore[attr-defined]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}.\nName the config.yaml of a run folder.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not YAML: {first_line(error)}.") from error
    if not isinstance(content, dict) or not isinstance(version := content.get("format"), int):
        raise RunFolderError(f"{path} is not the config.yaml of a run: it has no 'format' number.")
    if version > RUN_FORMAT:
        raise RunFolderError(
            f"{path} was written by a newer Lethe ({content.get('lethe')}; format {version}, this one reads "
            f"{RUN_FORMAT}).\nUpgrade: pip install --upgrade lethe-unlearn"
        )
    method, run = content.get("method"), content.get("run")
    if not isinstance(method, dict) or not isinstance(run, dict) or "name" not in method:
        raise RunFolderError(f"{path} is not the config.yaml of a run: it needs 'method' with a 'name', and 'run'.")
    return content


def _build(kind: type[Any], values: Mapping[str, Any], path: Path) -> Any:
    try:
        return kind(**_of_section(kind, values, str(path)))
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: {first_line(error)}.") from error


def _of_section(kind: type[Any], values: Any, where: str) -> dict[str, Any]:
    """Settings of a section with the types that its fields have."""
    if not isinstance(values, dict):
        raise RunFolderError(f"{where} holds no settings.\nName the config.yaml of a run folder.")
    types = {field.name: field.type for field in fields(kind)}
    for key in values:
        if key not in types:
            raise RunFolderError(f"{where}: {kind.__name__} has no setting '{key}'.{nearest(key, types)}")
    return {key: _typed(value, types[key]) for key, value in values.items()}


def _typed(value: Any, kind: Any) -> Any:
    """A value of config.yaml as the setting's type has it."""
    if kind in (Path, Path | None):
        return None if value is None else Path(str(value))
    if get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) else (value,)
    # YAML takes 5e-5, without a point, for text.
    return float(value) if kind is float or (kind == float | None and value is not None) else value


def plain_value(value: Any) -> Any:
    """The value of one setting as JSON type."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plain_value(value) for key, value in settings.items()}
