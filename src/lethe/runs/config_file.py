"""config.yaml: a method and the settings of its run, written and read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml

from lethe import methods
from lethe.__version__ import __version__
from lethe.errors import RunFolderError, UnknownNameError
from lethe.methods.protocol import SteeringMethod
from lethe.runs.config import RunConfig
from lethe.system.plugins import IN_FILE, catalogue, load, name_of, nearest
from lethe.types import RUN_FORMAT


def method_name(method: SteeringMethod) -> str:
    """The name a method goes by at the command line and in files."""
    return name_of(type(method))


def method_class(name: str) -> type[SteeringMethod]:
    """The class behind a method's name, or `path/to/file.py:Class`, whose file is run.

    Raises: UnknownNameError, offering the nearest name; UsageError for a file that fails or holds no such method.
    """
    return load(name, methods)


def as_run(method: SteeringMethod, config: RunConfig) -> SteeringMethod:
    """The method with the settings that it is run with: `as_published` overrides some."""
    return method.as_published() if config.as_published else method


def plain(method: SteeringMethod, config: RunConfig) -> dict[str, Any]:
    """Method and config as JSON types, the content of config.yaml."""
    return {
        "format": RUN_FORMAT,
        "lethe": __version__,
        "method": {"name": method_name(method), **_plain(as_run(method, config))},
        "run": _plain(config),
    }


def read_config(path: Path, *, kind: type[SteeringMethod] | None = None) -> tuple[SteeringMethod, RunConfig]:
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
    return _build(RunConfig, _content(path)["run"], path)


def reads(path: Path) -> str:
    """Whether the method of a config.yaml reads texts or prompts; texts, for a method that is not one of Lethe's.

    Raises: RunFolderError, as `read_config`.
    """
    kind = catalogue(methods).get(str(_content(path)["method"]["name"]))
    return kind.reads if kind is not None else SteeringMethod.reads  # type: ignore[attr-defined]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}.\nName the config.yaml of a run folder.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path} is not YAML: {_first_line(error)}.") from error
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
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise RunFolderError(f"{path}: {kind.__name__} has no setting '{key}'.{nearest(key, fields)}")
    try:
        return kind(**{key: _typed(value, fields[key].type) for key, value in values.items()})
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: {_first_line(error)}.") from error


def _typed(value: Any, kind: Any) -> Any:
    """A value of config.yaml as the setting's type has it."""
    if kind in (Path, Path | None):
        return None if value is None else Path(str(value))
    if get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) else (value,)
    # YAML takes 5e-5, without a point, for text.
    return float(value) if kind is float or (kind == float | None and value is not None) else value


def _plain(settings: SteeringMethod | RunConfig) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(settings).items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
