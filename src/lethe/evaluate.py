"""All metrics on all sets, before and after an edit."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import metrics
from lethe.patch import Patch
from lethe.progress import Progress
from lethe.protocols import Subject, discover
from lethe.scoring import generate
from lethe.types import EvalSet, Scores

SAMPLES = 4
"""Questions of each set whose answers are shown."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Scores by `metric/set` before and after an edit, and answers for people to read."""

    before: dict[str, Scores] = field(default_factory=dict)
    after: dict[str, Scores] = field(default_factory=dict)
    samples: tuple[dict[str, str], ...] = ()
    """Rows of set, prompt, gold, before, after."""


def measure(subject: Subject, sets: Sequence[EvalSet], progress: Progress | None = None) -> dict[str, Scores]:
    """Every metric on every set that it can measure, by the name `metric/set`."""
    found = {}
    for data in sets:
        for name, kind in discover(metrics).items():
            scores = kind()(subject, data)
            if scores is not None:
                found[f"{name.replace('-', '_')}/{data.name}"] = scores
        if progress:
            progress.advance(data.name)
    return found


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    patch: Patch,
    sets: Sequence[EvalSet],
    progress: Progress,
    *,
    show_forget: bool,
) -> Comparison:
    """Measure a model, apply the patch to it in memory, measure it again.

    Answers to forget questions are sampled with `show_forget` only.
    """
    shown = [
        (data.name, question)
        for data in sets
        if data.name != "forget" or show_forget
        for question in data.questions[:SAMPLES]
    ]

    def answers(subject: Subject) -> list[str]:
        prompts = [question.prompt for _, question in shown]
        return [answer.strip() for answer in generate(subject, prompts, [24] * len(prompts))]

    progress.phase("measure before and after", 2 * len(sets))
    subject = Subject(model=model, tokenizer=tokenizer)
    before, said = measure(subject, sets, progress), answers(subject)
    subject = Subject(model=model, tokenizer=tokenizer, originals=patch.apply_in_memory(model))
    after, says = measure(subject, sets, progress), answers(subject)
    samples = tuple(
        {"set": name, "prompt": question.prompt, "gold": question.answer, "before": earlier, "after": now}
        for (name, question), earlier, now in zip(shown, said, says, strict=True)
    )
    return Comparison(before=before, after=after, samples=samples)
