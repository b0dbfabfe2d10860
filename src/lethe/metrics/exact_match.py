"""Share of free-form answers that are right, word for word."""

import re
import string
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from lethe.protocols import Subject
from lethe.scoring import encode, generate, mean_scores
from lethe.types import EvalSet, Question, Scores

EXTRA_TOKENS = 4
"""New tokens beyond the gold answer's, so that an answer that goes on is seen to go on."""


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """Share of questions whose greedy answer is the gold answer or an accepted one.

    Case, runs of white space and closing punctuation do not count. The generated line must be the answer alone, or
    the answer and then a punctuation mark that no letter or digit follows: for "Anna", "anna. She" is right,
    "Anna Karenina" and "Anna-Lena" are wrong. Questions scored by letters are left out (their prompt asks for
    a letter, not a text), so None where no other is left. `per_example` is 1 for a hit and 0 for a miss.
    """

    source: ClassVar[str] = "Rajpurkar et al., SQuAD (2016): exact match; what may follow the answer is Lethe's own"

    def __call__(self, subject: Subject, data: EvalSet) -> Scores | None:
        """Hit rate in [0, 1] over the free-form questions."""
        questions = [question for question in data.questions if data.scoring == "cloze" or not question.choices]
        if not questions:
            return None
        generated = generate(
            subject,
            [question.prompt for question in questions],
            [_longest(subject.tokenizer, _golds(question)) + EXTRA_TOKENS for question in questions],
        )
        return mean_scores(
            [float(is_match(text, _golds(question))) for text, question in zip(generated, questions, strict=True)],
            "higher",
        )


def is_match(generated: str, golds: tuple[str, ...]) -> bool:
    """Whether a generated text gives one of the gold answers, by the rule of `ExactMatch`."""
    text = " ".join(generated.casefold().split())
    return any(re.match(re.escape(normalise(gold)) + r"(?:$|[^\w\s](?!\w))", text) for gold in golds)


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing punctuation (unless there is nothing else)."""
    text = " ".join(text.casefold().split())
    return text.rstrip(string.punctuation + " ") or text


def _golds(question: Question) -> tuple[str, ...]:
    return (question.answer, *question.accepted)


def _longest(tokenizer: PreTrainedTokenizerBase, golds: tuple[str, ...]) -> int:
    return max(map(len, encode(tokenizer, [f" {gold}" for gold in golds])))
