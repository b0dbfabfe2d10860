"""A model under measurement, with an edit that can be taken off and put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.model.swap import swapped


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model under measurement, and the weights that an edit replaced in it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Untouched values of the edited parameters, by name; empty for an unedited model."""
    retain_only: "LoadedModel | None" = None
    """The same model trained without the forget set, for metrics that compare with it."""

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The untouched model, for as long as the context lasts; the edit is put back on exit, bit for bit."""
        with swapped(self.model, self.originals):
            yield self.model
