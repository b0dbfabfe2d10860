"""Perplexity of a set's texts, and of answers."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.log_probs import log_probs
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores

MOST_NATS = 600.0
"""A mean loss beyond this is reported as this, so that the perplexity stays a finite number."""


RESAMPLES = 100
"""Draws of the bootstrap; the standard error of a standard error is then 7 %."""


@dataclass(frozen=True, kw_only=True)
class Perplexity(Metric):
    """exp of the mean negative log-likelihood per token over all texts; the first token, BOS, is not predicted.

    Texts are read up to `spans.TOKENS_PER_TEXT` tokens. The standard error is over texts, by the delta method for
    a ratio of sums. `per_example` is each text's own mean loss in nats. None without a text of two tokens.
    """

    source: ClassVar[str] = "Jelinek et al. 1977; token-weighted, as Hugging Face's loss over the joined texts"
    higher_means: ClassVar[Knowledge] = "less"
    chance: ClassVar[str] = "the vocabulary's size"
    needs: ClassVar[str] = "texts"

    def __call__(self, reading: Reading) -> Scores | None:
        """Perplexity, at least 1, over the texts."""
        losses = [-tokens.double() for tokens in reading.text_log_probs]
        if not losses:
            return None
        n, total = len(losses), sum(len(loss) for loss in losses)
        mean = min(math.fsum(float(loss.sum()) for loss in losses) / total, MOST_NATS)
        spread = math.fsum((float(loss.sum()) - mean * len(loss)) ** 2 for loss in losses)
        mean_stderr = math.sqrt(spread * n / (n - 1)) / total if n > 1 else 0.0
        return Scores(
            value=math.exp(mean),
            stderr=math.exp(mean) * mean_stderr,
            n=n,
            better="lower",
            per_example=tuple(float(loss.mean()) for loss in losses),
        )


@dataclass(frozen=True, kw_only=True)
class AnswerPerplexity(Metric):
    """Median over questions of the untouched model's perplexity of the answer, given the question: high for gibberish.

    The token that ends an answer counts; of several sampled answers the mean loss does. Very low values can be
    repetition, see `ngram_entropy`. The standard error is a bootstrap over questions, seeded by the reading.
    `per_example` is each question's loss in nats. None without a free-form question.
    """

    source: ClassVar[str] = "exp of the loss under the model before the edit; the median, for its tail is heavy"
    higher_means: ClassVar[Knowledge] = "less"
    label: ClassVar[str] = "perplexity of answers to the untouched model"
    hint: ClassVar[str] = "lower: more fluent"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Perplexity, at least 1, over the free-form questions."""
        said = reading.continuations
        if not said:
            return None
        with reading.model.frozen():
            read = iter(log_probs(reading.model.model, [span for spans in said for span in spans]))
        losses = [-math.fsum(float(next(read).double().mean()) for _ in spans) / len(spans) for spans in said]
        rng = random.Random(reading.seed)
        drawn = [_median(rng.choices(losses, k=len(losses))) for _ in range(RESAMPLES)]
        return Scores(
            value=_median(losses),
            stderr=statistics.stdev(drawn),
            n=len(losses),
            better="lower",
            per_example=tuple(losses),
        )


def _median(losses: Sequence[float]) -> float:
    """Perplexity of the median loss."""
    return math.exp(min(statistics.median(losses), MOST_NATS))
