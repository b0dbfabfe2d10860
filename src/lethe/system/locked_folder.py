"""A folder that one process writes to, and that holds one piece of work: the one its description says."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from lethe.errors import RunFolderError
from lethe.system.atomic_files import saving, write_text

LOCK = "lock"


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """The folder, made with its parents, for this process alone; if nothing is in it at the end, it is removed.

    Raises: RunFolderError if another process is `doing` (`writing to`) it; SaveError if it cannot be made.
    """
    path = folder / LOCK
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder ended between our opening and our locking: others would lock a new file beside this one.
            if not os.fstat(lock.fileno()).st_nlink:
                raise BlockingIOError
        except OSError as error:
            raise RunFolderError(
                f"another process is {doing} {folder}.\nWait for it, or choose another --out."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def require_same(
    path: Path, here: Mapping[str, Any], noun: str, *, ignored: Set[str], whole: Set[str] = frozenset()
) -> None:
    """Check the description at `path` of a `noun` (`run`) against that of the work to be done, but for some settings.

    A section is told apart by its settings, unless it is in `whole`.

    Raises: RunFolderError if it cannot be read, or differs; the message names the settings.
    """
    try:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = list(_differing(there, here, ignored, whole))
    # Of a damaged file YAML may make anything, and fail at anything.
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RunFolderError(f"{path} cannot be read.\nChoose another --out, or delete the folder.") from error
    if differing:
        raise RunFolderError(
            f"{path.parent} holds another {noun}: {'; '.join(differing)}.\nChoose another --out, or delete the folder."
        )


def describe(path: Path, content: Mapping[str, Any]) -> None:
    """Write the description that `require_same` reads.

    Raises: SaveError.
    """
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], ignored: Set[str], whole: Set[str]) -> Iterator[str]:
    for name in sorted({*there, *here} - ignored):
        was, now = there.get(name), here.get(name)
        if isinstance(was, dict) and isinstance(now, dict) and name not in whole:
            yield from _differing(was, now, ignored, whole)
        elif was != now:
            was, now = ("not set" if value is None else value for value in (was, now))
            yield f"{name} is {was} there and {now} here"
