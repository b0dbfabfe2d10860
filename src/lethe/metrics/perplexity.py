"""Perplexity of a set's texts."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.protocols import Subject
from lethe.scoring import Span, encode_texts, log_probs
from lethe.types import EvalSet, Scores

MOST_NATS = 600.0
"""A mean loss beyond this is reported as this, so that the perplexity stays a finite number."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per token over all texts; the first token, BOS, is not predicted.

    Texts are read up to `scoring.TOKENS_PER_TEXT` tokens. The standard error is over texts, by the delta method for
    a ratio of sums. `per_example` is each text's own mean loss in nats. None without a text of two tokens.
    """

    source: ClassVar[str] = "Jelinek et al. 1977; token-weighted, as Hugging Face's loss over the joined texts"

    def __call__(self, subject: Subject, data: EvalSet) -> Scores | None:
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
