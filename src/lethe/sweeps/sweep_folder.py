"""The folder of a sweep: one process at a time, and never another sweep's."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lethe.errors import RunFolderError
from lethe.system.atomic_files import saving, write_text


@contextlib.contextmanager
def locked(out: Path, about: dict[str, Any]) -> Iterator[None]:
    """The folder `out`, checked to be of the sweep that `about` describes, for this process alone.

    Raises: RunFolderError, SaveError.
    """
    path = out / "sweep.yaml"
    with saving(out):
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderError(
                f"another process is working on the sweep {out}.\nWait for it, or choose another --out."
            ) from error
        try:
            _check_own(out, path, about)
            write_text(path, yaml.safe_dump(about, sort_keys=False, allow_unicode=True))
            yield
        finally:
            if is_new and {file.name for file in out.iterdir()} <= {"sweep.yaml", "lock"}:
                path.unlink(missing_ok=True)
                (out / "lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    out.rmdir()


def _check_own(out: Path, path: Path, about: dict[str, Any]) -> None:
    if not path.exists():
        strange = sorted(file.name for file in out.iterdir() if file.name not in ("lock", "sweep.yaml.partial"))
        if strange:
            raise RunFolderError(f"{out} exists and is no sweep: it holds {strange[0]}.\nChoose another --out.")
        return
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = list(_differing(found, about))
    # Of a damaged file YAML may make anything, and fail at anything.
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} cannot be read.\nChoose another --out, or delete the folder.") from error
    if differing:
        raise RunFolderError(
            f"{out} holds another sweep: {'; '.join(differing)}.\nChoose another --out, or delete the folder."
        )


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for name in sorted({*found, *wanted} - {"lethe"}):
        was, now = found.get(name), wanted.get(name)
        if name != "grid" and isinstance(was, dict) and isinstance(now, dict):
            yield from _differing(was, now)
        elif was != now:
            there, here = ("not set" if value is None else value for value in (was, now))
            yield f"{name} is {there} there and {here} here"
