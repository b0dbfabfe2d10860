"""What `lethe eval` is pointed at: a model, or the edited model of a run; its weights are loaded when first needed."""

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import suites
from lethe.data import data_folder, prompts
from lethe.data.exams import NO_TEMPLATE
from lethe.data.text_files import did_you_mean
from lethe.errors import InvalidValueError, ModelError, UsageError
from lethe.evaluation import eval_sets
from lethe.evaluation.score_cache import ScoreCache
from lethe.inference.loaded_model import LoadedModel
from lethe.model.checkpoint_files import count_layers, model_folder
from lethe.model.loading import load_model, load_tokenizer
from lethe.model.patch import Patch
from lethe.runs import inputs, sets_of_run
from lethe.runs.config import RunConfig
from lethe.runs.config_file import read_run_config
from lethe.runs.run_folder import RunFolder
from lethe.suites.world.settings import BUILTIN
from lethe.system.machine import find_device
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
        self.patch: Patch | None = None
        # Of a suite, the folder that --data names holds files of the suite's own form.
        self._suite_folder = given.get("data") if suite else None
        self.given = {key: value for key, value in given.items() if not (suite and key == "data")}
        if self.run.config.exists():
            self.run.require_patch()
            self.given = {**_of_own_data(self.given), **self.given}
            self.config = dataclasses.replace(read_run_config(self.run.config), **self.given)
            self.patch = Patch.load(self.run.patch)
        else:
            self.config = RunConfig(model=name, **self.given)
        source = inputs.model_source(self.config.model)
        self.folder = model_folder(source, self.config.revision)
        self.device = find_device(self.config.device)
        self.dtype = inputs.find_dtype(self.config.dtype, source, self.config.revision, self.device)
        self.tokenizer = load_tokenizer(source, self.config.revision)
        count_layers(self.folder)  # which reads its config.json: a broken one is told before the corpora are read
        for flag, folder in (("--encoder", self.config.encoder), ("--nli", self.config.nli)):
            if folder is not None and not folder.expanduser().is_dir():
                raise ModelError(
                    f"there is no model folder {folder}, which {flag} names.\n"
                    f"Pass the folder of one in Hugging Face's format, or leave {flag} out."
                )
        self._retain_only = _retain_only(retain_only, self.tokenizer) if retain_only else None

    @cached_property
    def subject(self) -> LoadedModel:
        """The model in memory, with its edit, and the retain-only model beside it.

        Raises: ModelError, PatchError, OutOfMemoryError.
        """
        model = self._load(self.folder, self.tokenizer, self.name)
        originals = self.patch.apply_in_memory(model) if self.patch else {}
        other = None
        if self._retain_only:
            folder, tokenizer = self._retain_only
            other = LoadedModel(model=self._load(folder, tokenizer, str(folder)), tokenizer=tokenizer)
        return LoadedModel(model=model, tokenizer=self.tokenizer, originals=originals, retain_only=other)

    def identity(self, cache: ScoreCache) -> dict[str, Any]:
        """What decides the model's output, for the key of a cache entry."""
        return {
            "model": cache.model_hash(self.folder),
            "patch": cache.files_hash([self.run.patch]) if self.patch else None,
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    def retain_only_hash(self, cache: ScoreCache) -> str | None:
        """What decides the output of the retain-only model."""
        return cache.model_hash(self._retain_only[0]) if self._retain_only else None

    def sets(self) -> tuple[EvalSet, ...]:
        """What is measured: the sets of a suite, those of the run, or the named questions and corpora.

        Raises: UsageError if there is nothing; QuestionError, CorpusError, RunFolderError, UnknownNameError.
        """
        if self.suite is not None:
            tokenizer = self.tokenizer if self.chat else None
            found = eval_sets.of_suite(_suite_sets(self.suite, self._suite_folder, tokenizer), self.given)
        elif self.patch is not None:
            found = sets_of_run.of_folder(self.run.path, self.given, self.tokenizer)
        else:
            forget, retain = inputs.read_corpora(self.config, required=False)
            found = eval_sets.with_keywords(
                eval_sets.sets(self.config, forget, retain), self.config, forget, retain, self.tokenizer
            )
        if not any(data.questions or data.texts or data.passages for data in found):
            raise UsageError(
                f"there is nothing to measure {self.name} on.\n"
                "Pass --forget-questions, --retain-questions, --forget or --retain."
            )
        if "holdout" in self.given and not any(data.texts for data in found if data.name == "forget"):
            raise UsageError(
                "--holdout does nothing without texts to forget, which it is compared with.\n"
                "Pass --forget FILE, or leave --holdout out."
            )
        if "keywords" in self.given and not any(data.keywords for data in found):
            raise UsageError(
                "--keywords does nothing without both corpora and questions with choices on a set to keep.\n"
                "Pass --forget, --retain and --retain-questions, or leave --keywords out."
            )
        return found

    def _load(self, folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedModel:
        model = load_model(folder, dtype=self.dtype, device=str(self.device))
        rows = model.config.get_text_config().vocab_size
        # Added tokens are left out: a padding token beyond the embeddings is common and never read.
        if tokenizer.vocab_size > rows:
            raise ModelError(
                f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, and the model knows {rows}: it belongs to "
                "another model.\nCopy the tokenizer files of the base model into its folder."
            )
        return model


def _of_own_data(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that a folder of own data takes the place of, at their defaults."""
    if "data" not in given:
        return {}
    own, default = data_folder.find(given["data"]), RunConfig(model=BUILTIN)
    questions = ("forget_questions", "adjacent_questions", "retain_questions")
    replaced = ["forget"] * bool(own.forget) + ["retain"] * bool(own.retain) + [*questions] * bool(own.questions)
    return {name: getattr(default, name) for name in replaced}


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
