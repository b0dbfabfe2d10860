"""All metrics on all sets: of one model, or before and after an edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import metrics
from lethe.data.refusals import is_refusal
from lethe.errors import UsageError
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.metrics.protocol import Combination
from lethe.model.patch import Patch
from lethe.model.swap import restore
from lethe.system.plugins import discover
from lethe.system.progress import Progress
from lethe.types import FORGOTTEN, EvalSet, Question, Scores

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


def measure(subject: LoadedModel, sets: Sequence[EvalSet], progress: Progress | None = None) -> dict[str, Scores]:
    """Every metric on every set that it can measure, by the name `metric/set`, and what is combined of these."""
    found: dict[str, Scores] = {}
    known = _metrics()
    for data in sets:
        for name, metric in known.items():
            if isinstance(metric, Combination):
                continue
            scores = metric(subject, data)
            several = {"": scores} if isinstance(scores, Scores) else scores or {}
            found |= {f"{name}{part}/{data.name}": score for part, score in several.items()}
        if progress:
            progress.advance(data.name)
    return found | combined(found)


def combined(found: Mapping[str, Scores]) -> dict[str, Scores]:
    """What is worked out from scores of several metrics or sets, by the name of the combination."""
    scores = {name: kind.combine(found) for name, kind in _metrics().items() if isinstance(kind, Combination)}
    return {name: score for name, score in scores.items() if score is not None}


def _metrics() -> dict[str, Any]:
    """Every metric and combination, by its name in reports."""
    return {name.replace("-", "_"): kind() for name, kind in discover(metrics).items()}


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
) -> Measured:
    """Measure a model with an edit applied in memory, which is taken off again; answers to forget questions are
    sampled with `show_forget` only.
    """
    shown = [
        (data.name, question)
        for data in sets
        if data.name not in FORGOTTEN or show_forget
        for question in data.questions[:SAMPLES]
    ]
    originals = edit.apply_in_memory(model) if edit else {}
    try:
        subject = LoadedModel(model=model, tokenizer=tokenizer, originals=originals)
        scores = measure(subject, sets, progress)
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
