"""Remove chosen knowledge from open-weight language models by steering their activations."""

__version__ = "0.1.0"

from lethe.config import RunConfig
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.lunar import LUNAR
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.patch import Patch
from lethe.protocols import Metric, SteeringMethod, Subject
from lethe.run import Result, unlearn
from lethe.slice import LayerSlice
from lethe.solvers import Gradient
from lethe.types import Activation, Batch, EvalSet, LetheError, Question, Scores
from lethe.weights import load_model, load_tokenizer

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
    "Metric",
    "Patch",
    "Question",
    "Result",
    "RunConfig",
    "Scores",
    "SteeringMethod",
    "Subject",
    "load_model",
    "load_tokenizer",
    "unlearn",
]
