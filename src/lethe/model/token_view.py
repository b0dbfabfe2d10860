"""Token log-probabilities of a model, now and frozen, from the first layer that moves to the head.

Layers below it run once for each batch. Those above are replayed as a slice; the final norm, the head and whatever a
family does to its logits are the library's own forward, whose layers all hand on the state that the replay ended with.
The reference is the untouched final hidden state of a recording: no second model is needed, and the full distribution
costs one pass through the head, or a lookup.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, pad
from transformers import PreTrainedModel

from lethe.errors import ReplayError
from lethe.model.hooks import changed, forward, replaced_forward
from lethe.model.layers import find_layers
from lethe.model.recordings import Store
from lethe.model.trainable import Trainable
from lethe.model.view import Disturbance, Recording, View
from lethe.types import Batch


class TokenLogProbs:
    """Log-probabilities of the tokens of a batch, each given those before it; what is not asked for is not computed.

    Nothing of the vocabulary's size is held but what was read, so read what a loss needs before weights move again.
    """

    def __init__(
        self,
        h: Float[Tensor, "batch pos d_model"],
        batch: Batch,
        *,
        logits: Callable[[], Float[Tensor, "batch pos vocab"]],
    ):
        self.h = h
        """The last layer's output."""
        self.batch = batch
        self.mask: Bool[Tensor, "batch pos"] = _predicted(batch)
        """Tokens that are predicted and count: neither padding nor the first of a row."""
        self._logits = logits

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors that it holds."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))

    @cached_property
    def of_tokens(self) -> Float[Tensor, "batch pos"]:
        """Log-probability of each token, in fp32; 0 at position 0, and meaningless where the mask is False."""
        if "distribution" in vars(self):
            return self.distribution.gather(-1, self.batch.input_ids[..., None])[..., 0]
        return _of_tokens(self._logits(), self.batch)

    @cached_property
    def distribution(self) -> Float[Tensor, "batch pos vocab"]:
        """Log-probability, in fp32, of every token of the vocabulary at each position; 0 at position 0."""
        return pad(log_softmax(self._logits()[:, :-1].float(), -1), (0, 0, 1, 0))


class _Reference(TokenLogProbs):
    """What the untouched model gave; the distribution is looked up or recomputed each time, and never held."""

    def __init__(
        self,
        h: Float[Tensor, "batch pos d_model"],
        batch: Batch,
        *,
        logits: Callable[[], Float[Tensor, "batch pos vocab"]],
        keep: Store | None,
    ):
        super().__init__(h, batch, logits=logits)
        now = TokenLogProbs(h, batch, logits=logits)
        # Half precision: of log-probabilities above -16 that is an error below 0.008.
        self._kept = keep.keep(now.distribution.half()) if keep is not None else None
        self.of_tokens = now.of_tokens

    @property
    def distribution(self) -> Float[Tensor, "batch pos vocab"]:  # type: ignore[override] - read the same way
        """As of any `TokenLogProbs`; in the precision of fp16 where it was kept."""
        if self._kept is not None:
            return self._kept.float()
        return TokenLogProbs(self.h, self.batch, logits=self._logits).distribution


TokenRecording = Recording[TokenLogProbs]
"""What a replay of one batch needs, and the reference: `frozen`."""


class TokenView(View[TokenLogProbs, TokenLogProbs]):
    """A model's token log-probabilities, and what moves in it.

    The reference's token log-probabilities are always kept. Its full distribution is recomputed at each use, from the
    untouched final hidden state and head, or kept in half precision in `distributions` as long as there is room.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        train: Trainable | tuple[str, ...],
        *,
        distributions: Store | None = None,
        originals_in: Path | None = None,
    ):
        super().__init__(model, train, originals_in=originals_in)
        layers = list(find_layers(model))
        trained = {id(parameter) for parameter in self.trained.values()}
        inside = [{id(parameter) for parameter in layer.parameters()} & trained for layer in layers]
        below = trained - set[int]().union(*inside) - _only_in_head(model)
        self._is_whole = bool(below)
        first = 0 if below else next((number for number, found in enumerate(inside) if found), len(layers) - 1)
        self._place(first, len(layers), (len(layers) - 1,))
        self._distributions = distributions
        self._all_layers = layers
        self._form: Callable[[Tensor], Any] = _alone

    def record(self, batch: Batch) -> TokenRecording:
        """Run the untouched model once, and keep what enters the first layer that moves and what the last one gives."""

        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._form = partial(_first_of, len(output)) if isinstance(output, tuple) else _alone

        handle = self.layers[-1].register_forward_hook(note)
        try:
            return super().record(batch)
        finally:
            handle.remove()

    def __call__(self, recording: TokenRecording, disturbance: Disturbance | None = None) -> TokenLogProbs:
        """Log-probabilities with the current weights; gradients reach what is trained."""
        if self._is_whole:
            h = self._through_all_layers(recording.batch, disturbance)
        else:
            h = self._replay(recording, disturbance)[self.stop_at_layer - 1]
        return TokenLogProbs(h, recording.batch, logits=partial(self._logits, h, recording.batch))

    def see(self, recording: TokenRecording, disturbance: Disturbance | None = None) -> TokenLogProbs:
        """As calling the view."""
        return self(recording, disturbance)

    def check(self, batch: Batch) -> None:
        """Prove on this model that replaying equals a full forward, and its gradients, before and after weights move.

        Raises: ReplayError if one differs (on a CPU: at all), or if nothing of what is trained has an influence.
        """
        recording = self.record(batch)
        parameters = list(self.trained.values())
        noise = torch.Generator().manual_seed(0)
        weights = torch.randn(recording.batch.input_ids.shape, generator=noise).to(self.device)
        with self.untouched():
            self._compare(recording.frozen.of_tokens, _of_tokens(self._in_full(recording.batch), recording.batch))
        with self._holding(self._moved()):
            full = _of_tokens(self._in_full(recording.batch), recording.batch)
            if not full.requires_grad:
                raise ReplayError(
                    f"nothing of {', '.join(self.trained)} influences the model's tokens, so there is "
                    "nothing to train.\nChoose other parameters."
                )
            expected = torch.autograd.grad((full * weights).sum(), parameters, allow_unused=True)
            # Twice: a layer that writes into a recorded tensor would be right once.
            self._compare(self(recording).of_tokens, full)
            now = self(recording).of_tokens
            self._compare(now, full)
            replayed = torch.autograd.grad((now * weights).sum(), parameters, allow_unused=True)
        for mine, theirs in zip(replayed, expected, strict=True):
            if mine is not None or theirs is not None:
                self._compare(*(torch.zeros(()) if gradient is None else gradient for gradient in (mine, theirs)))

    def _frozen(self, read: dict[int, Tensor], batch: Batch) -> TokenLogProbs:
        h = read[self.stop_at_layer - 1]
        return _Reference(h, batch, logits=partial(self._untouched_logits, h, batch), keep=self._distributions)

    def _untouched_logits(self, h: Float[Tensor, "batch pos d_model"], batch: Batch) -> Tensor:
        with self.untouched():
            return self._logits(h, batch)

    def _logits(self, h: Float[Tensor, "batch pos d_model"], batch: Batch) -> Float[Tensor, "batch pos vocab"]:
        """The library's own norm, head and what it does to logits, of a given last hidden state."""
        with ExitStack() as stack:
            for layer in self._all_layers:
                stack.enter_context(replaced_forward(layer, lambda *_, **__: self._form(h)))
            return self._in_full(batch)

    def _in_full(self, batch: Batch) -> Float[Tensor, "batch pos vocab"]:
        return forward(self.model, batch).logits

    def _through_all_layers(self, batch: Batch, disturbance: Disturbance | None) -> Float[Tensor, "batch pos d_model"]:
        """The library's forward to the last layer, from embeddings that move."""
        with ExitStack() as stack:
            for number, tensor in self._by_layer(disturbance).items():
                if number >= 0:
                    stack.enter_context(changed(self.layers[number], partial(torch.add, tensor)))
                else:
                    hook = partial(_add_to_input, tensor)
                    stack.callback(self.layers[0].register_forward_pre_hook(hook, with_kwargs=True).remove)
            return self._forward(batch)


def _of_tokens(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Float[Tensor, "batch pos"]:
    # All positions, the last one ignored: leaving it out would copy the logits.
    following = pad(batch.input_ids[:, 1:], (0, 1), value=-100)
    losses = cross_entropy(logits.float().flatten(0, 1), following.flatten(), ignore_index=-100, reduction="none")
    return pad(-losses.view(following.shape)[:, :-1], (1, 0))


def _predicted(batch: Batch) -> Bool[Tensor, "batch pos"]:
    return batch.mask & batch.attention_mask & pad(batch.attention_mask[:, :-1], (1, 0), value=False)


def _only_in_head(model: PreTrainedModel) -> set[int]:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return set()
    return {id(parameter) for parameter in head.parameters()} - {id(parameter) for parameter in embeddings.parameters()}


def _alone(h: Tensor) -> Tensor:
    return h


def _first_of(width: int, h: Tensor) -> tuple[Tensor | None, ...]:
    return h, *[None] * (width - 1)


def _add_to_input(
    tensor: Tensor, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (args[0] + tensor, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + tensor}
