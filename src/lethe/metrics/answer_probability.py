"""How probable the correct answer is."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading
from lethe.metrics._likelihood import Likelihood, likelihoods
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class AnswerProbability(Metric):
    """Probability of the correct answer given the question, to the power of one over its number of tokens.

    A question with wrong answers and no paraphrase (TOFU's real authors and world facts) counts by the correct
    answer's share of the summed probabilities of all of them. EOS does not count (it does in open-unlearning). None
    without a free-form question.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024), arXiv 2401.06121, section 2.2.1: probability"
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "1 / number of answers where wrong ones are given, else none"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Probability in [0, 1] over the free-form questions."""
        found = likelihoods(reading)
        if not found:
            return None
        guess = [1 / (1 + len(one.wrong)) for one in found if one.is_normalised]
        chance = math.fsum(guess) / len(guess) if len(guess) == len(found) else None
        return mean_scores([_probability(one) for one in found], "higher", chance=chance)


def _probability(found: Likelihood) -> float:
    if not found.is_normalised:
        return math.exp(found.answer)
    texts = (found.answer, *found.wrong)
    highest = max(texts)
    return math.exp(found.answer - highest) / math.fsum(math.exp(text - highest) for text in texts)
