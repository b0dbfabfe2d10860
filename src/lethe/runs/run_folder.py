"""A run folder on disk: locked while a run writes to it, every file renamed into place, report.json last."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError
from lethe.report.record import WRONG, history_row
from lethe.solvers.training_state import Checkpoint
from lethe.system import locked_folder
from lethe.system.atomic_files import as_json, saving, write_json, write_text
from lethe.types import HistoryRow

_FIRST = {locked_folder.LOCK, "config.yaml.partial"}


class RunFolder:
    """The files of one run: config.yaml, history.jsonl, checkpoint, sums and patch as safetensors, report.json."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.patch = path / "patch.safetensors"
        self.report = path / "report.json"
        self.sums = path / "sums.safetensors"
        """What a ridge run is the solution of. It holds a square of the matrix's input width for every topic."""
        self._history = path / "history.jsonl"
        self._checkpoint = path / "checkpoint.safetensors"

    @property
    def is_complete(self) -> bool:
        """Whether the run ended; report.json is written last."""
        return self.report.exists()

    def holds(self, config: dict[str, Any]) -> bool:
        """Whether the folder holds a run of this config, complete or not; False if it does not exist or is empty.

        Raises: RunFolderError if it holds something else; the message names the settings that differ.
        """
        # A run that was killed as it began leaves its lock and no config yet.
        if not self.path.exists() or (self.path.is_dir() and {f.name for f in self.path.iterdir()} <= _FIRST):
            return False
        if not self.config.exists():
            raise RunFolderError(f"{self.path} exists and is no run folder.\nChoose another --out.")
        locked_folder.require_same(self.config, config, "run", ignored={"out", "lethe", "evaluate"})
        return True

    @contextlib.contextmanager
    def open(self, config: dict[str, Any]) -> Iterator["RunFolder"]:
        """Create or resume the folder, locked; if the run fails before its first checkpoint, nothing stays behind.

        Raises: RunFolderError if another process writes to it; SaveError if it cannot be created.
        """
        self.holds(config)
        with locked_folder.locked(self.path, "writing to"):
            # What a killed run was writing when it died.
            for leftover in self.path.glob("*.partial"):
                leftover.unlink()
            try:
                locked_folder.describe(self.config, config)
                yield self
            finally:
                if not (self.is_complete or self._checkpoint.exists()):
                    for file in (self._history, self.patch, self.sums, self.config):
                        file.unlink(missing_ok=True)

    def require_patch(self) -> None:
        """Raises: RunFolderError unless the folder holds the patch of a run."""
        if not self.config.exists():
            raise RunFolderError(f"{self.path} is not a run folder.\nGive the folder that was passed as --out.")
        if not self.patch.exists():
            raise RunFolderError(f"the run in {self.path} is not complete.\nRun the same command again to resume it.")

    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from, if there is one."""
        return Checkpoint.load(self._checkpoint) if self._checkpoint.exists() else None

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        checkpoint.save(self._checkpoint)

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a complete run."""
        self._checkpoint.unlink(missing_ok=True)

    def history(self, *, until: int) -> list[HistoryRow]:
        """Rows of the steps before `until`; later ones, of steps that will be repeated, are removed."""
        if not self._history.exists():
            return []
        rows = []
        for line in self._history.read_text(encoding="utf-8").splitlines():
            try:
                row = history_row(json.loads(line))
            except WRONG:
                break  # the line that was being written when the run was killed
            if row.step >= until:
                break
            rows.append(row)
        write_text(self._history, "".join(_line(row) for row in rows))
        return rows

    def append_history(self, row: HistoryRow) -> None:
        """Add a step."""
        with saving(self._history), self._history.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, renamed into place."""
        write_json(self.path / name, content, with_infinity=True)


def _line(row: HistoryRow) -> str:
    return as_json(row.as_dict(), indent=None, with_infinity=True) + "\n"
