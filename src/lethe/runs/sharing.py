"""What runs beside each other have in common, found once and handed to each."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from transformers import PreTrainedModel

from lethe.model.slice import LayerSlice

Found = TypeVar("Found")


class Sharing:
    """What a run asks for where others may have asked before. This one is for a run alone: all is found afresh."""

    def once(self, kind: str, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns; a run with the same key may be given what was found for another."""
        return find()

    def model(
        self, key: Hashable, layers: int | None, load: Callable[[int | None], PreTrainedModel]
    ) -> PreTrainedModel:
        """A model of at least so many layers (None: all of it), with the untouched weights of its checkpoint."""
        return load(layers)

    def cut(self, model: PreTrainedModel, start: int, stop: int, train: tuple[str, ...]) -> LayerSlice:
        """Layers [start, stop) of the model."""
        return LayerSlice(model, start, stop, train)

    @contextmanager
    def reading(self, model: PreTrainedModel, first: int | None) -> Iterator[None]:
        """While metrics read a model whose layers below `first` are untouched, or all of them."""
        yield
