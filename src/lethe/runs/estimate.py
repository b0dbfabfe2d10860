"""What a run would load, train and need, without loading a weight."""

import math
import time
from dataclasses import dataclass

import torch

from lethe.model.layers import find_layers, trainable_names
from lethe.runs import inputs as inputs_module
from lethe.runs.config import RunConfig
from lethe.runs.workspace import Workspace
from lethe.solvers.protocol import Problem


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run. Memory and time are estimates."""

    layers: int
    """Layers that training loads: 0..l."""
    of: int
    """Layers of the whole model."""
    matrices: dict[str, tuple[int, ...]]
    """Trained matrices and their shapes."""
    weights_gb: float
    """Weights that training loads."""
    training_gb: float
    """Initial and last good copies, gradients, fp32 masters and AdamW's moments of the trained matrices; of the ridge
    solver, its sums."""
    patch_gb: float
    evaluation_gb: float
    """Weights of the whole model, which evaluation loads after training; 0 if it is skipped."""
    step_flops: float
    """Of one step; of a closed form, of all solves together, without reading the corpora."""
    seconds: float
    """Time of training if its matrix products ran at the rate of one measured here; evaluation comes on top."""
    whole_model_first: bool
    """Whether reference prompts are asked before: that needs the whole model once."""


def plan(config: RunConfig, *, reads: str = "texts") -> Plan:
    """Work out the cost of a run of a method that reads texts or prompts from the model's config alone.

    Raises: ModelError, InvalidLayerError, UnknownModuleError.
    """
    workspace = Workspace(config.base)
    workspace.check_layer(config.layer)
    dtype = workspace.dtype
    part = workspace.skeleton(config.layer + 1)
    names = [trainable_names(part, layer, config.train_modules) for layer in config.trained_layers]
    parameters = dict(part.named_parameters())
    trained = {name: tuple(parameters[name].shape) for name in sum(names, ())}
    inputs = {id(p) for p in part.get_input_embeddings().parameters()}
    output = part.get_output_embeddings()
    head = [p for p in output.parameters() if id(p) not in inputs] if output is not None else []
    loaded = sum(p.numel() for p in part.parameters()) - sum(p.numel() for p in head)
    size = dtype.itemsize
    cost = config.solver.cost(
        Problem(
            layers=tuple(sum(p.numel() for p in layer.parameters()) for layer in find_layers(part)),
            first=config.trained_layers[0],
            trained=trained,
            d_model=part.config.get_text_config().hidden_size,
            batch_tokens=config.batching.batch_size * max(config.batching.max_length),
            topics=inputs_module.count_topics(config.data),
            dtype=dtype,
        )
    )
    whole = 0
    if config.evaluation.evaluate == "all":
        whole = sum(p.numel() for p in workspace.skeleton().parameters())
    return Plan(
        layers=config.layer + 1,
        of=workspace.depth,
        matrices=trained,
        weights_gb=loaded * size / 1e9,
        training_gb=cost.nbytes / 1e9,
        patch_gb=sum(map(math.prod, trained.values())) * size / 1e9,
        evaluation_gb=whole * size / 1e9,
        step_flops=cost.flops,
        seconds=cost.passes * cost.flops / _rate(workspace.device, dtype),
        whole_model_first=reads == "prompts",
    )


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product on this device."""
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    (a @ a)[0, 0].item()
    started = time.perf_counter()
    (a @ a @ a @ a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - started)
