"""Recordings that several runs use: kept in memory or in a mapped file, made for all slices in one pass."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.model.mapped_files import map_new_file
from lethe.model.slice import LayerSlice
from lethe.model.view import Recording, record_together
from lethe.types import Activation, Batch

SEGMENT = 2**26
"""Bytes of one mapped file, or as many as a larger tensor needs."""


ALIGNMENT = 64
"""Tensors begin where an allocator would put them, so that sums over them have the same order."""


Recorded = Recording[Activation]
"""What one slice needs of one batch."""


Cut = tuple[int, int, tuple[str, ...]]
"""First layer, layer after the last, and trained parameters of a slice."""


class Store:
    """Keeps tensors up to a number of bytes: in memory, or in mapped files of a folder."""

    def __init__(self, limit: int, folder: Path | None = None):
        self.limit = limit
        self.folder = folder
        self.used = 0
        self._segment = torch.empty(0, dtype=torch.uint8)
        self._filled = 0
        self._segments = 0

    def keep(self, tensor: Tensor) -> Tensor | None:
        """The tensor as it is kept, of the same bits and layout; None if there is no room for it.

        Raises: SaveError if the disk is full.
        """
        size = tensor.numel() * tensor.element_size()
        if self.used + size > self.limit:
            return None
        self.used += size
        # On a GPU, or in an order of its own, a tensor stays where it is.
        if self.folder is None or tensor.device.type != "cpu" or not tensor.is_contiguous() or size == 0:
            return tensor
        room = math.ceil(size / ALIGNMENT) * ALIGNMENT
        if self._filled + room > len(self._segment):
            self._segment, self._filled = self._new_segment(max(SEGMENT, room)), 0
        kept = self._segment[self._filled : self._filled + size].view(tensor.dtype).view(tensor.shape)
        self._filled += room
        return kept.copy_(tensor.detach())

    def clear(self) -> None:
        """Give everything up; files are removed."""
        self.used = self._filled = 0
        self._segment = torch.empty(0, dtype=torch.uint8)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _new_segment(self, size: int) -> Tensor:
        assert self.folder is not None
        self._segments += 1
        return map_new_file(self.folder / f"{self._segments}.bin", size)


@dataclass(eq=False)
class Recordings:
    """Recordings of batches for several slices of one model, each batch recorded for all of them at once."""

    store: Store
    cuts: tuple[Cut, ...] = ()
    """Slices that a pass is made for, beside the one that asks."""
    passes: int = 0
    """How often the model was run to record."""
    _slices: dict[Cut, "SharedSlice"] = field(default_factory=dict, repr=False)
    _model: PreTrainedModel | None = field(default=None, repr=False)
    _kept: dict[int, tuple[Batch, dict[Cut, Recorded]]] = field(default_factory=dict, repr=False)

    def cut(self, model: PreTrainedModel, start: int, stop: int, train: tuple[str, ...]) -> LayerSlice:
        """A slice whose recordings are shared; the model must hold its untouched weights."""
        if model is not self._model:
            self.clear()
            self._slices.clear()
            self._model = model
        wanted = (start, stop, train)
        for key in (*self.cuts, wanted):
            if key not in self._slices:
                self._slices[key] = SharedSlice(model, *key, recordings=self)
        found = self._slices[wanted]
        # Each slice that was made anew froze what the others train.
        model.requires_grad_(False)
        for parameter in found.trained.values():
            parameter.requires_grad_(True)
        found.recording_seconds = 0.0
        return found

    def of(self, layers: "SharedSlice", batch: Batch) -> Recorded:
        """The recording of a batch: of the same batch asked for again, the same one."""
        _, known = self._kept.get(id(batch), (batch, {}))
        if layers.cut in known:
            return known[layers.cut]
        several = [layers, *(self._slices[key] for key in self.cuts if key != layers.cut)]
        found = self._record(several, layers, batch)
        shared: dict[int, Tensor | None] = {}
        for each, recording in zip(several, found, strict=True):
            if (kept := self._keep(recording, shared)) is not None:
                known[each.cut] = kept
        # The batch is kept as well, so that no other one can take its id.
        self._kept[id(batch)] = batch, known
        return known.get(layers.cut, found[0])

    def clear(self) -> None:
        """Give all recordings up."""
        self._kept.clear()
        self.store.clear()

    def _record(self, slices: Sequence["SharedSlice"], asking: "SharedSlice", batch: Batch) -> list[Recorded]:
        self.passes += 1
        # Only the slice that asks can have moved.
        with asking.untouched():
            return record_together(slices, batch)

    def _keep(self, recording: Recorded, shared: dict[int, Tensor | None]) -> Recorded | None:
        """The recording with its hidden states in the store; None if one of them has no room."""
        before = self.store.used

        def keep(tensor: Tensor) -> Tensor | None:
            # The state that leaves one slice's end may be the one that enters another.
            if id(tensor) not in shared:
                shared[id(tensor)] = self.store.keep(tensor)
            return shared[id(tensor)]

        hidden, frozen = keep(recording.hidden), keep(recording.frozen.h)
        constants: list[tuple[nn.Module, object]] = []
        for module, output in recording.constants:
            kept = _mapped(output, keep)
            if kept is None:
                break
            constants.append((module, kept))
        if hidden is None or frozen is None or len(constants) < len(recording.constants):
            if self.store.folder is None:
                self.store.used = before
                for key in [key for key, kept in shared.items() if kept is None]:
                    del shared[key]
            return None
        return replace(recording, hidden=hidden, constants=tuple(constants), frozen=replace(recording.frozen, h=frozen))


class SharedSlice(LayerSlice):
    """A slice that looks a recording up before it makes one."""

    def __init__(
        self, model: PreTrainedModel, start: int, stop: int, train: tuple[str, ...], *, recordings: Recordings
    ):
        super().__init__(model, start, stop, train)
        self.cut: Cut = (start, stop, train)
        self.recordings = recordings

    def record(self, batch: Batch) -> Recorded:
        """The recording of a batch, made now or before."""
        started = time.perf_counter()
        found = self.recordings.of(self, batch)
        self.recording_seconds += time.perf_counter() - started
        return found


def _mapped(output: object, keep: Callable[[Tensor], Tensor | None]) -> object | None:
    """A module's output with its tensors kept; None if one has no room."""
    if isinstance(output, Tensor):
        return keep(output)
    if not isinstance(output, tuple | list):
        return output
    parts = [part if part is None else _mapped(part, keep) for part in output]
    if any(new is None and old is not None for new, old in zip(parts, output, strict=True)):
        return None
    return type(output)(parts)
