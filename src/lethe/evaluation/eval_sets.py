"""What a run is measured on: questions and texts of each set, from its files, its prompts or the built-in world."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lethe.data import data_folder, keywords, prompts
from lethe.data.corpora import read_texts
from lethe.data.prompts import Prompts
from lethe.data.questions import read_questions, subset
from lethe.data.refusals import WANTED
from lethe.errors import CorpusError
from lethe.runs.config import RunConfig
from lethe.suites.world import exam, generator
from lethe.suites.world.settings import BUILTIN
from lethe.types import EvalSet, Question, Role

Found = TypeVar("Found")


TEXTS = 64
"""Rows of each corpus that perplexity and drift are measured on."""


ROLES: dict[str, Role] = {"forget": "forget", "adjacent": "keep", "retain": "keep", "unknown": "neither"}
"""The sets of a run, in their order."""


KEYWORDS = 10
"""Forget keywords that are put into questions, where none are named."""


def sets(
    config: RunConfig,
    forget: Mapping[str, Sequence[str]],
    retain: Sequence[str],
    asked: Prompts | None = None,
) -> tuple[EvalSet, ...]:
    """The sets of a run: its question files and the first rows of its corpora, or the built-in model's exam.

    Where prompts with answers were read and no question file is named, these prompts are the questions.

    Raises: QuestionError, CorpusError.
    """
    texts = {"forget": in_turn(list(forget.values())), "retain": list(retain)}
    questions: dict[str, Sequence[Question]] = {}
    if config.model == BUILTIN:
        questions |= exam.questions(config.split)
        questions["forget"] = [question for question in questions["forget"] if question.topic in forget or not forget]
        texts["adjacent"] = exam.adjacent_texts()
    if asked is not None:
        # The built-in model has questions of its own, but none on prompts that a user brought.
        questions |= {name: found for name, found in _prompts_as_questions(asked).items() if not questions.get(name)}
    if config.data is not None:
        questions |= data_folder.questions(config.data)
    paths = {
        "forget": config.forget_questions,
        "adjacent": config.adjacent_questions,
        "retain": config.retain_questions,
    }
    questions |= {name: read_questions(path) for name, path in paths.items() if path is not None}
    if config.limit is not None:
        questions = {name: subset(found, config.limit, 0) for name, found in questions.items()}
    held_out = never_seen(config.holdout, texts["forget"], config.text_field)
    return tuple(
        EvalSet(
            name=name,
            role=ROLES[name],
            questions=tuple(questions.get(name, ())),
            texts=tuple(texts.get(name, ())[:TEXTS]),
            scoring="cloze" if config.model == BUILTIN else config.scoring,
            holdout=held_out if name == "forget" else (),
        )
        for name in ROLES
        if name in texts or name in questions
    )


def metric_settings(
    config: RunConfig,
    sets: Sequence[EvalSet],
    forget: Mapping[str, Sequence[str]],
    retain: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What a run's settings and corpora say of its metrics, for `measure.metrics_of`.

    Forget keywords for the trigger metric are those of the config, or found in the forget corpora, each with a neutral
    word of equal length. Without corpora, or where these are too small to find any, there are none.

    Raises: CorpusError if the config names keywords for which the retain corpus has no neutral words.
    """
    settings = {
        "free_running": config.free_running,
        "encoder": config.encoder,
        "nli": config.nli,
        "refusals": wanted(config),
    }
    asked = any(question.choices for data in sets if data.role != "forget" for question in data.questions)
    if not (asked and forget and retain):
        return settings
    try:
        chosen = config.keywords or keywords.find_keywords(forget, retain, KEYWORDS)
        neutral = keywords.neutral_keywords(chosen, retain, forget, tokenizer, seed=0)
    except CorpusError:
        if config.keywords:
            raise
        return settings
    return settings | {"keywords": tuple(chosen), "neutral": neutral}


def of_suite(found: Sequence[EvalSet], settings: Mapping[str, Any]) -> tuple[EvalSet, ...]:
    """The sets of a published benchmark, with those settings of RunConfig that a user gave.

    Raises: CorpusError.
    """
    changed = []
    for data in found:
        own: dict[str, Any] = {"scoring": settings["scoring"]} if "scoring" in settings else {}
        if data.role == "forget" and "holdout" in settings:
            own["holdout"] = never_seen(settings["holdout"], data.texts)
        if "limit" in settings:
            own["questions"] = subset(data.questions, settings["limit"], 0)
            own["passages"] = data.passages[: settings["limit"]]
        changed.append(replace(data, **own))
    return tuple(changed)


def never_seen(holdout: Path | None, forget: Sequence[str], text_field: str = "text") -> tuple[str, ...]:
    """The first texts of a holdout file; none without one.

    Raises: CorpusError for one that cannot be read, or that shares a text with the forget corpora.
    """
    if holdout is None:
        return ()
    texts = read_texts(holdout, text_field=text_field)
    trained = {" ".join(text.split()) for text in forget}
    shared = [row for row, text in enumerate(texts, start=1) if " ".join(text.split()) in trained]
    if shared:
        raise CorpusError(
            f"{holdout}: {len(shared)} of {len(texts)} texts also stand in the forget corpora, first row {shared[0]}.\n"
            "A holdout must be text that the model never saw: remove them."
        )
    return tuple(texts[:TEXTS])


def wanted(config: RunConfig) -> tuple[str, ...]:
    """The refusals that a run wants: lines of its file, or how the built-in model declines; empty for a common list.

    Raises: CorpusError.
    """
    if config.refusals is not None:
        return tuple(found.prompt for found in prompts.read_prompts(config.refusals))
    return generator.DECLINES if config.model == BUILTIN else ()


def _prompts_as_questions(asked: Prompts) -> dict[str, Sequence[Question]]:
    """The prompts of each set that all have an answer; those that nobody can answer are the unknown set."""
    found: dict[str, Sequence[Question]] = {
        "forget": in_turn(list(asked.forget.values())),
        "retain": asked.retain,
        "unknown": [replace(one, answer=WANTED[0], accepted=WANTED[1:]) for one in asked.reference],
    }
    return {name: questions for name, questions in found.items() if all(one.answer for one in questions)}


def in_turn(topics: Sequence[Sequence[Found]]) -> list[Found]:
    """Rows of all topics in turn, so that the first ones are fair to each."""
    longest = max(map(len, topics), default=0)
    return [topic[i] for i in range(longest) for topic in topics if i < len(topic)]
