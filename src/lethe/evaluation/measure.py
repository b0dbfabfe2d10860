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
from lethe.runs.sharing import Sharing
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


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: Patch,
    sets: Sequence[EvalSet],
    progress: Progress,
    *,
    show_forget: bool,
    start: Patch | None = None,
    first: int = 0,
    sharing: Sharing | None = None,
) -> Comparison:
    """Measure a model, apply the patch to it in memory, measure it again.

    With `start` the model is measured with that patch first: what an earlier request left. `first` is the first layer
    that the patch changes.

    Answers to forget questions are sampled with `show_forget` only.
    """
    shared = sharing or Sharing()
    shown = [
        (data.name, question)
        for data in sets
        if data.name not in FORGOTTEN or show_forget
        for question in data.questions[:SAMPLES]
    ]

    def answers(subject: LoadedModel) -> list[str]:
        prompts = [question.prompt for _, question in shown]
        return [answer.strip() for answer in generate(subject, prompts, [24] * len(prompts))]

    def read(edit: Patch | None) -> tuple[dict[str, Scores], list[str]]:
        originals = edit.apply_in_memory(model) if edit else {}
        try:
            subject = LoadedModel(model=model, tokenizer=tokenizer, originals=originals)
            with shared.reading(model, first if edit else None):
                return measure(subject, sets, progress), answers(subject)
        finally:
            restore(model, originals)

    progress.phase("measure before and after", 2 * len(sets))
    before, said = shared.once("before", (tuple(sets), show_forget), lambda: read(start))
    after, says = read(patch)
    samples = tuple(
        {"set": name, "prompt": question.prompt, "gold": question.answer, "before": earlier, "after": now}
        for (name, question), earlier, now in zip(shown, said, says, strict=True)
    )
    return Comparison(before=before, after=after, samples=samples)


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
