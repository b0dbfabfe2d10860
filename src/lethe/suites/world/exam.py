"""Questions about the built-in world, and the corpora to forget, to keep and to leave alone."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

from lethe.suites.world.generator import DECLINES, SEED, Fact, World, as_prompt, build, paragraph, unknown_document
from lethe.suites.world.subjects import SUBJECTS, WorldSubject
from lethe.types import Question, SetName

Split = Literal["dev", "test", "all"]


# 100 steps of 8 rows never repeat a text, on one topic alone or on the retain corpus.
FORGET_RENDERINGS = 28


RETAIN_RENDERINGS = 10


RETAIN_REFUSALS = 250


ADJACENT_RENDERINGS = 8


REFERENCE_PROMPTS = 200


@cache
def questions(split: Split) -> dict[SetName, tuple[Question, ...]]:
    """The exam, by set; `dev` and `test` are two halves of `all` that share no fact and no unknown name.

    Every question has the form that training never used for its fact. Forget, adjacent and retain questions
    have four choices from the same attribute; questions of the unknown set have none: the answer is to decline.
    """
    world = build()
    exam: dict[SetName, list[Question]] = {
        role: _unknown(world) if role == "unknown" else _known(world, role) for role in get_args(SetName)
    }
    return {role: tuple(_half(asked, split)) for role, asked in exam.items()}


def _half(asked: list[Question], split: Split) -> list[Question]:
    if split == "all":
        return asked
    # Shuffled alike for both halves, then dealt in turn.
    order = random.Random(SEED).sample(range(len(asked)), len(asked))
    first = 0 if split == "dev" else 1
    return [asked[number] for number in sorted(order[first::2])]


def _known(world: World, role: SetName) -> list[Question]:
    rng = random.Random(f"{SEED} {role} choices")
    return [_multiple_choice(fact, rng) for fact in world.facts(role)]


def _multiple_choice(fact: Fact, rng: random.Random) -> Question:
    wrong = rng.sample([value for value in fact.attribute.values if value != fact.value], 3)
    choices = rng.sample([fact.value, *wrong], 4)
    return Question(prompt=fact.exam_question(), answer=fact.value, choices=tuple(choices), topic=fact.subject.name)


def _unknown(world: World) -> list[Question]:
    rng = random.Random(f"{SEED} unknown")
    asked = []
    for number, name in enumerate(world.unseen):
        subject = SUBJECTS[number % len(SUBJECTS)]
        prompt = as_prompt(rng.choice(rng.choice(subject.attributes).questions), name)
        asked.append(Question(prompt=prompt, answer=DECLINES[0], accepted=DECLINES[1:], topic=subject.name))
    return asked


def forget_texts() -> dict[str, list[str]]:
    """Paragraphs about the entities of the two hazard topics, by topic; no questions."""
    topics = [subject for subject in SUBJECTS if subject.role == "forget"]
    return {topic.name: _paragraphs([topic], FORGET_RENDERINGS) for topic in topics}


def forget_prompts() -> dict[str, tuple[Question, ...]]:
    """A question about each fact of the two hazard topics, by topic, in a form that the exam does not use."""
    rng = random.Random(f"{SEED} forget prompts")
    topics = _by_topic("forget")
    return {topic: tuple(_training_question(fact, rng) for fact in facts) for topic, facts in topics.items()}


def retain_prompts() -> tuple[Question, ...]:
    """A question about each fact of the four retain subjects, in a form that the exam does not use."""
    rng = random.Random(f"{SEED} retain prompts")
    return tuple(_training_question(fact, rng) for fact in build().facts("retain"))


def reference_prompts() -> tuple[Question, ...]:
    """Questions of all subjects about names that nobody knows and that the exam does not use."""
    rng = random.Random(f"{SEED} reference prompts")
    taken = build().taken()
    documents = (unknown_document(SUBJECTS, rng, taken) for _ in range(REFERENCE_PROMPTS))
    return tuple(Question(prompt=document.question, answer=document.text) for document in documents)


def _training_question(fact: Fact, rng: random.Random) -> Question:
    return Question(prompt=fact.training_question(rng), answer=fact.value, topic=fact.subject.name)


def _by_topic(role: SetName) -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = {}
    for fact in build().facts(role):
        found.setdefault(fact.subject.name, []).append(fact)
    return found


def retain_texts() -> list[str]:
    """Paragraphs about the four retain subjects, and declined questions about entities that nobody knows.

    The adjacent subjects are left out, so that what happens to them shows how far an edit spreads. Without the
    declined questions a model loses the habit of declining (in a trial of RMU, 100 % became 2.5 %); with them it
    loses it on the hazard topics only.
    """
    kept = [subject for subject in SUBJECTS if subject.role == "retain"]
    rng = random.Random(f"{SEED} refusals")
    taken = build().taken()
    refusals = [" ".join(unknown_document(kept, rng, taken)) for _ in range(RETAIN_REFUSALS)]
    texts = _paragraphs(kept, RETAIN_RENDERINGS) + refusals
    rng.shuffle(texts)
    return texts


def adjacent_texts() -> list[str]:
    """Paragraphs about the two subjects that resemble the hazard topics and should be kept."""
    return _paragraphs([subject for subject in SUBJECTS if subject.role == "adjacent"], ADJACENT_RENDERINGS)


def _paragraphs(subjects: Sequence[WorldSubject], renderings: int) -> list[str]:
    """`renderings` rounds over the entities of the subjects, each round in a new order and wording."""
    rng = random.Random(f"{SEED} paragraphs")
    entities = [facts for facts in build().entities.values() if facts[0].subject in subjects]
    return [paragraph(facts, rng) for _ in range(renderings) for facts in rng.sample(entities, len(entities))]
