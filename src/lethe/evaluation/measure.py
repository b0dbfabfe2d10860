"""All metrics on all sets: of one model, or before and after an edit."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import metrics
from lethe.data.refusals import is_refusal
from lethe.errors import UnknownNameError, UsageError
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.divergence import KlToFrozen
from lethe.metrics.drift import CosineToFrozen
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.metrics.protocol import Combination, Metric
from lethe.model.patch import Patch
from lethe.model.swap import restore
from lethe.system.plugins import discover, kebab, nearest
from lethe.system.progress import Progress
from lethe.types import EvalSet, Question, Scores

Metrics = dict[str, Metric | Combination]
"""By their names in reports."""


MOST_FIRST = (KlToFrozen, CosineToFrozen, MultipleChoice)
"""Metrics that read what others need a part of: measured first, they spare those a forward."""


SAMPLES = 4
"""Questions of each set whose answers are shown."""


REFERENCES = 64
"""Reference prompts that are asked to find out whether the model refuses them."""


FEWEST_REFUSALS = 0.1
"""Below this share of refused reference prompts a direction to refusing is not to be had."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores by `metric/set` before and after an edit, and answers for people to read."""

    before: dict[str, Scores] = field(default_factory=dict)
    after: dict[str, Scores] = field(default_factory=dict)
    samples: tuple[dict[str, str], ...] = ()
    """Rows of set, prompt, gold, before, after."""


def metrics_of(names: Collection[str] = (), **settings: Any) -> Metrics:
    """Every metric and combination by its name in reports, or the named ones, each with the settings that it knows.

    A setting goes to each metric with a field of that name: `encoder`, `nli`, `refusals`, `keywords`, `neutral`,
    `free_running`, and whatever a metric on the shelf adds.

    Raises: UnknownNameError for a name that no metric has.
    """
    kinds = {name.replace("-", "_"): kind for name, kind in discover(metrics).items()}
    for name in names:
        if name not in kinds:
            raise UnknownNameError(f"there is no metric '{name}'.{nearest(name, kinds)}\nMetrics: {', '.join(kinds)}.")
    found: Metrics = {}
    for name, kind in kinds.items():
        fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        if not names or name in names:
            found[name] = kind(**{key: value for key, value in settings.items() if key in fields})
    return found


def measure(
    subject: LoadedModel,
    sets: Sequence[EvalSet],
    metrics: Metrics | Sequence[Metric | Combination] | None = None,
    progress: Progress | None = None,
    *,
    samples: int = 0,
    seed: int = 0,
) -> dict[str, Scores]:
    """Every metric on every set that it can measure, by the name `metric/set`, and what is combined of these.

    Without metrics they are all that there are; objects go by the names of their classes. Answers are greedy, or so
    many samples at temperature 1 by the seed.
    """
    asked = by_name(metrics)
    found: dict[str, Scores] = {}
    for data in sets:
        reading = Reading(subject, data, samples=samples, seed=seed)
        scores: dict[str, dict[str, Scores]] = {}
        for name, metric in sorted(asked.items(), key=lambda item: not isinstance(item[1], MOST_FIRST)):
            if isinstance(metric, Metric):
                scores[name] = _of_metric(name, metric, metric(reading), data)
        found |= {part: score for name in asked for part, score in scores.get(name, {}).items()}
        if progress:
            progress.advance(data.name)
    return found | combined(found, asked)


def combined(found: Mapping[str, Scores], metrics: Metrics | None = None) -> dict[str, Scores]:
    """What is worked out from scores of several metrics or sets, by the name of the combination."""
    scores: dict[str, Scores] = {}
    for name, metric in by_name(metrics).items():
        score = metric.combine(found) if isinstance(metric, Combination) else None
        if score is not None:
            scores[name] = _said_by(metric, score, metric.label)
    return scores


def by_name(metrics: Metrics | Sequence[Metric | Combination] | None) -> Metrics:
    """Metrics by their names in reports; all that there are for None."""
    if metrics is None:
        return metrics_of()
    if isinstance(metrics, Mapping):
        return dict(metrics)
    return {kebab(type(metric).__name__).replace("-", "_"): metric for metric in metrics}


def _of_metric(
    name: str, metric: Metric, scores: Scores | Mapping[str, Scores] | None, data: EvalSet
) -> dict[str, Scores]:
    several = {"": scores} if isinstance(scores, Scores) else scores or {}
    return {
        f"{name}{part}/{data.name}": replace(_said_by(metric, score, "" if part else metric.label), role=data.role)
        for part, score in several.items()
    }


def _said_by(metric: Metric | Combination, score: Scores, label: str) -> Scores:
    """The score with what the metric says of itself, for whoever prints it and knows the record alone."""
    return replace(score, unit=score.unit or metric.unit, label=score.label or label, hint=score.hint or metric.hint)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Scores of one model by `metric/set`, and answers for people to read."""

    scores: dict[str, Scores]
    answers: tuple[tuple[str, Question, str], ...] = field(repr=False)
    """Set, question and what the model answers."""


def measure_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Patch | None,
    sets: Sequence[EvalSet],
    progress: Progress,
    *,
    show_forget: bool,
    metrics: Metrics | Sequence[Metric | Combination] | None = None,
    samples: int = 0,
    seed: int = 0,
) -> Measured:
    """Measure a model with an edit applied in memory, which is taken off again.

    Answers to forget questions are shown with `show_forget` only; metrics, samples and seed are those of `measure`.
    """
    shown = [
        (data.name, question)
        for data in sets
        if data.role != "forget" or show_forget
        for question in data.questions[:SAMPLES]
    ]
    originals = edit.apply_in_memory(model) if edit else {}
    try:
        subject = LoadedModel(model=model, tokenizer=tokenizer, originals=originals)
        scores = measure(subject, sets, metrics, progress, samples=samples, seed=seed)
        said = generate(subject, [question.prompt for _, question in shown], [24] * len(shown))
    finally:
        restore(model, originals)
    answers = tuple((name, question, text.strip()) for (name, question), text in zip(shown, said, strict=True))
    return Measured(scores=scores, answers=answers)


def compared(before: Measured, after: Measured) -> Comparison:
    """Both side by side, question by question."""
    samples = tuple(
        {"set": name, "prompt": question.prompt, "gold": question.answer, "before": earlier, "after": now}
        for (name, question, earlier), (_, _, now) in zip(before.answers, after.answers, strict=True)
    )
    return Comparison(before=before.scores, after=after.scores, samples=samples)


def check_refusals(subject: LoadedModel, reference: Sequence[Question], refusals: Sequence[str]) -> float:
    """Share of (some) reference prompts that the model refuses to answer.

    Raises: UsageError if it hardly ever does: then there is no direction to find.
    """
    some = [asked.prompt for asked in reference[:REFERENCES]]
    refused = [is_refusal(answer, refusals) for answer in generate(subject, some, [24] * len(some))]
    rate = sum(refused) / len(refused)
    if rate < FEWEST_REFUSALS:
        raise UsageError(
            f"the model refuses {100 * rate:.0f} % of {len(some)} reference prompts, so nothing in it says that it "
            f"cannot answer ({100 * FEWEST_REFUSALS:.0f} % are needed).\nA base model has no such region: take a chat "
            "model, or pass --reference FILE with questions that it declines, or --refusals FILE with how it does so."
        )
    return rate
