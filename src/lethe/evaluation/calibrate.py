"""Retention-matched comparison: an edit is mixed with the base until the base's retain score is kept, then ranked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.errors import InvalidValueError, UsageError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.model.patch import Patch
from lethe.model.swap import copies, restore
from lethe.types import EvalSet, Scores

SHARES = tuple(step / 10 for step in range(10, -1, -1))
"""Shares of the edit that are tried, largest first: the retain score need not fall evenly."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The largest tried mixing of an edit with the base that keeps enough."""

    share: float
    """Of the edit; 1 is the edit itself, 0 the base."""
    forget: float
    forget_stderr: float
    retain: float
    retain_stderr: float


def calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, patch: Patch, sets: Sequence[EvalSet], tau: float
) -> Mixed:
    """Multiple-choice accuracy of (1 - share) * base + share * edit, at the largest share that keeps enough.

    Enough is `tau` of the base's own retain accuracy. The model must hold the untouched weights; they are put back.
    Source: UWC, unlearning with control.

    Raises: UsageError if the retain or the forget set has no multiple-choice questions; InvalidValueError for a tau
    outside (0, 1].
    """
    if not 0 < tau <= 1:
        raise InvalidValueError(f"'tau' must be in (0, 1]. Got {tau}.")
    by_name = {data.name: data for data in sets}

    def score(name: str, originals: dict[str, Tensor]) -> Scores:
        subject = LoadedModel(model=model, tokenizer=tokenizer, originals=originals)
        found = MultipleChoice()(Reading(subject, by_name[name])) if name in by_name else None
        if found is None:
            raise UsageError(
                f"the {name} set has no multiple-choice questions to calibrate on.\n"
                f"Pass --{name}-questions, or leave --calibrate out."
            )
        return found

    def mixed(share: float) -> Scores:
        _mix(parameters, originals, edited, share)
        return score("retain", originals)

    originals = patch.apply_in_memory(model)
    parameters = dict(model.named_parameters())
    edited = copies(model, originals)
    try:
        restore(model, originals)
        wanted = tau * score("retain", {}).value
        found = ((share, mixed(share)) for share in SHARES)
        share, retain = next((share, score) for share, score in found if score.value >= wanted)
        forget = score("forget", originals)
    finally:
        restore(model, originals)
    return Mixed(
        share=share,
        forget=forget.value,
        forget_stderr=forget.stderr,
        retain=retain.value,
        retain_stderr=retain.stderr,
    )


def _mix(
    parameters: dict[str, torch.nn.Parameter], originals: dict[str, Tensor], edited: dict[str, Tensor], share: float
) -> None:
    with torch.no_grad():
        for name, base in originals.items():
            # At the ends the weights themselves, not their rounded mixture.
            mixed = edited[name] if share == 1 else torch.lerp(base.float(), edited[name].float(), share)
            parameters[name].copy_(mixed)
