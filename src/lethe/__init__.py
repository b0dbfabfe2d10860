"""Remove chosen knowledge from open-weight language models by steering their activations."""

from lethe.__version__ import __version__ as __version__
from lethe.errors import LetheError
from lethe.inference.loaded_model import LoadedModel
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.lunar import LUNAR
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.metrics.protocol import Metric
from lethe.model.loading import load_model, load_tokenizer
from lethe.model.patch import Patch
from lethe.model.slice import LayerSlice
from lethe.runs.config import RunConfig
from lethe.runs.unlearn import Result, unlearn
from lethe.solvers.gradient import Gradient
from lethe.types import Activation, Batch, EvalSet, Question, Scores

__all__ = [
    "LUNAR",
    "RMU",
    "RSV",
    "Activation",
    "AdaptiveRMU",
    "Batch",
    "EvalSet",
    "Gradient",
    "LayerSlice",
    "LetheError",
    "LoadedModel",
    "Metric",
    "Patch",
    "Question",
    "Result",
    "RunConfig",
    "Scores",
    "SteeringMethod",
    "load_model",
    "load_tokenizer",
    "unlearn",
]
