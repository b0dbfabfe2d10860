"""Tensors in files that are mapped into memory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lethe.system.atomic_files import saving


def map_new_file(path: Path, size: int) -> Tensor:
    """A new file of so many bytes, as a tensor of bytes whose changes it takes.

    Raises: SaveError if the disk is full or the folder cannot be written.
    """
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            # Asked for at once: a mapped file that the disk has no room for would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


class WeightsOnDisk(Mapping[str, Tensor]):
    """Tensors by name, one file each, which take memory only while somebody holds one of them."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path):
        self._kept: dict[str, tuple[Path, Tensor, torch.device]] = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            path = folder / f"{number}.bin"
            size = tensor.numel() * tensor.element_size()
            map_new_file(path, size).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            self._kept[name] = path, torch.empty_like(tensor, device="meta"), tensor.device

    def __getitem__(self, name: str) -> Tensor:
        path, form, device = self._kept[name]
        return torch.from_file(str(path), size=form.numel(), dtype=form.dtype).view(form.shape).to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
