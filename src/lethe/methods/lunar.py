"""LUNAR: move forget prompts to where the model finds that it cannot answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import CorpusError
from lethe.methods.protocol import Shift
from lethe.model.slice import LayerSlice
from lethe.types import Batch, State, Topic, last_tokens


@dataclass(frozen=True, kw_only=True)
class LUNAR(Shift):
    """Steer forget prompts to h0 + steering_coeff * (mean h0 of unanswerable prompts - mean h0 of forget prompts)."""

    source: ClassVar[str] = "Shen et al. 2025, LUNAR, arXiv 2502.07218; facebookresearch/LUNAR"
    reads: ClassVar[Literal["texts", "prompts"]] = "prompts"
    settings: ClassVar[Mapping[str, Any]] = {"solver": "ridge"}

    steering_coeff: float = 2.0
    """Multiple of the mean difference that is added."""
    alpha: float = 1.0
    """Weight of the retain loss, the mean over retain tokens. The published recipe pools all tokens, which is alpha =
    retain tokens / forget tokens; --solver pooled does so and ignores alpha."""

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        """The topic's direction [d_model] and the length [1] of the mean difference, both at each prompt's last token.

        Raises: CorpusError if the topic has no reference prompts, or these do not differ from the forget prompts.
        """
        if not topic.reference:
            raise CorpusError(
                f"topic {topic.name} has no reference prompts, which LUNAR takes its direction from.\n"
                "Pass --reference FILE with questions that the model cannot answer."
            )
        difference = _mean_last(layers, topic.reference) - _mean_last(layers, topic.batches)
        length = difference.norm()
        if not length > 0:
            raise CorpusError(f"the reference prompts look like those of topic {topic.name} to the model.")
        return {"direction": (difference / length).float(), "length": length.float()[None]}

    def shift(self, state: State) -> Float[Tensor, "d_model"]:
        """C * r, r the mean difference."""
        return self.steering_coeff * state["length"] * state["direction"]


def _mean_last(layers: LayerSlice, batches: Sequence[Batch]) -> Float[Tensor, "d_model"]:
    """Mean untouched activation at the last token of each prompt, summed in fp64 as the published code does."""
    last = torch.cat(list(_last(layers, {id(batch): batch for batch in batches})))
    return last.mean(dim=0)


def _last(layers: LayerSlice, batches: Mapping[int, Batch]) -> Iterator[Tensor]:
    # A batch that the schedule repeats counts once.
    for batch in batches.values():
        recording = layers.record(batch)
        rows = torch.arange(len(recording.batch.input_ids), device=recording.frozen.h.device)
        yield recording.frozen.h[rows, last_tokens(recording.batch)].double()
