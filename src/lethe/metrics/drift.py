"""How an edit moved the hidden states, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.inference.reading import Reading
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores, mean_scores


@dataclass(frozen=True, kw_only=True)
class ActivationNorm(Metric):
    """Mean Euclidean norm of the hidden state at each layer's output; its value is the mean over layers.

    Read on the set's texts, or on its prompts if it has none, over real tokens without BOS. A text counts by the
    mean over its tokens (`per_example`, also a mean over layers). None without a token to read.
    """

    source: ClassVar[str] = "Li et al., The WMDP Benchmark (2024): activation norms of RMU on forget and retain text"
    higher_means: ClassVar[Knowledge] = "neither"
    needs: ClassVar[str] = "texts or questions"

    texts: int = 64
    """Most texts that are read, the first ones."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Norm >= 0 of the hidden states."""
        return _score([text.norms for text in reading.texts(reading.rows_to_compare(self.texts))])


@dataclass(frozen=True, kw_only=True)
class CosineToFrozen(Metric):
    """Mean cosine between the hidden states of the edited and the untouched model, read as `ActivationNorm` does.

    Exactly 1 at every layer for an unedited model, and at every layer before the first edited one.
    """

    source: ClassVar[str] = "Li et al., The WMDP Benchmark (2024): what RMU's retain loss is to keep in place"
    higher_means: ClassVar[Knowledge] = "neither"
    needs: ClassVar[str] = "texts or questions"

    texts: int = 64
    """Most texts that are read, the first ones."""

    def __call__(self, reading: Reading) -> Scores | None:
        """Cosine in [-1, 1] to the untouched model."""
        texts = reading.texts_against_frozen(reading.rows_to_compare(self.texts))
        return _score([text.cosines for text in texts if text.cosines is not None])


def _score(values: Sequence[Float[Tensor, " layer"]]) -> Scores | None:
    if not values:
        return None
    by_text = torch.stack([*values]).double()
    scores = mean_scores(by_text.mean(1).tolist(), "neither")
    return replace(scores, by_layer=tuple(by_text.mean(0).tolist()))
