"""Whether answers are varied language, or the same few words again."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics._ngrams import ngrams, words
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Weight of each n-gram's entropy, by n; they average to 1."""


@dataclass(frozen=True, kw_only=True)
class NgramEntropy(Metric):
    """Mean over answers of the entropy of their word bigrams and trigrams, in bits: (2/3 H2 + 4/3 H3) / 2.

    0 for an answer of one phrase over and over. It grows with an answer's length, by at most the logarithm of the
    number of n-grams, so compare it between answers to the same questions only; random words have much of it, see
    `answer_perplexity` for those. Of several sampled answers the mean counts. None without a free-form question.
    """

    source: ClassVar[str] = (
        "Zhang et al. 2018, arXiv 1809.05972, weighted as fluency in Meng et al., ROME, arXiv 2202.05262, and in RWKU; "
        "in bits"
    )
    unit: ClassVar[Unit] = "bits"
    label: ClassVar[str] = "n-gram entropy of answers in bits"
    hint: ClassVar[str] = "higher: more varied"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Bits, 0 or more, over the free-form questions."""
        values = [sum(map(_entropy, texts)) / len(texts) for texts in reading.answers]
        return mean_scores(values, "higher") if values else None


def _entropy(text: str) -> float:
    said = words(text)
    return sum(weight * _bits(ngrams(said, n)) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def _bits(found: Sequence[Hashable]) -> float:
    shares = (count / len(found) for count in Counter(found).values())
    return -math.fsum(share * math.log2(share) for share in shares) + 0.0
