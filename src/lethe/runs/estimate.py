"""What a run would load, train and need, without loading a weight."""

import math
import time
from dataclasses import dataclass

import torch

from lethe.model.checkpoint_files import count_layers
from lethe.model.layers import find_layers, trainable_names
from lethe.model.loading import skeleton
from lethe.runs import inputs as inputs_module
from lethe.runs.config import RunConfig
from lethe.solvers.ridge import FP64_WIDTH
from lethe.system.machine import find_device


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
    inputs_module.check_layer(config)
    device = find_device(config.device)
    source = inputs_module.model_source(config.model)
    dtype = inputs_module.find_dtype(config.dtype, source, config.revision, device)
    part = skeleton(source, layers=config.layer + 1, revision=config.revision)
    names = [trainable_names(part, layer, config.train_modules) for layer in config.trained_layers]
    parameters = dict(part.named_parameters())
    trained = {name: tuple(parameters[name].shape) for name in sum(names, ())}
    layers = find_layers(part)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    inputs = {id(p) for p in part.get_input_embeddings().parameters()}
    output = part.get_output_embeddings()
    head = [p for p in output.parameters() if id(p) not in inputs] if output is not None else []
    loaded = sum(p.numel() for p in part.parameters()) - sum(p.numel() for p in head)
    moving = sum(parameters[name].numel() for name in trained)
    size = dtype.itemsize
    copies = 3 * size + 8 + (0 if dtype == torch.float32 or config.as_published else 8)
    whole = 0
    if config.evaluate == "all":
        whole = sum(p.numel() for p in skeleton(source, revision=config.revision).parameters())

    tokens = config.batch_size * config.accumulate * max(config.max_length)
    start = config.trained_layers[0]
    replayed = sum(per_layer[start:])
    # Forget and retain: record 0..l once, run the slice once, and go back through its inputs and trained weights.
    products = 2 * (2 * sum(per_layer) + 2 * replayed + 2 * (replayed - per_layer[start]) + 2 * moving) * tokens
    passes = config.steps
    training = moving * copies
    if config.solver != "gradient":
        width = part.config.get_text_config().hidden_size
        inputs_of = [math.prod(shape) // width for shape in trained.values()]
        number = 8 if max(inputs_of) <= FP64_WIDTH else 4
        # A Gram matrix and two products of residuals for each topic, a Gram matrix for what is kept.
        topics = inputs_module.count_topics(config)
        training = sum(((topics + 1) * p * p + 2 * topics * width * p) * number for p in inputs_of)
        products, passes = sum(p**3 / 3 + 2 * p * p * width for p in inputs_of), 1
    return Plan(
        layers=config.layer + 1,
        of=count_layers(source, config.revision),
        matrices=trained,
        weights_gb=loaded * size / 1e9,
        training_gb=training / 1e9,
        patch_gb=moving * size / 1e9,
        evaluation_gb=whole * size / 1e9,
        step_flops=float(products),
        seconds=passes * products / _rate(device, dtype),
        whole_model_first=reads == "prompts",
    )


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one matrix product on this device."""
    a = torch.ones(1024, 1024, device=device, dtype=dtype)
    (a @ a)[0, 0].item()
    started = time.perf_counter()
    (a @ a @ a @ a @ a)[0, 0].item()
    return 4 * 2 * 1024**3 / (time.perf_counter() - started)
