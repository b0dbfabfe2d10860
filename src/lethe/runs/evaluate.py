"""Measuring a model, or the edited model of a run, again: on sets, on an exam, on tasks of the harness."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lethe.data.exams import Exam
from lethe.data.hub_exams import find_exam
from lethe.evaluation import measure_target as measuring
from lethe.evaluation.score_cache import ScoreCache
from lethe.runs.model_or_run import Target
from lethe.system import machine
from lethe.system.progress import Progress
from lethe.types import Scores

BATCH_SIZE = 8
"""Rows of a batch of the harness, unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was measured of one model, and on what."""

    scores: Mapping[str, Scores]
    """By `metric/set`."""
    measured_on: Mapping[str, str]
    """For each of them a hash of its questions, as far as these are known."""
    not_measured: Mapping[str, str]
    """Metrics that suit the sets and lack something that can be named, each with the flags for it."""
    about: Mapping[str, Mapping[str, Any]]
    """Of `exam`, and `exam_shuffled`: which letters were picked, and what keeps accuracy from being knowledge."""
    texts: Sequence[Mapping[str, Any]] = dataclasses.field(default=(), repr=False)
    """Prompts and answers, those of forget sets too, if they were asked for."""
    weights: Mapping[str, Any]
    """What decides the model's output; hashes are empty where no cache keeps scores."""
    environment: Mapping[str, Any]
    """Device and versions."""


def evaluate(
    target: str | Path,
    *,
    suite: str | None = None,
    retain_only: str | None = None,
    exam: str | None = None,
    subjects: Sequence[str] = (),
    shuffle: int | None = None,
    harness: Sequence[str] = (),
    metrics: Sequence[str] = (),
    include: Sequence[Path] = (),
    batch_size: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    cache: ScoreCache | None = None,
    keep_text: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """Measure a model, or the edited model of a run: all metrics on sets, an exam, tasks of lm-evaluation-harness.

    `target` is a run folder, `builtin`, a model folder or a hub id; `settings` are those of `RunConfig` (forget,
    forget_questions, limit, device ...), which win over a run's own. Sets are measured if any is named, or neither an
    exam nor a task is; `metrics` names those that measure them, by default all. `exam` is a file, a folder or a hub
    dataset, of which `subjects` keeps some and `shuffle` is the seed of another order of the options; `shots` solved
    examples stand before each question. `cache` has scores
    measured before; without one, everything is measured and nothing kept.

    Raises: any error of errors.py.
    """
    progress, cache = progress or Progress(), cache or ScoreCache(None, lambda _: None)
    limit = settings.get("limit")
    paper = _exam(exam, subjects, limit) if exam else None
    wants_sets = bool(settings.keys() - {"limit", "scoring", "device", "dtype"} or suite or retain_only)
    with machine.explaining_memory(f"with {target} loaded whole.\nPass --dtype bfloat16."):
        on = Target(str(target), settings, suite=suite, chat=bool(suite) and chat, retain_only=retain_only)
        found = measuring.Found()
        about: dict[str, Mapping[str, Any]] = {}
        texts: list[dict[str, Any]] = []
        sets = on.sets() if wants_sets or not (exam or harness) else ()
        if paper is not None:
            style = measuring.Style(shots=shots or 0, scoring=settings.get("scoring", "letter"), chat=chat)
            marks = measuring.sit_exam(on.model, paper, style, cache, progress)
            about["exam"] = measuring.letters(marks)
            other = None
            if shuffle is not None:
                other = measuring.sit_exam(on.model, measuring.shuffled_exam(paper, shuffle), style, cache, progress)
                about["exam_shuffled"] = measuring.letters(other)
            found |= measuring.exam_scores(marks, other)
            texts += measuring.exam_texts(marks) if keep_text else []
        nli = on.config.evaluation.nli is not None
        missing = measuring.not_measured(sets, retain_only=retain_only is not None, nli=nli)
        if sets:
            found |= measuring.measure_sets(
                on.model, sets, on.metrics(sets, metrics), cache, progress, samples=on.samples, seed=on.seed
            )
            texts += measuring.set_texts(on.model.loaded, sets) if keep_text else []
        if harness:
            found |= measuring.run_tasks(
                on.model,
                tuple(harness),
                cache,
                progress,
                include=tuple(include),
                batch_size=batch_size or BATCH_SIZE,
                shots=shots,
                limit=limit,
                chat=chat,
            )
        return Evaluation(
            scores=found.scores,
            measured_on=found.measured_on,
            not_measured=missing,
            about=about,
            texts=tuple(texts),
            weights={name: value or None for name, value in on.model.identity(cache).items()},
            environment=machine.describe(on.model.device),
        )


def _exam(name: str, subjects: Sequence[str], limit: int | None) -> Exam:
    exam = find_exam(name)
    exam = exam.only(subjects) if subjects else exam
    if limit is None:
        return exam
    few = (question for name in exam.subjects for question in exam.only([name]).questions[:limit])
    return dataclasses.replace(exam, questions=tuple(few))
