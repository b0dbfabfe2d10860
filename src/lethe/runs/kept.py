"""What the cells of a sweep share while one process runs them."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedModel

from lethe.model.hidden_cache import HiddenCache
from lethe.model.recordings import Recordings
from lethe.model.slice import LayerSlice
from lethe.runs.sharing import Sharing

Found = TypeVar("Found")


@dataclass(eq=False)
class Kept(Sharing):
    """Keeps the last thing of each kind, recordings, and hidden states of what is measured."""

    depth: int | None
    """Layers of the model to load; None for all."""
    recordings: Recordings | None = None
    starts: HiddenCache | None = None
    _found: dict[str, tuple[Hashable, Any]] = field(default_factory=dict, repr=False)

    def once(self, kind: str, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returned for this kind the last time, if the key is the same."""
        if kind not in self._found or self._found[kind][0] != key:
            if kind == "plan" and self.recordings is not None:
                self.recordings.clear()
            self._found.pop(kind, None)
            self._found[kind] = key, find()
        return self._found[kind][1]

    def model(
        self, key: Hashable, layers: int | None, load: Callable[[int | None], PreTrainedModel]
    ) -> PreTrainedModel:
        """The one model that is loaded."""
        return self.once("model", key, lambda: load(self.depth))

    def cut(self, model: PreTrainedModel, start: int, stop: int, train: tuple[str, ...]) -> LayerSlice:
        """A slice that shares its recordings."""
        if self.recordings is None:
            return super().cut(model, start, stop, train)
        return self.recordings.cut(model, start, stop, train)

    @contextlib.contextmanager
    def reading(self, model: PreTrainedModel, first: int | None) -> Iterator[None]:
        """Metrics start at the first edited layer."""
        with contextlib.nullcontext() if self.starts is None else self.starts.reading(model, first):
            yield

    def clear(self) -> None:
        """Give up what takes memory or disk."""
        self._found.clear()
        for part in (self.recordings, self.starts):
            if part is not None:
                part.clear()
