"""The machine and the software of a run: devices, memory, versions."""

import contextlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from lethe.__version__ import __version__
from lethe.errors import InvalidValueError, OutOfMemoryError


def find_device(name: str) -> torch.device:
    """The device behind a --device value; `auto` is a GPU where there is one.

    Raises: InvalidValueError for a device that does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise InvalidValueError(f"'device' must be one that this machine has. Got {name}; found {found}.") from error
    return device


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads for as long as the context lasts; None leaves torch's choice."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_mb(device: torch.device) -> float:
    """Highest memory so far in MB: allocated on a GPU, resident of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def explaining_memory(circumstances: str) -> Iterator[None]:
    """Turn what allocators raise into one error, which tells under what circumstances and what to lower.

    Raises: OutOfMemoryError.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # Allocators of CPUs and some GPUs raise a bare RuntimeError; an illegal memory access is another matter.
        said = str(error).lower()
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(f"{verb} memory" in said for verb in ("out of", "enough", "allocate")):
            raise
        raise OutOfMemoryError(f"out of memory {circumstances}") from error


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, platform and device, for a report."""
    found: dict[str, Any] = {
        "lethe": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }
    return found | ({"commit": commit} if (commit := _commit()) else {})


@cache
def _commit() -> str | None:
    """The commit of a source checkout of Lethe, with + if files differ from it; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            ["git", "status", "--porcelain", "src"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
