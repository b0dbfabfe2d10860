"""Record once, replay the slice: run only the layers that training can change.

The library's own forward runs once, without gradient, up to the last layer of the slice. On the way the hidden state
entering the first layer and the arguments that the library hands to each layer are noted. Training then calls
those layers itself. Nothing of any model family is rewritten, and `check` proves the equality on the model at hand.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.errors import ReplayError
from lethe.model import hooks
from lethe.model.hooks import replaced_forward
from lethe.model.layers import d_model, device_of, find_layers
from lethe.types import Activation, Batch


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends the library's forward after the last layer of interest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """What the library handed to the slice for one batch, and what the untouched slice made of it."""

    batch: Batch
    hidden: Float[Tensor, "batch pos d_model"]
    """The hidden state entering the first layer of the slice."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """Per layer: the positional arguments after the hidden state, and the keyword arguments."""
    constants: tuple[tuple[nn.Module, Any], ...]
    """Outputs of submodules of the first layer that run before the first trained matrix."""
    frozen: Activation
    """The untouched activation at the last layer of the slice."""

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that belong to this recording."""
        kept = [self.hidden, self.frozen.h, *(t for _, out in self.constants for t in _tensors(out))]
        shared = {id(t): t for args, kwargs in self.calls for t in _tensors((args, kwargs))}
        return sum(t.numel() * t.element_size() for t in [*kept, *shared.values()])


class LayerSlice:
    """Layers [start_at_layer, stop_at_layer) of a model, and the weights in them that training may change.

    `train` holds full parameter names. All other parameters lose `requires_grad`, and the model is put in eval mode
    (a published loss compares two forward passes, so dropout must be off).
    """

    def __init__(self, model: PreTrainedModel, start_at_layer: int, stop_at_layer: int, train: tuple[str, ...]):
        self.model = model.eval().requires_grad_(False)
        self.start_at_layer = start_at_layer
        self.stop_at_layer = stop_at_layer
        self.layers = list(find_layers(model))[start_at_layer:stop_at_layer]
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if n in train}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.originals: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.trained.items()}
        self.d_model = d_model(model)
        self.device = device_of(model)
        self.recording_seconds = 0.0
        """Time spent in `record` so far."""

    def record(self, batch: Batch) -> Recording:
        """Run the untouched model up to the slice's end and note what it handed to the slice."""
        started = time.perf_counter()
        with self.untouched():
            (recording,) = record_together([self], batch)
        self.recording_seconds += time.perf_counter() - started
        return recording

    def __call__(
        self, recording: Recording, noise: Float[Tensor, "batch pos d_model"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The activation at the slice's last layer with the current weights; gradients reach the trained ones.

        `noise` is added to the hidden state that enters the first layer.
        """
        hidden = recording.hidden if noise is None else recording.hidden + noise
        # What was recorded of the first layer holds for its recorded input alone.
        with _constant(recording.constants if noise is None else ()):
            for layer, (args, kwargs) in zip(self.layers, recording.calls, strict=True):
                hidden = hooks.hidden_of(layer(hidden, *args, **kwargs))
        return hidden

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The initial weights, without gradient, for as long as the context lasts."""
        current = {name: parameter.data for name, parameter in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                parameter.data = self.originals[name]
            with torch.no_grad():
                yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = current[name]

    def check(self, batch: Batch) -> None:
        """Prove on this model that replaying equals a full forward, before and after its weights move.

        Raises: ReplayError if a replay differs (on a CPU: at all), or if a trained matrix has no influence.
        """
        recording = self.record(batch)
        batch = recording.batch
        current = {name: parameter.data for name, parameter in self.trained.items()}
        noise = torch.Generator().manual_seed(0)
        try:
            for name, parameter in self.trained.items():
                step = torch.randn(parameter.shape, generator=noise) * self.originals[name].float().std().cpu()
                parameter.data = self.originals[name] + step.to(parameter.device, parameter.dtype)
            with torch.no_grad():
                expected = self._forward(batch)
                # Twice: a layer that writes into a recorded tensor would be right once.
                for _ in range(2):
                    self._compare(self(recording), expected)
            output = self(recording).float().square().mean()
            gradients = torch.autograd.grad(output, list(self.trained.values()), allow_unused=True)
        finally:
            for name, parameter in self.trained.items():
                parameter.data = current[name]
        idle = [name for name, gradient in zip(self.trained, gradients, strict=True) if gradient is None]
        if idle:
            raise ReplayError(
                f"{', '.join(idle)} does not influence the output of layer {self.stop_at_layer - 1}, so it cannot be "
                "trained there.\nChoose other --train-modules or --train-layers."
            )
        with self.untouched():
            self._compare(self(recording), recording.frozen.h)

    def delta(self) -> dict[str, Tensor]:
        """The trained weights as they are now, by full parameter name."""
        return {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @contextmanager
    def noting(self, batch: Batch) -> Iterator[list[Recording]]:
        """Note what the library hands to the slice while the context lasts; the recording is there after its end."""
        inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        frozen: list[Tensor] = []
        found: list[Recording] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args, kwargs) if args else ((kwargs["hidden_states"],), _without_hidden(kwargs)))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            last = self.layers[-1].register_forward_hook(lambda _, __, output: frozen.append(hooks.hidden_of(output)))
            stack.callback(last.remove)
            constants = stack.enter_context(self._watch_first_layer())
            yield found
        found.append(
            Recording(
                batch=batch,
                hidden=inputs[0][0][0],
                calls=tuple((args[1:], kwargs) for args, kwargs in inputs),
                constants=tuple(constants),
                frozen=Activation(h=frozen[0], mask=batch.mask),
            )
        )

    def restore(self) -> None:
        """Put the initial weights back, for good."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.originals[name])
                # That of a run that diverged or was interrupted would stand in the next one's first step.
                parameter.grad = None

    def _compare(self, replayed: Tensor, expected: Tensor) -> None:
        difference = (replayed.float() - expected.float()).abs().max().item()
        # A GPU may choose another kernel for the same product; a CPU repeats its sums exactly.
        allowed = 0.0 if self.device.type == "cpu" else 1e-2 * expected.float().abs().max().item()
        if not difference <= allowed:
            raise ReplayError(
                f"replaying layers {self.start_at_layer}..{self.stop_at_layer - 1} of model_type "
                f"'{self.model.config.model_type}' differs from its own forward by {difference:.3g} (allowed "
                f"{allowed:.3g}), so training would be wrong and was not started.\nPlease report the model type."
            )

    def _forward(self, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
        """The library's own forward, ended after the last layer of the slice."""
        last: list[Tensor] = []

        def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            last.append(hooks.hidden_of(output))
            raise _Stop

        handle = self.layers[-1].register_forward_hook(stop)
        try:
            self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return last[0]

    @contextmanager
    def _watch_first_layer(self) -> Iterator[list[tuple[nn.Module, Any]]]:
        """Collect outputs of the first layer's submodules that finish before its first trained matrix is used.

        They do not depend on what is trained, so a replay need not compute them again: attention, most of all.
        Outputs wider than the hidden state (the MLP's inner ones) would cost more memory than they save time.
        """
        first = self.layers[0]
        owners = {id(first.get_submodule(path)) for path in self._trained_modules(first)}
        finished: dict[int, tuple[nn.Module, Any, int]] = {}
        constants: list[tuple[nn.Module, Any]] = []
        reached = False
        width = 0

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal reached
            reached = reached or id(module) in owners

        def leave(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            if not reached:
                calls = finished[id(module)][2] + 1 if id(module) in finished else 1
                finished[id(module)] = (module, output, calls)

        def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal width
            width = (args[0] if args else kwargs["hidden_states"]).numel()

        handles = [first.register_forward_pre_hook(measure, with_kwargs=True)]
        for module in first.modules():
            if module is not first:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield constants
        finally:
            for handle in handles:
                handle.remove()
        covered: set[int] = set()
        for module in first.modules():
            _, output, calls = finished.get(id(module), (module, None, 0))
            heavy = any(parameter.ndim >= 2 for parameter in module.parameters())
            light = 0 < sum(t.numel() for t in _tensors(output)) <= width
            if calls == 1 and heavy and light and id(module) not in covered:
                constants.append((module, output))
                covered |= {id(inner) for inner in module.modules()}

    def _trained_modules(self, first: nn.Module) -> set[str]:
        mine = {id(p) for p in self.trained.values()}
        return {name.rpartition(".")[0] for name, p in first.named_parameters() if id(p) in mine}


def record_together(slices: Sequence[LayerSlice], batch: Batch) -> list[Recording]:
    """A recording for each of several slices of one model, from one pass through the weights as they are."""
    batch = batch.to(slices[0].device)
    with torch.no_grad(), ExitStack() as stack:
        found = [stack.enter_context(layers.noting(batch)) for layers in slices]
        max(slices, key=lambda layers: layers.stop_at_layer)._forward(batch)
    return [recording for (recording,) in found]


def _without_hidden(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "hidden_states"}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)


@contextmanager
def _constant(outputs: tuple[tuple[nn.Module, Any], ...]) -> Iterator[None]:
    """Let modules return recorded outputs instead of computing them, for as long as the context lasts."""
    with ExitStack() as stack:
        for module, output in outputs:
            stack.enter_context(replaced_forward(module, _returning(output)))
        yield


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
