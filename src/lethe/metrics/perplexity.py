"""Perplexity of a set's texts, and of answers."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.answers import continuations
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import log_probs
from lethe.inference.spans import Span, encode_texts
from lethe.types import EvalSet, Scores

MOST_NATS = 600.0
"""A mean loss beyond this is reported as this, so that the perplexity stays a finite number."""


RESAMPLES = 100
"""Draws of the bootstrap; the standard error of a standard error is then 7 %."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token over all texts; the first token, BOS, is not predicted.

    Texts are read up to `scoring.TOKENS_PER_TEXT` tokens. The standard error is over texts, by the delta method for
    a ratio of sums. `per_example` is each text's own mean loss in nats. None without a text of two tokens.
    """

    source: ClassVar[str] = "Jelinek et al. 1977; token-weighted, as Hugging Face's loss over the joined texts"
    better: ClassVar[str] = "lower"
    chance: ClassVar[str] = "the vocabulary's size"
    needs: ClassVar[str] = "texts"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Perplexity, at least 1, over the texts."""
        spans = [Span(ids=row, start=1) for row in encode_texts(subject, data.texts) if len(row) > 1]
        if not spans:
            return None
        losses = [-tokens.double() for tokens in log_probs(subject.model, spans)]
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
class AnswerPerplexity:
    """Median over questions of the untouched model's perplexity of the answer, given the question: high for gibberish.

    The token that ends an answer counts; of several sampled answers the mean loss does. Very low values can be
    repetition, see `ngram_entropy`. The standard error is a bootstrap over questions, seeded by the set. `per_example`
    is each question's loss in nats. None without a free-form question.
    """

    source: ClassVar[str] = "exp of the loss under the model before the edit; the median, for its tail is heavy"
    better: ClassVar[str] = "lower"
    chance: ClassVar[str] = ""
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | None:
        """Perplexity, at least 1, over the free-form questions."""
        said = continuations(subject, data, samples=data.samples)
        if not said:
            return None
        with subject.frozen():
            read = iter(log_probs(subject.model, [span for spans in said for span in spans]))
        losses = [-math.fsum(float(next(read).double().mean()) for _ in spans) / len(spans) for spans in said]
        rng = random.Random(data.seed)
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
