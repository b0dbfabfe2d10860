"""Evaluation that starts at the slice: layers that an edit leaves alone are run once for each batch, not per model.

The library's own forward runs; what changes is that its lower layers hand on what they were seen to return. Only calls
that leave no cache behind and go through the head are served so: reading log-probabilities, not generating.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lethe.model.hooks import hidden_of, replaced_forward
from lethe.model.layers import find_layers
from lethe.model.recordings import Store

ALLOWED = 1e-2
"""Largest difference of logits, as a share of the largest, on a GPU, which may choose another kernel; on a CPU none."""


class HiddenCache:
    """Hidden states at a few layers of the untouched model, by the tokens that they were read from."""

    def __init__(self, starts: Sequence[int], store: Store):
        self.starts = tuple(sorted({start for start in starts if start > 0}))
        """Layers from which a forward may start."""
        self.store = store
        self.is_sound = True
        """False once a forward from a start was seen to differ from the whole one; it is then no longer used."""
        self.served = 0
        """Forwards that did not run their lower layers."""
        self._states: dict[bytes, dict[int, Tensor]] = {}
        self._proved: set[int] = set()
        self._widths: dict[int, int] = {}
        """Length of the tuple that a layer hands its state on in; 0 for the state alone."""

    @contextmanager
    def reading(self, model: PreTrainedModel, first: int | None) -> Iterator[None]:
        """While the context lasts, forwards of the model start as late as its first edited layer allows."""
        usable = [start for start in self.starts if first is None or start <= first]
        if not (usable and self.is_sound):
            yield
            return
        layers = list(find_layers(model))[: usable[-1]]
        running = _Forward(usable=usable)
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.enter_context(replaced_forward(layer, self._of_layer(number, layer.forward, running)))
            stack.enter_context(replaced_forward(model, self._of_model(model.forward, running)))
            yield

    def clear(self) -> None:
        """Give all states up."""
        self._states.clear()
        self.store.clear()

    def _of_model(self, original: Callable[..., Any], running: "_Forward") -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = _key(args, kwargs) if self.is_sound else None
            if key is None:
                return original(*args, **kwargs)
            known = self._states.setdefault(key, {})
            start = max((s for s in known if s in running.usable), default=0)
            if start:
                self.served += 1
                return running.from_layer(start, known[start], original, kwargs)
            with running.noting() as noted:
                output = original(**kwargs)
            for start, hidden in noted.items():
                if start not in self._proved:
                    again = running.from_layer(start, hidden, original, kwargs)
                    self.is_sound = self.is_sound and _same(output.logits, again.logits)
                    self._proved.add(start)
                if self.is_sound and (stored := self.store.keep(hidden)) is not None:
                    known[start] = stored
            return output

        return _like(original, forward)

    def _of_layer(self, number: int, original: Callable[..., Any], running: "_Forward") -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if running.skip is not None and number < running.skip[0]:
                start, hidden = running.skip
                width = self._widths[number]
                passed = hidden if number == start - 1 else (args[0] if args else kwargs["hidden_states"])
                return (passed, *[None] * (width - 1)) if width else passed
            output = original(*args, **kwargs)
            if running.noted is not None:
                rest = output[1:] if isinstance(output, tuple) else ()
                if any(part is not None for part in rest):
                    self.is_sound = False
                    return output
                self._widths[number] = len(output) if isinstance(output, tuple) else 0
                if number + 1 in running.usable:
                    running.noted[number + 1] = hidden_of(output)
            return output

        return _like(original, forward)


@dataclass(kw_only=True)
class _Forward:
    """What the forwards of one model and of its layers tell each other."""

    usable: Sequence[int]
    """Layers from which this model's forward may start."""
    noted: dict[int, Tensor] | None = None
    """The states that enter these layers, while a whole forward runs."""
    skip: tuple[int, Tensor] | None = None
    """The layer that a forward starts from, and what enters it."""

    @contextmanager
    def noting(self) -> Iterator[dict[int, Tensor]]:
        self.noted = {}
        try:
            yield self.noted
        finally:
            self.noted = None

    def from_layer(self, start: int, hidden: Tensor, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        self.skip = (start, hidden)
        try:
            return original(**kwargs)
        finally:
            self.skip = None


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """What a call reads, or None for one that does more than read tokens."""
    ids, mask, cache = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
    known = {"input_ids", "attention_mask", "use_cache", "logits_to_keep", "past_key_values"}
    if args or ids is None or not kwargs.keys() <= known or not (_is_fixed(cache) or not kwargs.get("use_cache", True)):
        return None
    # The first layer's keys tell which beginning was read before these tokens.
    beginning = cache.layers[0].keys if cache is not None else None
    found = hashlib.blake2b(digest_size=16)
    for tensor in (ids, mask, beginning):
        if tensor is not None:
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.digest()


def _is_fixed(cache: Cache | None) -> bool:
    """Whether a cache holds a beginning that no call adds to: one of this package's own layers."""
    return type(cache) is Cache and all(type(layer).__module__.startswith("lethe.") for layer in cache.layers)


def _same(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> bool:
    if a.device.type == "cpu":
        return torch.equal(a, b)
    return bool((a.float() - b.float()).abs().max() <= ALLOWED * a.float().abs().max())


def _like(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """The library asks a forward for its arguments."""
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    return forward
