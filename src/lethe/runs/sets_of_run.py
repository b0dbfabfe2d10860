"""The evaluation sets of a run: from its corpora, its questions, and the runs it stands on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lethe.data.batches import Corpora
from lethe.data.corpora import in_turn
from lethe.evaluation.eval_sets import TEXTS, sets
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.runs.config_file import read_run_config, reads
from lethe.types import EvalSet


def of_run(config: RunConfig, corpora: Corpora, tokenizer: PreTrainedTokenizerBase) -> tuple[EvalSet, ...]:
    """The sets of a run and, if it is on top of earlier ones, what these forgot as the set "earlier".

    Raises: QuestionError, CorpusError, RunFolderError.
    """
    found = _sets(config, corpora)
    earlier = [data for run in _chain(config) for data in _of_earlier(run, tokenizer) if data.role == "forget"]
    if not earlier:
        return found
    before = replace(
        earlier[0],
        name="earlier",
        questions=tuple(in_turn([data.questions for data in earlier])),
        texts=tuple(in_turn([data.texts for data in earlier])[:TEXTS]),
    )
    return (found[0], before, *found[1:])


def _of_earlier(run: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[EvalSet, ...]:
    config = read_run_config(run / "config.yaml")
    return _sets(config, inputs.read(config.data, reads(run / "config.yaml"), config.base.model, tokenizer))


def _sets(config: RunConfig, corpora: Corpora) -> tuple[EvalSet, ...]:
    return sets(config.base.model, config.data, config.evaluation, corpora)


def _chain(config: RunConfig) -> Iterator[Path]:
    """The runs that this one is on top of, the latest first."""
    while config.on is not None:
        yield config.on
        config = read_run_config(config.on / "config.yaml")
