"""Metrics, an exam and tasks of the harness on one target: what was measured before is read from the cache."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lethe.data.exams import NO_TEMPLATE, Exam, Scoring, render, shuffled
from lethe.data.hub_exams import groups_of
from lethe.errors import UsageError
from lethe.evaluation import harness, measure, results
from lethe.evaluation.exam import Marks, sit
from lethe.evaluation.lazy_model import LazyModel
from lethe.evaluation.score_cache import ScoreCache
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import free_form
from lethe.system.progress import Progress
from lethe.types import EvalSet, Scores, mean_scores

ANSWER_TOKENS = 24
"""Length of the greedy answers that are kept with --keep-text."""


ALL = "all"
"""Name of the whole exam beside its subjects."""


Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured."""

    scores: dict[str, Scores] = field(default_factory=dict)
    """By `metric/set`."""
    measured_on: dict[str, str] = field(default_factory=dict)
    """For each of them a hash of its questions, as far as these are known."""

    def __or__(self, other: "Found") -> "Found":
        return Found(scores=self.scores | other.scores, measured_on=self.measured_on | other.measured_on)


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an exam is put."""

    shots: int = 0
    scoring: Scoring = "letter"
    chat: bool = False


def measure_sets(
    model: LazyModel,
    sets: Sequence[EvalSet],
    metrics: measure.Metrics,
    cache: ScoreCache,
    progress: Progress,
    *,
    samples: int = 0,
    seed: int = 0,
) -> Found:
    """Every metric on every set, by the name `metric/set`, and what is combined of these.

    Raises: DivergedError, OutOfMemoryError.
    """
    progress.phase("measure", len(sets))
    identity = {**model.identity(cache), "retain_only": model.retain_only_hash(cache)}
    found: dict[str, Scores] = {}
    # A setting that names a folder stands for what is in it: a model that judges the answers.
    settings = [value for metric in metrics.values() for value in vars(metric).values()]
    folders = dict.fromkeys(value.expanduser() for value in settings if isinstance(value, Path))
    files = cache.files_hash(path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    for data in sets:
        asked = {"set": _digest(data, metrics), "files": files, "samples": samples, "seed": seed}
        rows = cache.once(
            {**identity, "task": "metrics", **asked},
            lambda data=data: _as_rows(measure.measure(model.loaded, [data], metrics, samples=samples, seed=seed)),
        )
        found |= _as_scores(rows)
        progress.advance(data.name)
    found |= measure.combined(found, metrics)
    return Found(scores=found, measured_on=results.measured_on(found, sets))


def not_measured(sets: Sequence[EvalSet], *, retain_only: bool, nli: bool) -> dict[str, str]:
    """Metrics that suit these sets and lack something that the command line can name, each with the flags for it."""
    forget = [data for data in sets if data.role == "forget"]
    texts = any(data.texts for data in forget)
    holdout = any(data.holdout for data in forget)
    lacking: dict[str, dict[str, bool]] = {}
    if texts:
        lacking["membership"] = {"--holdout": holdout}
        lacking["priv_leak"] = {"--holdout": holdout, "--retain-only": retain_only}
    if any(question.perturbed for data in forget for question in data.questions):
        lacking["forget_quality"] = {"--retain-only": retain_only}
    if any(free_form(data) for data in sets):
        lacking["entailment"] = {"--nli": nli}
    missing = {name: [flag for flag, is_there in flags.items() if not is_there] for name, flags in lacking.items()}
    return {name: " and ".join(flags) for name, flags in missing.items() if flags}


def sit_exam(model: LazyModel, exam: Exam, style: Style, cache: ScoreCache, progress: Progress) -> Marks:
    """The answers to an exam, one entry of the cache for each subject.

    Raises: QuestionError, UsageError, DivergedError, OutOfMemoryError.
    """
    asked = {subject: exam.only([subject]) for subject in exam.subjects}
    for part in asked.values():
        # What cannot be put is told before the weights are loaded.
        _render_first(part, style, model)
    progress.phase("measure exam", len(asked))
    identity = {**model.identity(cache), "task": "exam", **dataclasses.asdict(style)}
    parts = []
    for subject, part in asked.items():
        examples = part.examples.get(subject, ())[: style.shots]
        key = {**identity, "questions": _digest(part.questions, examples)}
        row = cache.once(key, lambda part=part: _marks_row(sit(model.loaded, part, **dataclasses.asdict(style))))
        parts.append((part, row))
        progress.advance(subject)
    return Marks(
        questions=tuple(question for part, _ in parts for question in part.questions),
        log_likelihoods=tuple(tuple(values) for _, row in parts for values in row["log_likelihoods"]),
        picked=tuple(place for _, row in parts for place in row["picked"]),
        cut=sum(row["cut"] for _, row in parts),
    )


def shuffled_exam(exam: Exam, seed: int) -> Exam:
    """The same exam with the choices of every question in another order; examples stay as they are."""
    parts = (shuffled(exam.only([subject]).questions, seed) for subject in exam.subjects)
    return replace(exam, questions=tuple(question for part in parts for question in part))


def exam_scores(marks: Marks, other: Marks | None) -> Found:
    """Accuracy of the whole exam, of MMLU's groups weighted by size, and of each subject.

    `other` are the marks of the same questions with shuffled options: their accuracy, and what it falls by.
    """
    found = _accuracies(marks, "exam_accuracy")
    if other is None:
        return found
    # Both exams are asked subject by subject in one order, so questions pair up.
    drops = [first - second for first, second in zip(marks.hits, other.hits, strict=True)]
    drop = {f"exam_shuffle_drop/{ALL}": replace(mean_scores(drops, "neither"), unit="share")}
    on = dict.fromkeys(drop, _digest(marks.questions, other.questions))
    return found | _accuracies(other, "exam_accuracy_shuffled") | Found(scores=drop, measured_on=on)


def _accuracies(marks: Marks, metric: str) -> Found:
    groups = groups_of(Exam(questions=marks.questions))
    scores = marks.scores(groups)
    asked = {
        name: [one for one in marks.questions if not name or one.topic in groups.get(name, (name,))] for name in scores
    }
    return Found(
        scores={f"{metric}/{name or ALL}": score for name, score in scores.items()},
        measured_on={f"{metric}/{name or ALL}": _digest(questions) for name, questions in asked.items()},
    )


def letters(marks: Marks) -> dict[str, Any]:
    """Whether letters, not knowledge, were picked, as JSON."""
    longest = max(len(question.choices) for question in marks.questions)
    return {
        "questions": len(marks.questions),
        "top_share": marks.top_share(),
        "entropy_bits": marks.entropy(),
        "choices": longest,
        "cut_prompts": marks.cut,
        "biases": list(marks.biases()),
    }


def run_tasks(
    model: LazyModel,
    tasks: Sequence[str],
    cache: ScoreCache,
    progress: Progress,
    *,
    include: Sequence[Path],
    batch_size: int,
    shots: int | None,
    limit: int | None,
    chat: bool,
) -> Found:
    """Tasks of lm-evaluation-harness, by the name `harness_metric/task`; one entry of the cache for each.

    What is measured depends on data that the harness fetches from the hub, too: an entry stands for the data as it was.

    Raises: UsageError, UnknownNameError, InvalidValueError.
    """
    if chat and not model.tokenizer.chat_template:
        raise UsageError(NO_TEMPLATE)
    manager = harness.find_tasks(tasks, include)
    progress.phase("measure with the harness", len(tasks))
    key = {
        **model.identity(cache), "task": "harness", "lm_eval": importlib.metadata.version("lm_eval"),
        "shots": shots, "limit": limit, "chat": chat,
        "include": cache.files_hash(harness.task_data(include)),
    }  # fmt: skip
    found = Found()
    for task in tasks:
        rows = cache.once(
            {**key, "name": task},
            lambda task=task: _as_rows(
                harness.run_harness(
                    model.loaded, [task], batch_size=batch_size, shots=shots, limit=limit, chat=chat,
                    include=include, manager=manager,
                )
            ),
        )  # fmt: skip
        scores = {_harness_name(name): score for name, score in _as_scores(rows).items()}
        # Without the hashes of local data nobody knows whether the questions are the same.
        on = _digest(task, limit, key["lm_eval"], key["include"]) if cache.folder is not None else ""
        found |= Found(scores=scores, measured_on=dict.fromkeys(scores, on) if on else {})
        progress.advance(task)
    return found


def _harness_name(name: str) -> str:
    """`harness_metric/task` of the harness's `task/metric/filter`."""
    task, _, metric = name.partition("/")
    return f"harness_{metric.replace('/', '_')}/{task}"


def set_texts(subject: LoadedModel, sets: Iterable[EvalSet]) -> list[Row]:
    """Prompts with the model's greedy answers, for --keep-text."""
    rows = []
    for data in sets:
        prompts = [question.prompt for question in data.questions]
        answers = generate(subject, prompts, [ANSWER_TOKENS] * len(prompts))
        for question, answer in zip(data.questions, answers, strict=True):
            rows.append({"set": data.name, "prompt": question.prompt, "gold": question.answer, "answer": answer})
    return rows


def exam_texts(marks: Marks) -> list[Row]:
    """Questions of an exam with what was picked, for --keep-text."""
    return [
        {
            "exam": question.topic, "prompt": question.prompt, "choices": list(question.choices),
            "gold": question.gold, "picked": picked, "log_likelihoods": list(values),
        }
        for question, picked, values in zip(marks.questions, marks.picked, marks.log_likelihoods, strict=True)
    ]  # fmt: skip


def _render_first(exam: Exam, style: Style, model: LazyModel) -> None:
    chat = model.tokenizer if style.chat else None
    render(exam, exam.questions[0], shots=style.shots, scoring=style.scoring, chat=chat)


def _digest(*things: object) -> str:
    """A hash of the content of dataclasses, whose repr tells all of it."""
    return hashlib.sha256(repr(things).encode()).hexdigest()


def _marks_row(marks: Marks) -> Row:
    return {"log_likelihoods": marks.log_likelihoods, "picked": marks.picked, "cut": marks.cut}


def _as_rows(scores: Mapping[str, Scores]) -> dict[str, Row]:
    return {name: dataclasses.asdict(score) for name, score in scores.items()}


def _as_scores(rows: Mapping[str, Row]) -> dict[str, Scores]:
    def whole(row: Row) -> Scores:
        values: Row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return Scores(**values)

    return {name: whole(row) for name, row in rows.items()}
