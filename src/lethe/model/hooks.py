"""Watch, change or replace what parts of a model compute, for as long as a context lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a layer returns: that itself, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def changing(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The hidden state that leaves the layer is changed for as long as the context lasts."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        changed = change(hidden_of(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put a forward in a module's place for as long as the context lasts."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own  # type: ignore[method-assign]
