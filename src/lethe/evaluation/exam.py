"""Sitting an exam and marking it: accuracy by subject and group, and whether letters, not knowledge, were picked."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lethe.data.exams import Exam, ExamQuestion, Scoring, render
from lethe.data.questions import LETTERS
from lethe.errors import QuestionError
from lethe.inference.choices import chance
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, log_probs
from lethe.inference.spans import Asked, Span, answer_spans, context_length
from lethe.types import Scores, mean_scores

ERRORS_BELOW_CHANCE = 2.0
"""An accuracy so many standard errors of a guess below chance is no ignorance."""


COLLAPSED = 0.5
"""A letter picked this much more often than it is right is picked for itself."""


FEWEST = 8
"""Of fewer questions one letter may be picked so often by accident."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a model answered in an exam."""

    questions: tuple[ExamQuestion, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]
    """Of each choice of each question: the sum over the tokens of its letter or text."""
    picked: tuple[int, ...]
    """The choice of each question with the highest log-likelihood: per character with cloze scoring."""
    cut: int = 0
    """Questions whose prompt is beyond the model's context and lost its beginning."""

    @property
    def hits(self) -> tuple[float, ...]:
        """For each question 1.0 if the right choice was picked, else 0.0."""
        return tuple(float(one == right.gold) for one, right in zip(self.picked, self.questions, strict=True))

    def scores(self, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Scores]:
        """Accuracy of the whole exam (""), of each subject, and of each group of subjects, weighted by their sizes."""
        members = {one.topic: (one.topic,) for one in self.questions} | dict(groups or {})
        found = {"": self._accuracy(range(len(self.questions)))}
        for name, subjects in members.items():
            inside = [index for index, one in enumerate(self.questions) if one.topic in subjects]
            if name and inside:
                found[name] = self._accuracy(inside)
        return found

    def top_share(self) -> float:
        """Share of questions answered with the most frequent place: 1 / choices if letters play no part."""
        return max(Counter(self.picked).values()) / len(self.picked)

    def entropy(self) -> float:
        """Entropy of the picked places in bits: 2 if four are picked equally often, 0 if it is always the same."""
        shares = [count / len(self.picked) for count in Counter(self.picked).values()]
        return max(0.0, -math.fsum(share * math.log2(share) for share in shares))

    def biases(self) -> tuple[str, ...]:
        """What keeps the accuracy from being read as knowledge: one sentence each, none where nothing does."""
        found = []
        accuracy = self.scores()[""]
        place, count = Counter(self.picked).most_common(1)[0]
        right = sum(one.gold == place for one in self.questions)
        if len(self.picked) >= FEWEST and (count - right) / len(self.picked) > COLLAPSED:
            found.append(
                f"{LETTERS[place]} is picked in {100 * count / len(self.picked):.0f} % of the questions and right in "
                f"{100 * right / len(self.picked):.0f} %: the accuracy shows a preference for a letter."
            )
        guess = accuracy.chance or 0.0
        # The error of guessing, not of the hits: that one is 0 where the only question was missed.
        each = [1 / len(one.choices) for one in self.questions]
        error = math.sqrt(math.fsum(share * (1 - share) for share in each)) / len(each)
        if accuracy.value + ERRORS_BELOW_CHANCE * error < guess:
            found.append(
                f"{100 * accuracy.value:.1f} % is below the {100 * guess:.1f} % of a guess: the right answers are "
                "avoided, which takes knowing them. It is a bias, not more forgetting."
            )
        return tuple(found)

    def _accuracy(self, indices: Sequence[int]) -> Scores:
        hits = self.hits
        guess = chance([self.questions[index] for index in indices])
        return replace(mean_scores([hits[index] for index in indices], "higher", chance=guess), unit="share")


def sit(
    subject: LoadedModel,
    exam: Exam,
    *,
    shots: int = 0,
    scoring: Scoring = "letter",
    chat: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Marks:
    """The model's answers to every question of an exam, as lm-evaluation-harness asks them.

    Raises: QuestionError, UsageError, DivergedError, OutOfMemoryError.
    """
    tokenizer = subject.tokenizer if chat else None
    asked = [render(exam, one, shots=shots, scoring=scoring, chat=tokenizer) for one in exam.questions]
    spans = _spans(subject, exam.questions, asked)
    scored = iter(log_probs(subject.model, spans, tokens_per_batch=tokens_per_batch))
    sums = [tuple(float(next(scored).sum()) for _ in answers) for _, answers in asked]
    picked = []
    for question, values in zip(exam.questions, sums, strict=True):
        weights = [len(choice) for choice in question.choices] if scoring == "cloze" else [1] * len(values)
        comparable = [value / weight for value, weight in zip(values, weights, strict=True)]
        picked.append(comparable.index(max(comparable)))
    # Only a span that fills the context to its last token can have lost its beginning.
    full = context_length(subject.model) + 1
    sizes = iter(len(span.ids) for span in spans)
    cut = sum(max(next(sizes) for _ in answers) >= full for _, answers in asked)
    return Marks(questions=exam.questions, log_likelihoods=tuple(sums), picked=tuple(picked), cut=cut)


def _spans(subject: LoadedModel, questions: Sequence[ExamQuestion], asked: Sequence[Asked]) -> list[Span]:
    try:
        return answer_spans(subject, asked)
    except QuestionError:
        # It knows the number of a question only; the reader needs its file and row.
        for question, one in zip(questions, asked, strict=True):
            _require_fitting(subject, question, one)
        raise


def _require_fitting(subject: LoadedModel, question: ExamQuestion, asked: Asked) -> None:
    try:
        answer_spans(subject, [asked])
    except QuestionError as error:
        raise QuestionError(f"{question.where}: {str(error).removeprefix('question 1: ')}") from None
