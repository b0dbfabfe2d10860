"""Files that a user names for results: whether they can be written, and private ones for prompts and answers."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lethe.saving import replacing
from lethe.types import UsageError


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
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
