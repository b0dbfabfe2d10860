"""Prompts and answers, where the user asks for them: in a file of their own that nobody else can read."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lethe.saving import saving


def write_private(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line to a file of mode 0600, whole or not at all; returns `path`.

    Raises: SaveError.
    """
    with saving(path):
        # Made with mode 0600 from the first byte on; a mode set later would leave a moment to read it.
        number, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with open(number, "w", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    return path
