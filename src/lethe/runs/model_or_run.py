"""What `lethe eval` is pointed at: a model, or the edited model of a run; its weights are loaded when first needed."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lethe import suites
from lethe.data import data_folder, prompts
from lethe.data.batches import Corpora
from lethe.data.exams import NO_TEMPLATE
from lethe.data.settings import BUILTIN
from lethe.data.text_files import did_you_mean
from lethe.errors import InvalidValueError, ModelError, UsageError
from lethe.evaluation import eval_sets
from lethe.evaluation.lazy_model import LazyModel
from lethe.evaluation.measure import Metrics, metrics_of
from lethe.model.checkpoint_files import count_layers, model_folder
from lethe.model.loading import load_tokenizer
from lethe.runs import inputs, sets_of_run
from lethe.runs.config import RunConfig
from lethe.runs.config_file import read_run_config, reads
from lethe.runs.run_folder import RunFolder
from lethe.runs.workspace import Workspace
from lethe.system.plugins import load
from lethe.types import EvalSet


class Target:
    """A run folder, or `builtin`, a model folder or a hub id; settings given on the command line win over a run's.

    Raises: RunFolderError, PatchError, ModelError, InvalidValueError.
    """

    def __init__(
        self,
        name: str,
        given: Mapping[str, Any],
        *,
        suite: str | None = None,
        chat: bool = False,
        retain_only: str | None = None,
    ):
        self.name = name
        self.suite = suite
        self.chat = chat
        """Whether the suite's questions are put in the model's chat template."""
        self.run = RunFolder(Path(name))
        self.is_run = self.run.config.exists()
        # Of a suite, the folder that --data names holds files of the suite's own form.
        self._suite_folder = given.get("data") if suite else None
        self.given = {key: value for key, value in given.items() if not (suite and key == "data")}
        if self.is_run:
            self.run.require_patch()
            self.given = {**_of_own_data(self.given), **self.given}
            self.config = read_run_config(self.run.config).changed(**self.given)
        else:
            self.config = RunConfig.of(model=name, **self.given)
        workspace = Workspace(self.config.base)
        self.tokenizer = workspace.tokenizer
        count_layers(workspace.folder)  # which reads its config.json: a broken one is told before the corpora are read
        for flag, folder in (("--encoder", self.config.evaluation.encoder), ("--nli", self.config.evaluation.nli)):
            if folder is not None and not folder.expanduser().is_dir():
                raise ModelError(
                    f"there is no model folder {folder}, which {flag} names.\n"
                    f"Pass the folder of one in Hugging Face's format, or leave {flag} out."
                )
        self.model = LazyModel(
            name,
            workspace.folder,
            self.tokenizer,
            dtype=workspace.dtype,
            device=workspace.device,
            patch=self.run.patch if self.is_run else None,
            retain_only=_retain_only(retain_only, self.tokenizer) if retain_only else None,
        )
        """Its weights are loaded when first needed."""

    def sets(self) -> tuple[EvalSet, ...]:
        """What is measured: the sets of a suite, those of the run, or the named questions and corpora.

        Raises: UsageError if there is nothing; QuestionError, CorpusError, RunFolderError, UnknownNameError.
        """
        if self.suite is not None:
            tokenizer = self.tokenizer if self.chat else None
            found = eval_sets.of_suite(_suite_sets(self.suite, self._suite_folder, tokenizer), self.given)
        elif self.is_run:
            found = sets_of_run.of_run(self.config, self._corpora, self.tokenizer)
        else:
            config = self.config
            found = eval_sets.sets(config.base.model, config.data, config.evaluation, self._corpora)
        if not any(data.questions or data.texts or data.passages for data in found):
            raise UsageError(
                f"there is nothing to measure {self.name} on.\n"
                "Pass --forget-questions, --retain-questions, --forget or --retain."
            )
        if "holdout" in self.given and not any(data.texts for data in found if data.role == "forget"):
            raise UsageError(
                "--holdout does nothing without texts to forget, which it is compared with.\n"
                "Pass --forget FILE, or leave --holdout out."
            )
        return found

    def metrics(self, sets: Sequence[EvalSet], names: Collection[str] = ()) -> Metrics:
        """Every metric, or the named ones, with the settings of the run or the command line.

        Raises: UnknownNameError, CorpusError; UsageError for keywords that nothing asks for.
        """
        forget, retain = ({}, []) if self.suite else self._corpora.texts()
        measured = self._measured_by
        settings = eval_sets.metric_settings(
            measured.base.model, measured.evaluation, sets, forget, retain, self.tokenizer
        )
        if "keywords" in self.given and "keywords" not in settings:
            raise UsageError(
                "--keywords does nothing without both corpora and questions with choices on a set to keep.\n"
                "Pass --forget, --retain and --retain-questions, or leave --keywords out."
            )
        return metrics_of(names, **settings)

    @property
    def samples(self) -> int:
        """Sampled answers to each question."""
        return self._measured_by.evaluation.samples

    @property
    def seed(self) -> int:
        """Of what is sampled."""
        return self._measured_by.seed

    @property
    def _measured_by(self) -> RunConfig:
        """Settings of measuring: of a suite, whose sets are no run's, those that were given and no others."""
        return RunConfig.of(model=str(self.model.folder), **self.given) if self.suite else self.config

    @cached_property
    def _corpora(self) -> Corpora:
        kind = reads(self.run.config) if self.is_run else "texts"
        return inputs.read(self.config.data, kind, self.config.base.model, self.tokenizer, required=self.is_run)


def _of_own_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that a folder of own data takes the place of, at their defaults."""
    if "data" not in given:
        return {}
    own, default = data_folder.find(given["data"]), RunConfig.of(model=BUILTIN).settings()
    questions = ("forget_questions", "adjacent_questions", "retain_questions")
    replaced = ["forget"] * bool(own.forget) + ["retain"] * bool(own.retain) + [*questions] * bool(own.questions)
    return {name: default[name] for name in replaced}


def _retain_only(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, PreTrainedTokenizerBase]:
    """Folder and tokenizer of a model that never saw the forget set."""
    if RunFolder(Path(name)).config.exists():
        raise ModelError(
            f"{name} is a run folder, and --retain-only needs a model that was trained without the forget set.\n"
            "Name the folder of such a model; an edited one has seen it."
        )
    folder = model_folder(inputs.model_source(name))
    count_layers(folder)
    own = load_tokenizer(folder)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the retain-only model {name} has another vocabulary ({len(own)} tokens) than the one that is measured "
            f"({len(tokenizer)}).\nTake one that was trained from the same base."
        )
    return folder, own


def _suite_sets(
    name: str, folder: Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[EvalSet, ...]:
    """The sets of `suite` or `suite:split`, read from a folder; in the chat template of a tokenizer that is given."""
    # In `path/to/file.py:Class:split` the first colon is the class's.
    file, word, split = re.fullmatch(r"(.+\.py:)?([^:]*):?(.*)", name).groups()  # type: ignore[union-attr]
    kind: Any = load(f"{file or ''}{word}", suites)
    settings = {"split": split if file else split.lower()} if split else {}
    if tokenizer is not None:
        if "template" not in {one.name for one in dataclasses.fields(kind)}:
            raise UsageError(f"--suite {word} is put in its own form, after solved examples.\nLeave --chat out.")
        if not tokenizer.chat_template:
            raise UsageError(NO_TEMPLATE)
        settings["template"] = "{question}"
    suite = kind(**settings)
    if folder is None:
        raise InvalidValueError(f"--suite {name} needs the folder of its files.\nPass --data DIR.")
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}{did_you_mean(folder)}\nGive one with the files of {suite.data}.")
    found = suite.sets(folder)
    if tokenizer is None:
        return found
    return tuple(dataclasses.replace(data, questions=prompts.render(tokenizer, data.questions)) for data in found)
