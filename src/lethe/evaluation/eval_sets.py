"""What a run is measured on: questions and texts of each set, from its files, its prompts or the suite of its model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lethe.data import data_folder, keywords, prompts
from lethe.data.batches import Corpora
from lethe.data.corpora import in_turn, read_texts
from lethe.data.questions import read_questions, subset
from lethe.data.settings import DataSettings
from lethe.errors import CorpusError
from lethe.evaluation.settings import EvalSettings
from lethe.suites.protocol import with_model
from lethe.types import ROLES, EvalSet, Question

TEXTS = 64
"""Rows of each corpus that perplexity and drift are measured on."""


KEYWORDS = 10
"""Forget keywords that are put into questions, where none are named."""


def sets(
    model: str,
    data: DataSettings,
    evaluation: EvalSettings,
    corpora: Corpora,
) -> tuple[EvalSet, ...]:
    """What a model is measured on: question files and the first rows of its corpora, or the exam of its model's suite.

    Where prompts with answers were read and no question file is named, these prompts are the questions.

    Raises: QuestionError, CorpusError.
    """
    forget, retain = corpora.texts()
    texts = {"forget": in_turn(list(forget.values())), "retain": retain}
    questions: dict[str, Sequence[Question]] = {}
    suite = with_model(model, split=evaluation.split)
    own = {data.name: data for data in suite.sets()} if suite is not None else {}
    for name, asked in own.items():
        questions[name] = [one for one in asked.questions if name != "forget" or one.topic in forget or not forget]
        if asked.texts:
            texts.setdefault(name, list(asked.texts))
    # A suite's model has questions of its own, but none on prompts that a user brought.
    questions |= {name: asked for name, asked in corpora.questions().items() if not questions.get(name)}
    if data.data is not None:
        questions |= data_folder.questions(data.data)
    paths = {
        "forget": evaluation.forget_questions,
        "adjacent": evaluation.adjacent_questions,
        "retain": evaluation.retain_questions,
    }
    questions |= {name: read_questions(path) for name, path in paths.items() if path is not None}
    if evaluation.limit is not None:
        questions = {name: subset(asked, evaluation.limit, 0) for name, asked in questions.items()}
    held_out = never_seen(evaluation.holdout, texts["forget"], data.text_field)
    return tuple(
        EvalSet(
            name=name,
            role=ROLES[name],
            questions=tuple(questions.get(name, ())),
            texts=tuple(texts.get(name, ())[:TEXTS]),
            scoring=own[name].scoring if name in own else evaluation.scoring,
            holdout=held_out if name == "forget" else (),
        )
        for name in ROLES
        if name in texts or name in questions
    )


def metric_settings(
    model: str,
    evaluation: EvalSettings,
    sets: Sequence[EvalSet],
    forget: Mapping[str, Sequence[str]],
    retain: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """What a run's settings and corpora say of its metrics, for `measure.metrics_of`.

    Forget keywords for the trigger metric are those that are named, or found in the forget corpora, each with a neutral
    word of equal length. Without corpora, or where these are too small to find any, there are none.

    Raises: CorpusError if keywords are named for which the retain corpus has no neutral words.
    """
    settings = {
        "free_running": evaluation.free_running,
        "encoder": evaluation.encoder,
        "nli": evaluation.nli,
        "refusals": wanted(model, evaluation.refusals),
    }
    asked = any(question.choices for data in sets if data.role != "forget" for question in data.questions)
    if not (asked and forget and retain):
        return settings
    try:
        chosen = evaluation.keywords or keywords.find_keywords(forget, retain, KEYWORDS)
        neutral = keywords.neutral_keywords(chosen, retain, forget, tokenizer, seed=0)
    except CorpusError:
        if evaluation.keywords:
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


def wanted(model: str, refusals: Path | None) -> tuple[str, ...]:
    """The refusals that are wanted: lines of a file, or how a suite's model declines; empty for a common list.

    Raises: CorpusError.
    """
    if refusals is not None:
        return tuple(row.prompt for row in prompts.read_prompts(refusals))
    suite = with_model(model)
    return suite.refusals if suite is not None else ()
