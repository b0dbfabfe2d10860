"""Record once, replay the slice: run only the layers that training can change.

The library's own forward runs once, without gradient, up to the last layer of the slice. On the way the hidden state
entering the first layer and the arguments that the library hands to each layer are noted. Training then calls
those layers itself. Nothing of any model family is rewritten, and `check` proves the equality on the model at hand.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from lethe.errors import InvalidLayerError, ReplayError
from lethe.model import hooks
from lethe.model.layers import d_model, device_of, find_layers
from lethe.model.mapped_files import WeightsOnDisk
from lethe.model.trainable import Matrices, Trainable
from lethe.types import Batch

Now = TypeVar("Now")
Frozen = TypeVar("Frozen")

Disturbance = Mapping[int, Tensor] | Tensor
"""What is added to each layer's output [batch pos d_model], by layer; the number before the first replayed layer, or
a tensor alone, means the state that enters that one."""


class _Stop(Exception):  # noqa: N818 - a signal, not an error
    """Ends the library's forward after the last layer of interest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording(Generic[Frozen]):
    """What the library handed to the slice for one batch, and what the untouched slice made of it."""

    batch: Batch
    hidden: Float[Tensor, "batch pos d_model"]
    """The hidden state entering the first layer of the slice."""
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    """Per layer: the positional arguments after the hidden state, and the keyword arguments."""
    constants: tuple[tuple[nn.Module, Any], ...]
    """Outputs of submodules of the first layer that run before the first trained matrix."""
    frozen: Frozen
    """What the untouched model gives: the activation at the last layer of the slice, or what the view reads."""

    @property
    def nbytes(self) -> int:
        """Memory of the tensors that belong to this recording."""
        kept = [self.hidden, *_tensors(self.frozen), *(t for _, out in self.constants for t in _tensors(out))]
        shared = {id(t): t for args, kwargs in self.calls for t in _tensors((args, kwargs))}
        return sum(t.numel() * t.element_size() for t in [*kept, *shared.values()])


class View(ABC, Generic[Now, Frozen]):
    """A part of a model that can be run again on a recorded batch, and what moves in it.

    `train` says what moves; a tuple of full parameter names means whole matrices. All other parameters lose
    `requires_grad`, and the model is put in eval mode (a published loss compares two forward passes, so dropout must
    be off). With `originals_in` the untouched weights are kept in files of that folder, not in memory.
    """

    def __init__(self, model: PreTrainedModel, train: Trainable | tuple[str, ...], *, originals_in: Path | None = None):
        self.model = model.eval().requires_grad_(False)
        self._attached = (Matrices(train) if isinstance(train, tuple) else train).attach(model)
        model.requires_grad_(False)
        self.trained: dict[str, nn.Parameter] = self._attached.parameters
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.originals: Mapping[str, Tensor] = (
            {name: p.detach().clone() for name, p in self.trained.items()}
            if originals_in is None
            else WeightsOnDisk(self.trained, originals_in)
        )
        self.d_model = d_model(model)
        self.device = device_of(model)
        self.recording_seconds = 0.0
        """Time spent in `record` so far."""

    def _place(self, start_at_layer: int, stop_at_layer: int, read_layers: tuple[int, ...]) -> None:
        """Which layers are replayed, and whose outputs are read."""
        self.start_at_layer = start_at_layer
        self.stop_at_layer = stop_at_layer
        self.read_layers = read_layers
        self.layers = list(find_layers(self.model))[start_at_layer:stop_at_layer]

    @abstractmethod
    def __call__(self, recording: Recording[Frozen], disturbance: Disturbance | None = None) -> Now:
        """What the view reads with the current weights; gradients reach what is trained."""

    @abstractmethod
    def see(self, recording: Recording[Frozen], disturbance: Disturbance | None = None) -> Frozen:
        """The same in the form that the recording keeps of the untouched model, so that both can be compared."""

    @abstractmethod
    def _frozen(self, read: dict[int, Tensor], batch: Batch) -> Frozen:
        """What a recording keeps of the untouched hidden states at `read_layers`."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Prove on this model that replaying equals a full forward, before and after its weights move.

        Raises: ReplayError if a replay differs (on a CPU: at all), or if what is trained has no influence.
        """

    def record(self, batch: Batch) -> Recording[Frozen]:
        """Run the untouched model up to the slice's end and note what it handed to the slice."""
        started = time.perf_counter()
        with self.untouched():
            (recording,) = record_together([self], batch)
        self.recording_seconds += time.perf_counter() - started
        return recording

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The initial weights, without gradient, for as long as the context lasts."""
        with self._holding(self.originals), torch.no_grad():
            yield

    def delta(self) -> dict[str, Tensor]:
        """New values of whole parameters, as they are now, by full parameter name."""
        return self._attached.values()

    def restore(self) -> None:
        """Put the initial weights back, for good, and take off what was added to the model to be trained."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.originals[name])
                # That of a run that diverged or was interrupted would stand in the next one's first step.
                parameter.grad = None
        self._attached.detach()

    @contextmanager
    def noting(self, batch: Batch) -> Iterator[list[Recording[Frozen]]]:
        """Note what the library hands to the slice while the context lasts; the recording is there after its end."""
        inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        read: dict[int, Tensor] = {}
        found: list[Recording[Frozen]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args, kwargs) if args else ((kwargs["hidden_states"],), _without_hidden(kwargs)))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.enter_context(self._reading(read))
            constants = stack.enter_context(self._watch_first_layer())
            yield found
        found.append(
            Recording(
                batch=batch,
                hidden=inputs[0][0][0],
                calls=tuple((args[1:], kwargs) for args, kwargs in inputs),
                constants=tuple(constants),
                frozen=self._frozen(read, batch),
            )
        )

    @contextmanager
    def _reading(self, read: dict[int, Tensor]) -> Iterator[None]:
        """Hidden states that leave the layers that are read go into `read` while the context lasts."""

        def into(number: int) -> Callable[..., None]:
            def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                read[number] = hooks.hidden_of(output)

            return note

        with ExitStack() as stack:
            for number in self.read_layers:
                layer = self.layers[number - self.start_at_layer]
                stack.callback(layer.register_forward_hook(into(number)).remove)
            yield

    def _replay(self, recording: Recording[Frozen], disturbance: Disturbance | None) -> dict[int, Tensor]:
        """Outputs of the layers that are read, by layer, with the current weights."""
        added = self._by_layer(disturbance)
        entering = added.get(self.start_at_layer - 1)
        hidden = recording.hidden if entering is None else recording.hidden + entering
        read: dict[int, Tensor] = {}
        # What was recorded of the first layer holds for its recorded input alone.
        with _constant(recording.constants if entering is None else ()):
            calls = zip(self.layers, recording.calls, strict=True)
            for number, (layer, (args, kwargs)) in enumerate(calls, self.start_at_layer):
                hidden = hooks.hidden_of(layer(hidden, *args, **kwargs))
                if number in added:
                    hidden = hidden + added[number]
                if number in self.read_layers:
                    read[number] = hidden
        return read

    def _by_layer(self, disturbance: Disturbance | None) -> Mapping[int, Tensor]:
        """Raises: InvalidLayerError for a layer that is not replayed."""
        if isinstance(disturbance, Tensor):
            return {self.start_at_layer - 1: disturbance}
        added = disturbance or {}
        if outside := [number for number in added if not self.start_at_layer - 1 <= number < self.stop_at_layer]:
            raise InvalidLayerError(
                f"a disturbance at layer {outside[0]} lies outside the replayed layers "
                f"{self.start_at_layer}..{self.stop_at_layer - 1}.\n"
                f"Disturb one of these, or {self.start_at_layer - 1}: what enters the first."
            )
        return added

    def _forward(self, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
        """The library's own forward, ended after the last layer of the slice."""
        last: list[Tensor] = []

        def stop(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            last.append(hooks.hidden_of(output))
            raise _Stop

        handle = self.layers[-1].register_forward_hook(stop)
        try:
            hooks.forward(self.model, batch)
        except _Stop:
            pass
        finally:
            handle.remove()
        return last[0]

    @contextmanager
    def _holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values of what is trained, for as long as the context lasts."""
        current = {name: parameter.data for name, parameter in self.trained.items()}
        try:
            for name, parameter in self.trained.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in self.trained.items():
                parameter.data = current[name]

    def _moved(self) -> dict[str, Tensor]:
        """Random values about as large as the untouched ones, for a check."""
        noise = torch.Generator().manual_seed(0)
        moved = {}
        for name, original in self.originals.items():
            # The factors of a product start at zero, and would show nothing there.
            size = original.float().square().mean().sqrt().cpu().clamp_min(1e-2)
            step = size * torch.randn(original.shape, generator=noise)
            moved[name] = original + step.to(original.device, original.dtype)
        return moved

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


def record_together(slices: Sequence[View[Any, Frozen]], batch: Batch) -> list[Recording[Frozen]]:
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
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _tensors(getattr(tree, field.name))
    elif isinstance(tree, Iterable) and not isinstance(tree, str):
        for value in tree:
            yield from _tensors(value)


@contextmanager
def _constant(outputs: tuple[tuple[nn.Module, Any], ...]) -> Iterator[None]:
    """Let modules return recorded outputs instead of computing them, for as long as the context lasts."""
    with ExitStack() as stack:
        for module, output in outputs:
            stack.enter_context(hooks.replaced_forward(module, _returning(output)))
        yield


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output
