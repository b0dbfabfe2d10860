"""Read, change or replace what parts of a model compute, for as long as a context lasts; and run it on a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lethe.types import Batch


def forward(model: nn.Module, batch: Batch) -> Any:
    """What the library's own forward returns for a batch on the model's device; no cache of keys is filled."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)


def hidden_of(output: Any) -> Tensor:
    """The hidden state in what a layer returns: that itself, or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs(modules: Sequence[nn.Module], read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`read` sees each hidden state that leaves one of the modules, after the module's place among them."""
    with ExitStack() as stack:
        for place, module in enumerate(modules):

            def hook(_: nn.Module, __: tuple[Any, ...], output: Any, place: int = place) -> None:
                read(place, hidden_of(output))

            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def inputs(modules: Sequence[nn.Module], read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`read` sees each hidden state that enters one of the modules, after the module's place among them."""
    with ExitStack() as stack:
        for place, module in enumerate(modules):

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: int = place) -> None:
                read(place, args[0] if args else kwargs["hidden_states"])

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The hidden state that leaves the module is what `change` makes of it."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = change(hidden_of(output))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A forward stands in the place of the module's own."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own  # type: ignore[method-assign]
