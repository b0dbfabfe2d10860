"""Remove chosen knowledge from open-weight language models by steering their activations."""

import importlib
import typing

from lethe.__version__ import __version__ as __version__

if typing.TYPE_CHECKING:
    from lethe.analyses.protocol import Analysis
    from lethe.errors import (
        CorpusError,
        DivergedError,
        EmptyBatchError,
        InvalidLayerError,
        InvalidValueError,
        LetheError,
        ModelError,
        OutOfMemoryError,
        PatchError,
        QuestionError,
        ReplayError,
        RunFolderError,
        SaveError,
        UnknownModuleError,
        UnknownNameError,
        UsageError,
    )
    from lethe.evaluation.compare import compare
    from lethe.evaluation.results import read as read_scores
    from lethe.inference.loaded_model import LoadedModel
    from lethe.methods.adaptive_rmu import AdaptiveRMU
    from lethe.methods.finetune import Finetune
    from lethe.methods.grad_diff import GradDiff
    from lethe.methods.lunar import LUNAR
    from lethe.methods.protocol import Method, SteeringMethod, TokenMethod
    from lethe.methods.rmu import RMU
    from lethe.methods.rsv import RSV
    from lethe.metrics.protocol import Combination, Metric
    from lethe.model.loading import load_model, load_tokenizer
    from lethe.model.patch import Patch
    from lethe.model.slice import LayerSlice
    from lethe.model.token_view import TokenView
    from lethe.runs.check import check
    from lethe.runs.config import RunConfig
    from lethe.runs.evaluate import Evaluation, evaluate
    from lethe.runs.unlearn import Result, unlearn
    from lethe.solvers.gradient import Gradient
    from lethe.solvers.protocol import Solver
    from lethe.solvers.ridge import Ridge
    from lethe.suites.protocol import Suite
    from lethe.sweeps.spec import Sweep
    from lethe.sweeps.sweep import sweep
    from lethe.types import Activation, Batch, EvalSet, Question, Scores

__all__ = [
    "LUNAR",
    "RMU",
    "RSV",
    "Activation",
    "AdaptiveRMU",
    "Analysis",
    "Batch",
    "Combination",
    "CorpusError",
    "DivergedError",
    "EmptyBatchError",
    "EvalSet",
    "Evaluation",
    "Finetune",
    "GradDiff",
    "Gradient",
    "InvalidLayerError",
    "InvalidValueError",
    "LayerSlice",
    "LetheError",
    "LoadedModel",
    "Method",
    "Metric",
    "ModelError",
    "OutOfMemoryError",
    "Patch",
    "PatchError",
    "Question",
    "QuestionError",
    "ReplayError",
    "Result",
    "Ridge",
    "RunConfig",
    "RunFolderError",
    "SaveError",
    "Scores",
    "Solver",
    "SteeringMethod",
    "Suite",
    "Sweep",
    "TokenMethod",
    "TokenView",
    "UnknownModuleError",
    "UnknownNameError",
    "UsageError",
    "check",
    "compare",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "read_scores",
    "sweep",
    "unlearn",
]

_HOMES = {
    "analyses.protocol": "Analysis",
    "errors": "CorpusError DivergedError EmptyBatchError InvalidLayerError InvalidValueError LetheError ModelError "
    "OutOfMemoryError PatchError QuestionError ReplayError RunFolderError SaveError UnknownModuleError "
    "UnknownNameError UsageError",
    "evaluation.compare": "compare",
    "evaluation.results": "read_scores=read",
    "inference.loaded_model": "LoadedModel",
    "methods.adaptive_rmu": "AdaptiveRMU",
    "methods.lunar": "LUNAR",
    "methods.finetune": "Finetune",
    "methods.grad_diff": "GradDiff",
    "methods.protocol": "Method SteeringMethod TokenMethod",
    "methods.rmu": "RMU",
    "methods.rsv": "RSV",
    "metrics.protocol": "Combination Metric",
    "model.loading": "load_model load_tokenizer",
    "model.patch": "Patch",
    "model.slice": "LayerSlice",
    "model.token_view": "TokenView",
    "runs.config": "RunConfig",
    "runs.evaluate": "Evaluation evaluate",
    "runs.check": "check",
    "runs.unlearn": "Result unlearn",
    "solvers.gradient": "Gradient",
    "solvers.protocol": "Solver",
    "solvers.ridge": "Ridge",
    "suites.protocol": "Suite",
    "sweeps.spec": "Sweep",
    "sweeps.sweep": "sweep",
    "types": "Activation Batch EvalSet Question Scores",
}
"""Where each name is imported from when it is first asked for: torch takes seconds, and `lethe --help` needs none."""


def __getattr__(name: str) -> typing.Any:
    for module, names in _HOMES.items():
        for public, _, own in (word.partition("=") for word in names.split()):
            if public == name:
                globals()[name] = thing = getattr(importlib.import_module(f"lethe.{module}"), own or public)
                return thing
    raise AttributeError(f"module 'lethe' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
