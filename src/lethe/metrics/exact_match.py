"""Share of free-form answers that are right, word for word."""

import re
import string
from dataclasses import dataclass
from typing import ClassVar

from lethe.inference.reading import Reading, golds
from lethe.metrics.protocol import Metric
from lethe.types import Scores, Unit, mean_scores


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Metric):
    """Share of questions whose answer is the gold answer or an accepted one.

    Case, runs of white space and closing punctuation do not count. The generated line must be the answer alone, or
    the answer and then a punctuation mark that no letter or digit follows: for "Anna", "anna. She" is right,
    "Anna Karenina" and "Anna-Lena" are wrong. Questions scored by letters are left out (their prompt asks for
    a letter, not a text), so None where no other is left. `per_example` is 1 for a hit and 0 for a miss; of several
    sampled answers, the share of hits.
    """

    source: ClassVar[str] = "Rajpurkar et al., SQuAD (2016): exact match; what may follow the answer is Lethe's own"
    unit: ClassVar[Unit] = "share"
    needs: ClassVar[str] = "free-form questions"

    def __call__(self, reading: Reading) -> Scores | None:
        """Hit rate in [0, 1] over the free-form questions."""
        if not reading.free_form:
            return None
        hits = [
            sum(is_match(text, golds(question)) for text in said) / len(said)
            for said, question in zip(reading.answers, reading.free_form, strict=True)
        ]
        return mean_scores(hits, "higher")


def is_match(generated: str, golds: tuple[str, ...]) -> bool:
    """Whether a generated text gives one of the gold answers, by the rule of `ExactMatch`."""
    text = " ".join(generated.casefold().split())
    return any(re.match(re.escape(normalise(gold)) + r"(?:$|[^\w\s](?!\w))", text) for gold in golds)


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing punctuation (unless there is nothing else)."""
    text = " ".join(text.casefold().split())
    return text.rstrip(string.punctuation + " ") or text
