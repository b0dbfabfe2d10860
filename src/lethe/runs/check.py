"""Prove on a model, before anything is trained, that replaying its layers equals its own forward."""

import torch

from lethe.runs.config import RunConfig
from lethe.runs.workspace import Workspace
from lethe.types import Batch


def check(config: RunConfig) -> dict[str, object]:
    """Prove the replay on two rows of arbitrary tokens, one of them padded; says what would be trained.

    Raises: ReplayError, ModelError, InvalidLayerError, UnknownModuleError.
    """
    layers = Workspace(config.base).slice(config)
    vocabulary = layers.model.config.get_text_config().vocab_size
    ids = torch.arange(2 * 16).reshape(2, 16) % vocabulary
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, 10:] = False
    layers.check(Batch(input_ids=ids, attention_mask=real, mask=real))
    return {
        "model_type": layers.model.config.model_type,
        "layers replayed": f"{layers.start_at_layer}..{layers.stop_at_layer - 1}",
        "d_model": layers.d_model,
        "trained": {name: list(parameter.shape) for name, parameter in layers.trained.items()},
    }
