"""Files are written whole or not at all: to a temporary name beside them, then renamed; and JSON, written one way."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lethe.errors import SaveError, UsageError


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into a SaveError that says what to do."""
    try:
        yield
    except (OSError, _safetensor_error()) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = (os.strerror(number) if number else str(error)).rstrip(".")
        full = number in (None, errno.ENOSPC, errno.EDQUOT)  # safetensors gives no number
        fix = "Free some space, or name another disk." if full else "Name a path that you may write to."
        raise SaveError(f"{path} could not be written: {reason}.\n{fix}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` once the context ends without an error, and nothing otherwise.

    Raises: SaveError.
    """
    # What a link points to is replaced, not the link; and nothing that is no file, such as /dev/stdout.
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise SaveError(f"{path} is no file: it would be replaced by one.\nName another path.")
    partial = path.with_name(f"{path.name}.partial")
    with saving(path):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file, UTF-8; returns `path`.

    Raises: SaveError.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


def as_json(content: Any, *, indent: int | None = 1, with_infinity: bool = False) -> str:
    """Content as JSON text: tuples are lists, paths text, and what was not measured (NaN) is null.

    JSON has no infinity either: it is null, or `with_infinity` the text "Infinity", which `read_number` reads again.
    """
    return json.dumps(_plain(content, with_infinity), indent=indent, allow_nan=False)


def read_number(value: int | float | str | None) -> float:
    """A number as `as_json` writes it: null is NaN.

    Raises: TypeError, ValueError for anything else.
    """
    return math.nan if value is None else float(value)


def write_json(path: Path, content: Any, *, with_infinity: bool = False) -> Path:
    """Write `as_json`; returns `path`.

    Raises: SaveError.
    """
    return write_text(path, as_json(content, with_infinity=with_infinity) + "\n")


def require_place(path: Path | None, inputs: Iterable[Path] = ()) -> None:
    """Raises: UsageError, before any work is done, for a file that could not be written or should not be replaced."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder.\nName a file.")
    # A file is written beside it and renamed, which would put an ordinary file in the place of /dev/null.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{path} is a link, a device or a pipe, and would be replaced by a file.\nName another file.")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}.\nMake it, or name another file.")
    if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
        raise UsageError(f"{path} is read by this very command, and would be overwritten.\nName another file.")


def write_private(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line to a file of mode 0600, whole or not at all; returns `path`.

    Raises: SaveError.
    """
    with replacing(path) as partial:
        partial.unlink(missing_ok=True)  # of a call that was killed, with whatever mode
        # Made with mode 0600 from the first byte on; a mode set later would leave a moment to read it.
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(number, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _safetensor_error() -> type[Exception]:
    # Imported once something went wrong: what prints JSON alone need not wait for it.
    from safetensors import SafetensorError

    return SafetensorError


def _plain(value: Any, with_infinity: bool = False) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value) if with_infinity and not math.isnan(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part, with_infinity) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, with_infinity) for part in value]
    return str(value) if isinstance(value, Path) else value
