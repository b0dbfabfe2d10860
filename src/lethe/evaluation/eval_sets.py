"""What a run is measured on: questions and texts of each set, from its files, its prompts or the built-in world."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lethe.data import data_folder, keywords, prompts
from lethe.data.batches import Corpora
from lethe.data.corpora import in_turn, read_texts
from lethe.data.questions import read_questions, subset
from lethe.data.settings import BUILTIN, DataSettings
from lethe.errors import CorpusError
from lethe.evaluation.settings import EvalSettings
from lethe.suites.world import exam, generator
from lethe.types import EvalSet, Question

TEXTS = 64
"""Rows of each corpus that perplexity and drift are measured on."""


KEYWORDS = 10
"""Forget keywords that are put into questions, where none are named."""


def sets(
    model: str,
    data: DataSettings,
    evaluation: EvalSettings,
    corpora: Corpora,
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[EvalSet, ...]:
    """What a model is measured on: question files and the first rows of its corpora, or the built-in model's exam.

    Where prompts with answers were read and no question file is named, these prompts are the questions. With a
    `tokenizer` the sets get forget keywords for the trigger metric.

    Raises: QuestionError, CorpusError.
    """
    forget, retain = corpora.texts()
    texts = {"forget": in_turn(list(forget.values())), "retain": retain}
    questions: dict[str, Sequence[Question]] = {}
    if model == BUILTIN:
        questions |= exam.questions(evaluation.split)
        questions["forget"] = [question for question in questions["forget"] if question.topic in forget or not forget]
        texts["adjacent"] = exam.adjacent_texts()
    # The built-in model has questions of its own, but none on prompts that a user brought.
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
    found = tuple(
        EvalSet(
            name=name,
            questions=tuple(questions.get(name, ())),
            texts=tuple(texts.get(name, ())[:TEXTS]),
            scoring="cloze" if model == BUILTIN else evaluation.scoring,
            samples=evaluation.samples,
            seed=seed,
            free_running=evaluation.free_running,
            refusals=wanted(model, evaluation.refusals),
            encoder=evaluation.encoder,
            holdout=held_out if name == "forget" else (),
            nli=evaluation.nli,
        )
        for name in sorted({*texts, *questions}, key=["forget", "adjacent", "retain", "unknown"].index)
    )
    if tokenizer is None:
        return found
    return with_keywords(found, evaluation.keywords, forget, retain, tokenizer)


def with_keywords(
    found: Sequence[EvalSet],
    named: Sequence[str],
    forget: Mapping[str, Sequence[str]],
    retain: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[EvalSet, ...]:
    """The sets with forget keywords, and neutral ones of equal length, for the trigger metric.

    Keywords are those that are named, or found in the forget corpora. Without corpora, or where these are too small to
    find any, there are none, and the metric is not measured.

    Raises: CorpusError if keywords are named for which the retain corpus has no neutral words.
    """
    asked = any(question.choices for data in found if data.name != "forget" for question in data.questions)
    if not (asked and forget and retain):
        return tuple(found)
    try:
        chosen = tuple(named) or keywords.find_keywords(forget, retain, KEYWORDS)
        neutral = keywords.neutral_keywords(chosen, retain, forget, tokenizer, seed=0)
    except CorpusError:
        if named:
            raise
        return tuple(found)
    return tuple(replace(data, keywords=tuple(chosen), neutral=neutral) for data in found)


def of_suite(found: Sequence[EvalSet], settings: Mapping[str, Any]) -> tuple[EvalSet, ...]:
    """The sets of a published benchmark, with those settings of RunConfig that a user gave.

    Raises: CorpusError.
    """
    direct = ("scoring", "samples", "seed", "free_running", "encoder", "nli")
    changes = {name: settings[name] for name in direct if name in settings}
    if "refusals" in settings:
        changes["refusals"] = tuple(one.prompt for one in prompts.read_prompts(settings["refusals"]))
    changed = []
    for data in found:
        own = dict(changes)
        if data.name == "forget" and "holdout" in settings:
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
    """The refusals that are wanted: lines of a file, or how the built-in model declines; empty for a common list.

    Raises: CorpusError.
    """
    if refusals is not None:
        return tuple(row.prompt for row in prompts.read_prompts(refusals))
    return generator.DECLINES if model == BUILTIN else ()
