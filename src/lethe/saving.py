"""Files are written whole or not at all: to a temporary name beside them, then renamed."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lethe.types import SaveError


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into a SaveError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
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
