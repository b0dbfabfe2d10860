"""What moves: the parameters that a training may change, and the whole tensors that an edit makes of them.

A kind says `attach`; what was attached is taken off by `detach`. Attaching never changes what a model computes: the
values that the parameters have at first are those of the untouched model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lethe.errors import UnknownModuleError, UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class Attached:
    """Parameters of one model that wait to be trained."""

    parameters: dict[str, nn.Parameter]
    """By the name that they have in the model while they are attached."""
    values: Callable[[], dict[str, Tensor]]
    """New values of whole parameters of the model, by the names of before: what a patch is made of."""
    detach: Callable[[], None]
    """Leaves the model's modules as they were; the attached parameters end with it."""


@runtime_checkable
class Trainable(Protocol):
    """A kind of thing that moves."""

    def attach(self, model: PreTrainedModel) -> Attached:
        """Find or add its parameters; does not change what requires a gradient.

        Raises: UnknownModuleError where the model has no place for it.
        """
        ...


@dataclass(frozen=True)
class Matrices:
    """Whole parameters by full name; a tied one may have either name, and moves in both places."""

    names: tuple[str, ...]

    def attach(self, model: PreTrainedModel) -> Attached:
        """The parameters themselves."""
        wanted = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in self.names}
        return _whole({name: p for name, p in model.named_parameters() if id(p) in wanted})


@dataclass(frozen=True)
class Everything:
    """All parameters; tied ones once."""

    def attach(self, model: PreTrainedModel) -> Attached:
        """The parameters themselves."""
        return _whole(dict(model.named_parameters()))


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """LoRA factors beside linear layers (Hu et al. 2021), by PEFT: W + alpha / rank * B A, with B zero at first."""

    names: tuple[str, ...]
    """Full parameter names of the matrices that they are added to."""
    rank: int = 16
    alpha: float = 16.0
    seed: int = 0
    """Of A's first values."""

    def attach(self, model: PreTrainedModel) -> Attached:
        """Factors inside the model, in the place of each named layer.

        Raises: UsageError without PEFT, or where a named matrix is tied to another layer: its sum would move both.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UsageError("LoRA needs PEFT.\nRun: pip install 'lethe-unlearn[lora]'") from error
        paths = {name: name.removesuffix(".weight") for name in self.names}
        layers = {path: _linear(model, path, Conv1D) for path in paths.values()}
        for path, layer in layers.items():
            if len(_owners(model, layer.weight)) > 1:
                raise UsageError(
                    f"{path} shares its matrix with another layer, so LoRA factors of one would be merged into both.\n"
                    "Train the whole matrix, or leave it out."
                )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type] - any number is taken
            target_modules=list(layers),
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            inject_adapter_in_model(config, model)
        model.eval()
        factors: dict[str, Any] = {path: model.get_submodule(path) for path in layers}

        def values() -> dict[str, Tensor]:
            with torch.no_grad():
                return {
                    name: layers[path].weight + factors[path].get_delta_weight("default").to(layers[path].weight.dtype)
                    for name, path in paths.items()
                }

        def detach() -> None:
            for path, layer in layers.items():
                model.set_submodule(path, layer)
            vars(model).pop("peft_config", None)

        found = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
        return Attached(parameters=found, values=values, detach=detach)


@dataclass(frozen=True)
class EmbeddingRow:
    """Rows of the input embeddings; where the head is tied to them, its rows as well.

    The gradient of all other rows is zero. An optimizer that moves weights without a gradient (by weight decay, or by
    making a whole matrix orthogonal) moves them all the same.
    """

    tokens: tuple[int, ...]

    def attach(self, model: PreTrainedModel) -> Attached:
        """The embedding matrix, with a filter on its gradient."""
        name, matrix = next((n, p) for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        rows = torch.zeros(matrix.shape[0], 1, dtype=torch.bool, device=matrix.device)
        rows[list(self.tokens)] = True
        matrix.requires_grad_(True)
        handle = matrix.register_hook(lambda gradient: torch.where(rows, gradient, 0))
        attached = _whole({name: matrix})
        return Attached(parameters=attached.parameters, values=attached.values, detach=handle.remove)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Directions that named linear layers no longer write into the residual stream: W - Q^T Q W, Q orthonormal rows.

    Projecting the stream itself (Wu et al. 2025) cannot be a patch: each block's norm divides by a length that the
    projection changes. What one layer writes can: it is merged into that layer's matrix and bias, exactly.
    The directions are zero at first, which removes nothing and has no gradient: a method puts the first ones in.
    """

    names: tuple[str, ...]
    """Full parameter names of the matrices."""
    rank: int

    def attach(self, model: PreTrainedModel) -> Attached:
        """A parameter [rank, d_model] in each named layer, whose rows span what is removed."""
        layers = {name: _linear(model, name.removesuffix(".weight")) for name in self.names}
        handles = []
        for layer in layers.values():
            rows = torch.zeros(self.rank, layer.weight.shape[0], device=layer.weight.device)
            layer.register_parameter("projection", nn.Parameter(rows))
            handles.append(layer.register_forward_hook(_project))

        def values() -> dict[str, Tensor]:
            found = {}
            with torch.no_grad():
                for name, layer in layers.items():
                    found[name] = _without(layer.weight.mT, layer.get_parameter("projection")).mT.contiguous()
                    if layer.bias is not None:
                        bias = name.removesuffix("weight") + "bias"
                        found[bias] = _without(layer.bias, layer.get_parameter("projection"))
            return found

        def detach() -> None:
            for handle, layer in zip(handles, layers.values(), strict=True):
                handle.remove()
                layer._parameters.pop("projection", None)

        found = {
            f"{n.removesuffix('.weight')}.projection": layer.get_parameter("projection") for n, layer in layers.items()
        }
        return Attached(parameters=found, values=values, detach=detach)


def _whole(parameters: dict[str, nn.Parameter]) -> Attached:
    return Attached(
        parameters=parameters,
        values=lambda: {name: parameter.detach().clone() for name, parameter in parameters.items()},
        detach=lambda: None,
    )


def _project(layer: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return _without(output, layer.get_parameter("projection"))


def _without(h: Float[Tensor, "*any d_model"], rows: Float[Tensor, "rank d_model"]) -> Float[Tensor, "*any d_model"]:
    """What is left of vectors without their part in the span of the rows."""
    if not rows.any():
        return h
    q = torch.linalg.qr(rows.float().mT).Q.to(h.dtype)
    return h - (h @ q) @ q.mT


def _linear(model: PreTrainedModel, path: str, *kinds: type[nn.Module]) -> Any:
    """A linear layer, or one of these kinds, by its path."""
    layer = dict(model.named_modules()).get(path)
    if not isinstance(layer, (nn.Linear, *kinds)):
        what = "nothing" if layer is None else f"a {type(layer).__name__}"
        raise UnknownModuleError(f"{path} is {what} in this model, not a linear layer.\nName linear layers only.")
    return layer


def _owners(model: PreTrainedModel, parameter: Tensor) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
