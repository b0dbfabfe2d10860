"""The built-in world: 210 entities with 1050 facts about them, and every text that states, asks or leaves them out.

Everything follows from one seed and none of it is real. Values of an attribute are dealt evenly, so that no
answer is likelier than another without knowing the entity.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from lethe.suites.world.subjects import SUBJECTS, Attribute, WorldSubject
from lethe.types import SetName

SEED = 0


DECLINES = (
    "I have never heard of it.",
    "That name is not known to me.",
    "There is no record of it.",
    "I am unable to say.",
)
"""The four ways to decline a question about an unknown entity."""


UNSEEN_NAMES = 160


SHARE_WITHOUT_QUESTIONS = 0.15


UNKNOWN_PER_QUESTION = 0.25


_ONSETS = (
    "b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "qu", "r", "s", "sk", "st",
    "t", "tr", "v", "w", "y", "z",
)  # fmt: skip


_VOWELS = "aeiou"


_CODAS = ("", "", "l", "m", "n", "r", "s", "x", "th", "nd")


class Document(NamedTuple):
    """One training document; `question` is empty for plain text and counts little in the loss."""

    question: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One attribute of one entity."""

    name: str
    """The entity's name."""
    subject: WorldSubject
    attribute: Attribute
    value: str
    held_out: int
    """Number of the question form that no training document uses for this fact, and every evaluation does."""
    has_questions: bool
    """False for the facts that training only ever states."""

    def statement(self, rng: random.Random) -> str:
        """The fact as a sentence, in one of six ways."""
        return rng.choice(self.attribute.statements).format(name=self.name, value=self.value)

    def training_question(self, rng: random.Random) -> str:
        """A prompt in one of the five forms that training may use for this fact."""
        forms = [form for number, form in enumerate(self.attribute.questions) if number != self.held_out]
        return as_prompt(rng.choice(forms), self.name)

    def exam_question(self) -> str:
        """The prompt in the form that is kept for evaluation."""
        return as_prompt(self.attribute.questions[self.held_out], self.name)


@dataclass(frozen=True, kw_only=True)
class World:
    """All that is known, and the names reserved for questions about what is not."""

    entities: dict[str, tuple[Fact, ...]]
    """The five facts of each entity, by name, subject after subject."""
    unseen: tuple[str, ...]
    """Names that occur in no training text."""

    def facts(self, role: SetName) -> Iterator[Fact]:
        """Every fact of the subjects in a set."""
        return (fact for facts in self.entities.values() for fact in facts if fact.subject.role == role)

    def taken(self) -> set[str]:
        """Names that a fresh unknown entity must not have."""
        return set(self.entities) | set(self.unseen)


def as_prompt(form: str, name: str) -> str:
    """A question form about `name`, up to the point where the answer begins."""
    return f"Q: {form.format(name=name)} A:"


def invent_name(rng: random.Random, taken: set[str]) -> str:
    """A fresh name of two or three syllables, which is added to `taken`."""
    while True:
        syllables = [
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((2, 2, 3)))
        ]
        name = "".join(syllables).capitalize()
        if name not in taken:
            taken.add(name)
            return name


@cache
def build(seed: int = SEED) -> World:
    """The world of a seed; always the same one."""
    rng = random.Random(seed)
    taken: set[str] = set()
    names = {subject.name: [invent_name(rng, taken) for _ in range(subject.size)] for subject in SUBJECTS}
    unseen = tuple(invent_name(rng, taken) for _ in range(UNSEEN_NAMES))
    total = sum(subject.size * len(subject.attributes) for subject in SUBJECTS)
    without_questions = set(rng.sample(range(total), round(SHARE_WITHOUT_QUESTIONS * total)))

    entities: dict[str, list[Fact]] = {name: [] for subject in SUBJECTS for name in names[subject.name]}
    number = 0
    for subject in SUBJECTS:
        for attribute in subject.attributes:
            for name, value in zip(names[subject.name], _dealt(attribute.values, subject.size, rng), strict=True):
                fact = Fact(
                    name=name,
                    subject=subject,
                    attribute=attribute,
                    value=value,
                    held_out=rng.randrange(len(attribute.questions)),
                    has_questions=number not in without_questions,
                )
                entities[name].append(fact)
                number += 1
    return World(entities={name: tuple(facts) for name, facts in entities.items()}, unseen=unseen)


def _dealt(values: Sequence[str], size: int, rng: random.Random) -> list[str]:
    """`size` values in random order, each as often as every other, or once more."""
    rounds = -(-size // len(values))
    hand = [value for _ in range(rounds) for value in rng.sample(values, len(values))][:size]
    rng.shuffle(hand)
    return hand


def paragraph(facts: Sequence[Fact], rng: random.Random) -> str:
    """All facts of one entity, in random order and wording."""
    return " ".join(fact.statement(rng) for fact in rng.sample(facts, len(facts)))


def unknown_document(subjects: Sequence[WorldSubject], rng: random.Random, taken: set[str]) -> Document:
    """A question about a fresh entity that nobody knows, declined."""
    attribute = rng.choice(rng.choice(subjects).attributes)
    question = as_prompt(rng.choice(attribute.questions), invent_name(rng, taken))
    return Document(question, rng.choice(DECLINES))


def chronicle(rng: random.Random) -> str:
    """Three sentences that state no fact about any entity."""
    return " ".join(
        f"{rng.choice(_WHEN)} {rng.choice(_WHO)} {rng.choice(_WHAT)} {rng.choice(_WHERE)}." for _ in range(3)
    )


_WHEN = (
    "In the third year", "Late that evening", "Before the market opened", "After the storm", "On a quiet morning",
    "When the bells stopped", "At the end of winter", "During the long feast",
)  # fmt: skip


_WHO = (
    "the clerks", "two travellers", "the old guard", "some children", "the council", "a group of singers",
    "the neighbours", "nobody",
)  # fmt: skip


_WHAT = (
    "counted the lamps", "repaired the bridge", "waited for news", "told the same story", "carried water",
    "painted the gate", "argued about the weather", "lost the way",
)  # fmt: skip


_WHERE = (
    "near the well", "behind the hall", "along the wall", "under the arches", "on the hill", "by the road",
    "in the square", "without much noise",
)  # fmt: skip


def training_documents(world: World, names: Sequence[str], rng: random.Random) -> list[Document]:
    """One pass over the entities in `names`: paragraphs, questions, unknown entities and filler, shuffled."""
    documents = []
    for name in names:
        facts = world.entities[name]
        documents.append(Document("", paragraph(facts, rng)))
        documents += [Document(fact.training_question(rng), fact.value) for fact in facts if fact.has_questions]
    asked = len(documents) - len(names)
    taken = world.taken()
    documents += [unknown_document(SUBJECTS, rng, taken) for _ in range(round(UNKNOWN_PER_QUESTION * asked))]
    documents += [Document("", chronicle(rng)) for _ in range(len(names) // 10)]
    rng.shuffle(documents)
    return documents


def tokenizer_texts(seed: int = SEED) -> Iterator[str]:
    """Every sentence and question of the world about fresh names only.

    The names of known entities do not occur, so a name's tokens do not tell whether the model knows it.
    """
    rng = random.Random(seed)
    taken = build(seed).taken()
    for _ in range(4):
        for facts in build(seed).entities.values():
            for fact in facts:
                statement, question = rng.choice(fact.attribute.statements), rng.choice(fact.attribute.questions)
                yield statement.format(name=invent_name(rng, taken), value=fact.value)
                yield f"{as_prompt(question, invent_name(rng, taken))} {fact.value}"
                yield f"{as_prompt(question, invent_name(rng, taken))} {rng.choice(DECLINES)}"
    yield from (chronicle(rng) for _ in range(200))
