"""The evaluation sets of a run: from its corpora, its questions, and the runs it stands on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lethe.data.prompts import Prompts
from lethe.evaluation.eval_sets import TEXTS, in_turn, sets
from lethe.runs import config_file as configs
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.types import EvalSet


def of_run(
    config: RunConfig,
    forget: Mapping[str, Sequence[str]],
    retain: Sequence[str],
    asked: Prompts | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[EvalSet, ...]:
    """The sets of a run and, if it is on top of earlier ones, what these forgot as the set "earlier".

    Raises: QuestionError, CorpusError, RunFolderError.
    """
    found = sets(config, forget, retain, asked)
    earlier = [data for run in _chain(config) for data in _of_folder(run, tokenizer) if data.role == "forget"]
    if not earlier:
        return found
    before = replace(
        earlier[0],
        name="earlier",
        questions=tuple(in_turn([data.questions for data in earlier])),
        texts=tuple(in_turn([data.texts for data in earlier])[:TEXTS]),
    )
    return (found[0], before, *found[1:])


def of_folder(run: Path, changes: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[EvalSet, ...]:
    """The sets of a finished run, with some settings changed.

    Raises: QuestionError, CorpusError, RunFolderError.
    """
    config = replace(configs.read_run_config(run / "config.yaml"), **changes)
    return of_run(config, *material(config, configs.reads(run / "config.yaml"), tokenizer), tokenizer)


def _of_folder(run: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[EvalSet, ...]:
    config = configs.read_run_config(run / "config.yaml")
    return sets(config, *material(config, configs.reads(run / "config.yaml"), tokenizer))


def material(
    config: RunConfig, reads: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, list[str]], list[str], Prompts | None]:
    """Forget texts by topic, retain texts, and the prompts that they were made of, if a method reads these."""
    if reads == "prompts":
        asked = inputs.read_prompts(config, tokenizer)
        return *asked.texts(), asked
    return *inputs.read_corpora(config), None


def _chain(config: RunConfig) -> Iterator[Path]:
    """The runs that this one is on top of, the latest first."""
    while config.on is not None:
        yield config.on
        config = configs.read_run_config(config.on / "config.yaml")
