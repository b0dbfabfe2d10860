"""All metrics on all sets: of one model, or before and after an edit."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import metrics, sources
from lethe.config import RunConfig, read_run_config
from lethe.environment import find_device
from lethe.folder import RunFolder
from lethe.patch import Patch
from lethe.progress import Progress
from lethe.protocols import Combination, Metric, Subject, discover
from lethe.scoring import generate
from lethe.types import EvalSet, Scores, UsageError
from lethe.weights import load_model, load_tokenizer, model_folder

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
    """Every metric on every set that it can measure, by the name `metric/set`, and what is combined of these."""
    found: dict[str, Scores] = {}
    known = {name.replace("-", "_"): kind() for name, kind in discover(metrics).items()}
    for data in sets:
        for name, metric in known.items():
            scores = metric(subject, data) if isinstance(metric, Metric) else None
            several = {"": scores} if isinstance(scores, Scores) else scores or {}
            found |= {f"{name}{part}/{data.name}": score for part, score in several.items()}
        if progress:
            progress.advance(data.name)
    for name, metric in known.items():
        if isinstance(metric, Combination) and (score := metric.combine(found)) is not None:
            found[name] = score
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


def measure_target(target: str, given: Mapping[str, Any], progress: Progress) -> dict[str, Scores]:
    """Measure a model, or the edited model of a run folder, by the run's settings changed by those given.

    Raises: UsageError if there is nothing to measure it on; ModelError, CorpusError, QuestionError, RunFolderError.
    """
    run = RunFolder(Path(target))
    patch = None
    if run.config.exists():
        run.require_patch()
        config = dataclasses.replace(read_run_config(run.config), **given)
        patch = Patch.load(run.patch)
        forget, retain = sources.read_corpora(config)
    else:
        config = RunConfig(model=target, **given)
        model_folder(sources.model_source(target), config.revision)
        forget, retain = sources.read_corpora(config, required=False)
    sets = sources.eval_sets(config, forget, retain)
    if not any(data.questions or data.texts for data in sets):
        raise UsageError(
            f"there is nothing to measure {target} on.\n"
            "Pass --forget-questions, --retain-questions, --forget or --retain."
        )
    device = find_device(config.device)
    source = sources.model_source(config.model)
    dtype = sources.find_dtype(config.dtype, source, config.revision, device)
    model = load_model(source, dtype=dtype, device=str(device), revision=config.revision)
    originals = patch.apply_in_memory(model) if patch else {}
    progress.phase("measure", len(sets))
    subject = Subject(model=model, tokenizer=load_tokenizer(source, config.revision), originals=originals)
    return measure(subject, sets, progress)
