"""Whether answers say the same again and again."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics._ngrams import ngrams, words
from lethe.metrics.protocol import Knowledge, Metric
from lethe.types import Scores, Unit, mean_scores

RESAMPLES = 100
"""Draws of the bootstrap; the standard error of a standard error is then 7 %."""


@dataclass(frozen=True, kw_only=True)
class Repetition(Metric):
    """Share of an answer's word bigrams that occurred in it before; 0 for an answer of fewer than three words.

    Words are runs of letters and digits in any case; every other mark is a word of its own. Of several sampled
    answers the mean counts. None without a free-form question.
    """

    source: ClassVar[str] = "Welleck et al. 2020, arXiv 1908.04319: rep-n within one text, here of word bigrams"
    higher_means: ClassVar[Knowledge] = "less"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in [0, 1) over the free-form questions."""
        said = [[_bigrams(text) for text in texts] for texts in reading.answers]
        values = [sum(map(_repeated, texts)) / len(texts) for texts in said]
        return mean_scores(values, "lower") if values else None


@dataclass(frozen=True, kw_only=True)
class Distinct2(Metric):
    """Distinct word bigrams of all answers together / all their word bigrams: low if the answers are alike.

    Words as in `Repetition`. The standard error is a bootstrap over questions, seeded by the reading. It falls as the
    number of answers grows, so compare it between equal sets only. None where no answer has two words.
    """

    source: ClassVar[str] = "Li et al. 2016, arXiv 1510.03055: distinct-2"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Share in (0, 1] over all answers."""
        said = [[bigram for text in texts for bigram in _bigrams(text)] for texts in reading.answers]
        if not any(said):
            return None
        rng = random.Random(reading.seed)
        drawn = [rng.choices(said, k=len(said)) for _ in range(RESAMPLES)]
        shares = [_distinct(answered) for answered in drawn if any(answered)]
        stderr = statistics.stdev(shares) if len(shares) > 1 else 0.0
        return Scores(value=_distinct(said), stderr=stderr, n=len(said), better="higher")


def _bigrams(text: str) -> list[tuple[str, ...]]:
    return ngrams(words(text), 2)


def _repeated(bigrams: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _distinct(answered: Sequence[Sequence[tuple[str, ...]]]) -> float:
    every = [bigram for bigrams in answered for bigram in bigrams]
    return len(set(every)) / len(every)
