"""A model under measurement, with an edit that can be taken off and put back."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.model.swap import swapped

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model under measurement, and the weights that an edit replaced in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Untouched values of the edited parameters, by name; empty for an unedited model."""
    retain_only: "LoadedModel | None" = None
    """The same model trained without the forget set, for metrics that compare with it."""
    known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was already found out about this subject and is asked for by several metrics."""

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns, found out once for each key: generated answers serve many metrics."""
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The untouched model, for as long as the context lasts; the edit is put back on exit, bit for bit."""
        with swapped(self.model, self.originals):
            yield self.model
