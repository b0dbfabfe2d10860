"""Tensors with one JSON header in a safetensors file: patches, checkpoints of a training, sums of requests."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lethe.errors import LetheError, first_line
from lethe.system.atomic_files import replacing

KEY = "lethe"
"""The one key of the file's metadata: safetensors writes several in no fixed order."""


def save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all; equal tensors and headers give equal bytes.

    Raises: SaveError.
    """
    with replacing(path) as partial:
        write(partial, tensors, header)


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """`save`, where the folder is renamed into place as a whole."""
    # Python's own JSON, which only `reading` reads again: a sum that is NaN must come back as NaN.
    metadata = {KEY: json.dumps(header, sort_keys=True)}
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(stored, path, metadata=metadata)


@contextlib.contextmanager
def reading(path: Path, damaged: Callable[[str], LetheError]) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The tensors and the header of a file, while they are taken apart; the header is empty where there is none.

    Raises: what `damaged` makes of a reason in one line, without a full stop, if the file cannot be read or its header
    lacks what is asked of it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        yield tensors, header
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error).rstrip(".")
        raise damaged(reason) from error
