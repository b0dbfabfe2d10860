"""The folder of a sweep: one process at a time, and never another sweep's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError
from lethe.system import locked_folder
from lethe.system.locked_folder import LOCK


@contextlib.contextmanager
def locked(out: Path, about: dict[str, Any]) -> Iterator[None]:
    """The folder `out`, checked to be of the sweep that `about` describes, for this process alone.

    Raises: RunFolderError, SaveError.
    """
    path = out / "sweep.yaml"
    is_new = not out.exists()
    with locked_folder.locked(out, "working on the sweep"):
        try:
            if path.exists():
                locked_folder.require_same(path, about, "sweep", ignored={"lethe"}, whole={"grid"})
            elif strange := sorted({file.name for file in out.iterdir()} - {LOCK, f"{path.name}.partial"}):
                raise RunFolderError(f"{out} exists and is no sweep: it holds {strange[0]}.\nChoose another --out.")
            locked_folder.describe(path, about)
            yield
        finally:
            if is_new and {file.name for file in out.iterdir()} <= {path.name, LOCK}:
                path.unlink(missing_ok=True)
