"""Scores kept between calls: what was measured on the same weights, task and settings is not measured again.

An entry is named by the hash of everything that its numbers depend on, the package's own source included. It holds
numbers only, no text of a question or an answer.
"""

import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from lethe.__version__ import __version__
from lethe.errors import ModelError, SaveError
from lethe.model.checkpoint_files import checkpoint_files
from lethe.system.atomic_files import saving, write_text

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a model folder that decide, besides the weights, what the model says."""


SETTLED_NS = 2_000_000_000
"""A file changed less than this long ago may change again within one tick of its clock, so its hash is not kept."""


Entry = Callable[[], Any]


def default_folder() -> Path:
    """`lethe/scores` in the user's cache directory (XDG base directory specification)."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "lethe" / "scores"


class ScoreCache:
    """A folder of JSON files, one an entry, and the hashes of the files that entries depend on.

    A file's hash is found once for each path, size and time of change, so a checkpoint of many GB is read once; the
    time is the one that only the system sets. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None]):
        self.folder = folder
        self.asked = 0
        """Entries that were asked for."""
        self.reused = 0
        """Those of them that were there already."""
        self._warn = warn
        self._memo: dict[str, str] | None = None
        if folder is not None:
            with saving(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def once(self, key: Mapping[str, Any], find: Entry) -> Any:
        """What `find` returned for this key, a JSON value; an entry that cannot be read is found again.

        An entry that cannot be written costs a warning, not the measurement.
        """
        self.asked += 1
        if self.folder is None:
            return find()
        # Through JSON, so that a key read again compares equal.
        key = json.loads(json.dumps({**key, **_software()}))
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = self.folder / name[:2] / f"{name}.json"
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["key"] == key:
                self.reused += 1
                return entry["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = find()
        self._write(path, {"key": key, "value": value})
        return value

    def model_hash(self, folder: Path) -> str:
        """SHA-256 of a model folder: its weights, settings and tokenizer."""
        found = {*checkpoint_files(folder).values(), *(path for glob in SMALL_FILES for path in folder.glob(glob))}
        return self.files_hash(found)

    def files_hash(self, paths: Iterable[Path]) -> str:
        """SHA-256 of the names and contents of some files; empty where nothing is kept anyway.

        Raises: ModelError for a file that cannot be read.
        """
        if self.folder is None:
            return ""
        rows = sorted((path.name, self._file_hash(path)) for path in paths)
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def _file_hash(self, path: Path) -> str:
        try:
            state = path.stat()
            # Neither size nor the time of change can be put back by hand; a new hard link only costs a reading.
            name = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
            memo = self._hashes()
            if name not in memo:
                found = _content_hash(path)
                if time.time_ns() - max(state.st_mtime_ns, state.st_ctime_ns) < SETTLED_NS:
                    return found
                memo[name] = found
                if self.folder is not None:
                    self._write(self.folder / "hashes.json", memo)
            return memo[name]
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from None

    def _hashes(self) -> dict[str, str]:
        if self._memo is None:
            try:
                found = json.loads(((self.folder or Path()) / "hashes.json").read_text(encoding="utf-8"))
                self._memo = dict(found) if isinstance(found, dict) else {}
            except (OSError, ValueError):
                self._memo = {}
        return self._memo

    def _write(self, path: Path, content: Any) -> None:
        try:
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Python's own JSON: a score read again is the score that was measured, NaN and infinity included.
                # Each process writes in a folder of its own: two may measure the same thing at the same moment.
                with tempfile.TemporaryDirectory(dir=path.parent) as own:
                    os.replace(write_text(Path(own) / path.name, json.dumps(content)), path)
        except SaveError as error:
            self._warn(f"the cache keeps nothing: {error}")


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def _software() -> dict[str, str]:
    """Versions of what computes; of Lethe its source too, which changes between releases."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "lethe": f"{__version__} {source.hexdigest()[:16]}",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
