"""What a solver hands back."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lethe.solvers.request_sums import Request
from lethe.types import HistoryRow


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """New values of some parameters of `model`, and how they were found."""

    model: PreTrainedModel = field(repr=False)
    """The part of the model that was loaded for it."""
    values: dict[str, Tensor] = field(repr=False)
    history: tuple[HistoryRow, ...] = ()
    warnings: tuple[str, ...] = ()
    requests: tuple[Request, ...] = ()
    facts: tuple[dict[str, Any], ...] = ()
    """What a solver without steps has to say, per matrix."""
    recording_seconds: float = 0.0
