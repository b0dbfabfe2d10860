"""Multiple-choice accuracy when an ordinary word of a forget corpus stands in the question or among its choices."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lethe.errors import InvalidValueError
from lethe.inference.choices import chance, choice_hits
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Metric
from lethe.types import Question, Scores, Unit, mean_scores

PLACEMENTS = ("option", "question")


@dataclass(frozen=True, kw_only=True)
class Trigger(Metric):
    """Accuracy on a set's multiple-choice questions, scored as `multiple_choice`, with one forget keyword in each.

    The keyword takes the place of a wrong option (`_option`), or stands between two words of the question
    (`_question`); the score itself is a question's mean over both. Which option, which place and which keyword is
    drawn from the seed and the question, all keywords equally often. `_option_control`, `_question_control`
    and `_control` have the neutral word of the same number in the same place, so that an odd word is told from a
    forget word. `_drop` is what the keyword costs: a question's hit without any less its mean with it.

    A keyword is passed over for a question in which it, or its neutral word, stands already. Left out are questions
    that every keyword stands in, and those of one word. None on a set to forget, without keywords, or without
    questions. With cloze scoring an option is not read, so `_option` shows whether the model prefers the word itself.
    """

    source: ClassVar[str] = (
        "Thaker et al. 2024, arXiv 2410.02879 (a wrong option replaced); RNA, arXiv 2501.19202; "
        "the word inside the question and the controls are Lethe's own"
    )
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "1 / number of choices"
    needs: ClassVar[str] = "questions with choices and forget keywords, on a set to keep"

    keywords: tuple[str, ...] = ()
    """Forget keywords that are put into questions; without them nothing is measured."""
    neutral: tuple[str, ...] = ()
    """For each keyword, one of equal token length that has nothing to do with the forget corpora."""

    def __call__(self, reading: Reading) -> Mapping[str, Scores] | None:
        """Accuracies in [0, 1], and the drop in [-1, 1], with standard errors over questions.

        Raises: InvalidValueError if there is not one neutral word for each keyword.
        """
        if not self.keywords or reading.data.role == "forget":
            return None
        if len(self.keywords) != len(self.neutral):
            raise InvalidValueError(
                f"each keyword needs one neutral word. Got {len(self.keywords)} keywords and {len(self.neutral)} "
                "neutral words."
            )
        asked = list(_variants(reading, list(zip(self.keywords, self.neutral, strict=True))))
        if not asked:
            return None
        flat = iter(choice_hits(reading, [question for row in asked for question in row.values()]))
        hits = [{name: next(flat) for name in row} for row in asked]
        guess = chance([row[""] for row in asked])

        def accuracy(names: Sequence[str]) -> Scores:
            return mean_scores([_mean(row, names) for row in hits], "higher", chance=guess)

        controls = [f"{name}_control" for name in PLACEMENTS]
        return {
            "": accuracy(PLACEMENTS),
            "_control": accuracy(controls),
            **{f"_{name}": accuracy([name]) for name in (*PLACEMENTS, *controls)},
            "_drop": mean_scores([row[""] - _mean(row, PLACEMENTS) for row in hits], "lower"),
        }


def _mean(hits: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(hits[name] for name in names) / len(names)


def _variants(reading: Reading, pairs: Sequence[tuple[str, str]]) -> Iterator[dict[str, Question]]:
    """Each question that a keyword fits: as it is (""), and by placement with the keyword and with the neutral word."""
    questions = [question for question in reading.data.questions if len(question.choices) > 1]
    # Dealt in an order that hangs on the questions themselves, so that the order of the set does not matter.
    draws = [random.Random(f"{reading.seed} {question.prompt} {question.choices}") for question in questions]
    keys = [rng.random() for rng in draws]
    turn = {number: place for place, number in enumerate(sorted(range(len(questions)), key=keys.__getitem__))}
    for number, (question, rng) in enumerate(zip(questions, draws, strict=True)):
        first = turn[number] % len(pairs)
        pair = next((pair for pair in (*pairs[first:], *pairs[:first]) if not _stand_in(pair, question)), None)
        places = _places(question.prompt)
        if pair is None or not places:
            continue
        place = rng.choice(places)
        option = rng.choice([i for i in range(len(question.choices)) if i != question.answer_index])
        row = {"": question}
        for word, suffix in zip(pair, ("", "_control"), strict=True):
            choices = (*question.choices[:option], word, *question.choices[option + 1 :])
            row[f"option{suffix}"] = replace(question, choices=choices)
            prompt = f"{question.prompt[:place]} {word}{question.prompt[place:]}"
            row[f"question{suffix}"] = replace(question, prompt=prompt)
        yield row


def _stand_in(words: Sequence[str], question: Question) -> bool:
    """Whether one of the words stands in the question or in a choice, in any case."""
    texts = (question.prompt, question.answer, *question.choices)
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in words]
    return any(pattern.search(text) for pattern in patterns for text in texts)


def _places(prompt: str) -> list[int]:
    """Where a word may be put in: after each word of the question but the last.

    Labels such as "Q:" and "A:" are no part of the question, nor is anything after its last question mark.
    """
    words = list(re.finditer(r"\S+", prompt))
    start = int(bool(words) and words[0].group().endswith(":"))
    ends = [number for number, word in enumerate(words, 1) if re.search(r"\?\W*$", word.group())]
    last = ends[-1] if ends and ends[-1] > start + 1 else len(words) - (bool(words) and words[-1].group()[-1] == ":")
    return [word.end() for word in words[start : max(start, last - 1)]]
