"""The one trained matrix of a layer: its inputs, its orientation, and the proof that the layer is linear in it."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lethe.errors import UnknownModuleError
from lethe.methods.protocol import Method, SteeringMethod
from lethe.model import hooks
from lethe.model.slice import LayerSlice, Recording
from lethe.solvers.protocol import Cost, Problem
from lethe.types import Activation, Batch, State

LINEAR = 1e-4
"""Largest error of h0 + D x, relative to D x, beside the rounding of the model's dtype."""


def matrix_inputs(layers: LayerSlice, batch: Batch) -> tuple[Float[Tensor, "token p"], Recording]:
    """Inputs of the trained matrix at the counted tokens of a batch, and the recording they came from."""
    _, _, owner, _ = _matrix(layers)
    inputs: list[Tensor] = []
    with hooks.inputs([owner], lambda _, x: inputs.append(x)):
        recording = layers.record(batch)
    if len(inputs) != 1:
        raise _refusal(layers, f"is used {len(inputs)} times in one forward pass")
    (x,) = inputs
    return x.reshape(-1, x.shape[-1])[recording.batch.mask.flatten()], recording


def residual(
    method: SteeringMethod, recording: Recording, state: State, dtype: torch.dtype
) -> Float[Tensor, "token d_model"]:
    """Forget target minus untouched activation at the counted tokens; the target is worked out in `dtype`."""
    frozen = Activation(h=recording.frozen.h.to(dtype), mask=recording.frozen.mask)
    return (method.forget_target(frozen, state) - frozen.h)[recording.batch.mask]


def matrix(layers: LayerSlice) -> Float[Tensor, "d_model p"]:
    """The untouched matrix, in the model's dtype."""
    name = _matrix(layers)[0]
    return oriented(layers, layers.originals[name])


def edited(layers: LayerSlice, delta: Float[Tensor, "d_model p"]) -> dict[str, Tensor]:
    """The trained weight after an edit, by full parameter name, in its own orientation and dtype."""
    name = _matrix(layers)[0]
    original = layers.originals[name]
    moved = original.to(delta.dtype) + oriented(layers, delta).to(original.device)
    return {name: moved.to(original.dtype).contiguous()}


def oriented(layers: LayerSlice, values: Tensor) -> Tensor:
    """A [d_model p] matrix as the parameter stores it, or the parameter's as [d_model p]: Conv1D is transposed."""
    return values.T if _matrix(layers)[3] else values


def check_linear(layers: LayerSlice, batch: Batch) -> None:
    """Prove on this model that an edit D of the trained matrix turns the layer's output into h0 + D x.

    Raises: UnknownModuleError where a norm, a factor, a choice of experts or another layer stands in between.
    """
    name, parameter, _, _ = _matrix(layers)
    inputs, recording = matrix_inputs(layers, batch)
    x, mask = inputs.float(), recording.batch.mask
    h0 = recording.frozen.h.float()[mask]
    original, current = layers.originals[name], parameter.data
    step = torch.randn(original.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    step *= h0.norm() / (x @ oriented(layers, step).T).norm()
    try:
        parameter.data = (original.float() + step).to(parameter.dtype)
        # What rounding to the model's dtype left of the step is what the output must show.
        expected = x @ oriented(layers, parameter.data.float() - original.float()).T
        with torch.no_grad():
            gained = layers(recording).float()[mask] - h0
    finally:
        parameter.data = current
    allowed = LINEAR + 8 * torch.finfo(parameter.dtype).eps
    if (gained - expected).norm() <= allowed * expected.norm():
        return
    factor = ((gained * expected).sum() / expected.square().sum()).item()
    if (gained - factor * expected).norm() <= allowed * expected.norm():
        raise _refusal(layers, f"has its output multiplied by {factor:.4g} before it reaches the layer's output")
    raise _refusal(layers, "has a norm or another operation between itself and the layer's output")


def _matrix(layers: LayerSlice) -> tuple[str, nn.Parameter, nn.Module, bool]:
    """Name, parameter and module of the one trained matrix, and whether it is stored as [p d_model]."""
    if len(layers.trained) != 1:
        raise _refusal(layers, f"are {len(layers.trained)} matrices, and a closed form moves one")
    ((name, parameter),) = layers.trained.items()
    if not any(parameter is inside for inside in layers.layers[-1].parameters()):
        raise _refusal(layers, f"stands below layer {layers.stop_at_layer - 1}, where the activation is steered")
    if parameter.ndim != 2:
        raise _refusal(layers, f"holds one matrix for each of {parameter.shape[0]} experts")
    owner = layers.model.get_submodule(name.rpartition(".")[0])
    transposed = isinstance(owner, Conv1D)
    width = parameter.shape[1 if transposed else 0]
    if width != layers.d_model:
        raise _refusal(layers, f"has {width} outputs, the layer {layers.d_model}")
    return name, parameter, owner, transposed


def _refusal(layers: LayerSlice, found: str) -> UnknownModuleError:
    names = ", ".join(layers.trained) or "no matrix"
    return UnknownModuleError(
        f"no closed form is known for this edit: {names} {found} (model_type '{layers.model.config.model_type}').\n"
        "Use --solver gradient, or name one matrix of the steered layer that writes into its output (--train-modules)."
    )


FP64_WIDTH = 4096
"""Sums of wider matrices are kept in fp32: at 14336 one of them is 0.8 GB already."""


def cost_of_sums(problem: Problem) -> Cost:
    """A Gram matrix and two products of residuals for each topic, a Gram matrix for what is kept; and their solves."""
    widths = [math.prod(shape) // problem.d_model for shape in problem.trained.values()]
    number = 8 if max(widths) <= FP64_WIDTH else 4
    squares = sum((problem.topics + 1) * p * p + 2 * problem.topics * problem.d_model * p for p in widths)
    return Cost(nbytes=squares * number, flops=sum(p**3 / 3 + 2 * p * p * problem.d_model for p in widths))


def refusal(method: Method, solver: str) -> str | None:
    """Why a solver of one matrix cannot solve for a method; None if it can."""
    if not isinstance(method, SteeringMethod):
        return f"{type(method).__name__} has no targets, which --solver {solver} asks for.\nPass --solver gradient."
    if method.nu > 0:
        return (
            f"'nu' must be 0 for --solver {solver}: noise of mean zero does not move the optimum of least "
            f"squares. Got {method.nu}.\nPass --solver gradient to train with noise."
        )
    return None
