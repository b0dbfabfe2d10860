"""Hidden states of a model, replayed: at one layer, or at several."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lethe.errors import ReplayError
from lethe.model.trainable import Trainable
from lethe.model.view import Disturbance, Frozen, Now, Recording, View
from lethe.types import Activation, Batch


class _Layers(View[Now, Frozen]):
    """A view of hidden states."""

    def check(self, batch: Batch) -> None:
        """Prove on this model that replaying equals a full forward, before and after its weights move.

        Raises: ReplayError if a replay differs (on a CPU: at all), or if a trained matrix has no influence.
        """
        recording = self.record(batch)
        with self._holding(self._moved()):
            expected: dict[int, Tensor] = {}
            with torch.no_grad():
                with self._reading(expected):
                    self._forward(recording.batch)
                # Twice: a layer that writes into a recorded tensor would be right once.
                for _ in range(2):
                    self._compare_all(self._replay(recording, None), expected)
            output = torch.stack([h.float().square().mean() for h in self._replay(recording, None).values()]).sum()
            gradients = torch.autograd.grad(output, list(self.trained.values()), allow_unused=True)
        idle = [name for name, gradient in zip(self.trained, gradients, strict=True) if gradient is None]
        if idle:
            raise ReplayError(
                f"{', '.join(idle)} does not influence the output of layer {self.stop_at_layer - 1}, so it cannot be "
                "trained there.\nChoose other --train-modules or --train-layers."
            )
        with self.untouched():
            self._compare_all(self._replay(recording, None), self._recorded(recording.frozen))

    @abstractmethod
    def _recorded(self, frozen: Frozen) -> Mapping[int, Tensor]:
        """The untouched hidden states by layer, from a recording, which may be one that was made before."""

    def _compare_all(self, replayed: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> None:
        for number, h in replayed.items():
            self._compare(h, expected[number])


class LayerSlice(_Layers[Tensor, Activation]):
    """Layers [start_at_layer, stop_at_layer) of a model, read at the last one."""

    def __init__(
        self,
        model: PreTrainedModel,
        start_at_layer: int,
        stop_at_layer: int,
        train: Trainable | tuple[str, ...],
        *,
        originals_in: Path | None = None,
    ):
        super().__init__(model, train, originals_in=originals_in)
        self._place(start_at_layer, stop_at_layer, (stop_at_layer - 1,))

    def __call__(
        self, recording: Recording[Activation], disturbance: Disturbance | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The activation at the slice's last layer with the current weights; gradients reach the trained ones."""
        return self._replay(recording, disturbance)[self.stop_at_layer - 1]

    def see(self, recording: Recording[Activation], disturbance: Disturbance | None = None) -> Activation:
        """The activation with the tokens that count."""
        return Activation(h=self(recording, disturbance), mask=recording.batch.mask)

    def _frozen(self, read: dict[int, Tensor], batch: Batch) -> Activation:
        return Activation(h=read[self.stop_at_layer - 1], mask=batch.mask)

    def _recorded(self, frozen: Activation) -> dict[int, Tensor]:
        return {self.stop_at_layer - 1: frozen.h}


class SeveralLayers(_Layers[dict[int, Tensor], dict[int, Activation]]):
    """Layers of a model from `start_at_layer` to the last of `read_layers`, read at each of these."""

    def __init__(
        self,
        model: PreTrainedModel,
        start_at_layer: int,
        read_layers: tuple[int, ...],
        train: Trainable | tuple[str, ...],
        *,
        originals_in: Path | None = None,
    ):
        super().__init__(model, train, originals_in=originals_in)
        self._place(start_at_layer, max(read_layers) + 1, read_layers)

    def __call__(
        self, recording: Recording[dict[int, Activation]], disturbance: Disturbance | None = None
    ) -> dict[int, Tensor]:
        """The activations [batch pos d_model] with the current weights, by layer; gradients reach the trained ones."""
        return self._replay(recording, disturbance)

    def see(
        self, recording: Recording[dict[int, Activation]], disturbance: Disturbance | None = None
    ) -> dict[int, Activation]:
        """The activations with the tokens that count."""
        read = self(recording, disturbance)
        return {number: Activation(h=h, mask=recording.batch.mask) for number, h in read.items()}

    def _frozen(self, read: dict[int, Tensor], batch: Batch) -> dict[int, Activation]:
        return {number: Activation(h=h, mask=batch.mask) for number, h in read.items()}

    def _recorded(self, frozen: dict[int, Activation]) -> dict[int, Tensor]:
        return {number: activation.h for number, activation in frozen.items()}
