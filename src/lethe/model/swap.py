"""Put tensors in the place of a model's parameters, and back, bit for bit."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel


def restore(model: PreTrainedModel, originals: Mapping[str, Tensor]) -> None:
    """Put back what `Patch.apply_in_memory` replaced."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in originals.items():
            parameters[name].copy_(value)


def copies(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """The values that these parameters have now."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


@contextlib.contextmanager
def swapped(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Other values in the model's parameters for as long as the context lasts, which gives those that they replaced.

    On exit these are put back, bit for bit.
    """
    before = copies(model, values)
    try:
        restore(model, values)
        yield before
    finally:
        restore(model, before)
