"""Workspace: what settings name (model, tokenizer, corpora, sets), opened once for one run or a thousand."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.data.batches import Corpora, Schedule
from lethe.data.prompt_corpora import PromptCorpora
from lethe.data.settings import DataSettings
from lethe.errors import InvalidLayerError
from lethe.evaluation.eval_sets import metric_settings, wanted
from lethe.evaluation.measure import Measured, Metrics, check_refusals, metrics_of
from lethe.evaluation.settings import EvalSettings
from lethe.inference.loaded_model import LoadedModel
from lethe.model.checkpoint_files import checkpoint_files, count_layers, model_folder, read_tensor
from lethe.model.hidden_cache import HiddenCache
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model, load_tokenizer, skeleton
from lethe.model.patch import Patch
from lethe.model.recordings import Recordings
from lethe.model.settings import ModelSettings
from lethe.model.slice import LayerSlice
from lethe.model.token_view import TokenView
from lethe.model.trainable import Everything, LowRank, Matrices, Trainable
from lethe.model.view import View
from lethe.runs import inputs, sets_of_run
from lethe.runs.config import RunConfig
from lethe.system.last import Last
from lethe.system.machine import find_device
from lethe.types import Batch, EvalSet, Topic

Rows = tuple[tuple[Topic, ...], tuple[Batch, ...]]


class Workspace:
    """The base model with its tokenizer, device and number type, and what runs on it read.

    A run alone loads the layers that it asks for. With `share` all runs have one model, of `depth` layers (None: all),
    which each must leave as it found it, and what one of them read serves the next.

    Raises: ModelError.
    """

    def __init__(self, base: ModelSettings, *, share: bool = False, depth: int | None = None):
        self.base = base
        self.source = inputs.model_source(base.model)
        self.device = find_device(base.device)
        self.is_shared = share
        self.recordings: Recordings | None = None
        """Of a shared model, where they are kept."""
        self.hidden: HiddenCache | None = None
        """Of a shared model, hidden states below the edited layers of what is measured."""
        self.memo: defaultdict[str, Last[Any]] = defaultdict(Last)
        """For solvers: see `Work`."""
        self.before: Last[Measured] = Last()
        """Scores of the base."""
        self._depth = depth
        self._model: Last[PreTrainedModel] = Last()
        self._corpora: Last[Corpora] = Last()
        self._sets: Last[tuple[EvalSet, ...]] = Last()
        self._metrics: Last[Metrics] = Last()
        self._schedule: Last[Schedule] = Last()
        self._rows: Last[Rows] = Last()
        self._refusals: Last[float] = Last()

    @cached_property
    def folder(self) -> Path:
        """The base model's files."""
        return model_folder(self.source, self.base.revision)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number type to compute in; `auto` is the checkpoint's own, but fp32 instead of fp16 on a CPU."""
        if self.base.dtype != "auto":
            return getattr(torch, self.base.dtype)
        files = checkpoint_files(self.folder)
        # The norms and embeddings of a checkpoint are floating-point; buffers such as masks need not be.
        stored = next(t.dtype for t in (read_tensor(files, name) for name in sorted(files)) if t.is_floating_point())
        return torch.float32 if stored == torch.float16 and self.device.type == "cpu" else stored

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(self.source, self.base.revision)

    @cached_property
    def depth(self) -> int:
        """Number of decoder layers, read from the config alone."""
        return count_layers(self.source, self.base.revision)

    def check_layer(self, layer: int) -> None:
        """Raises: InvalidLayerError if the model does not have the layer."""
        if layer >= self.depth:
            raise InvalidLayerError(
                f"'layer' must be in [0, {self.depth - 1}] for {self.base.model}, which has {self.depth} layers. "
                f"Got {layer}."
            )

    def skeleton(self, layers: int | None = None) -> PreTrainedModel:
        """The first layers, or all, without weights."""
        return skeleton(self.source, layers=layers, revision=self.base.revision)

    def model(self, layers: int | None = None) -> PreTrainedModel:
        """The untouched model: its first layers, or all of it; where it is shared, the one there is.

        Raises: ModelError.
        """
        return self._model("", lambda: self._load(self._depth)) if self.is_shared else self._load(layers)

    def slice(self, config: RunConfig, patch: Patch | None = None) -> LayerSlice:
        """The layers up to l, with the matrices of the trained layers free to move from where the patch puts them.

        Raises: ModelError, InvalidLayerError, UnknownModuleError, PatchError.
        """
        self.check_layer(config.layer)
        # A model that others share stays untouched: what a patch changes is one of its own.
        model = self.model(config.layer + 1) if patch is None else self._load(config.layer + 1)
        if patch is not None:
            patch.below(config.layer).apply_in_memory(model)
        start, stop, moving = config.trained_layers[0], config.layer + 1, trainable(config, model)
        if self.recordings is None or patch is not None or not isinstance(moving, Matrices):
            return LayerSlice(model, start, stop, moving)
        return self.recordings.cut(model, start, stop, moving.names)

    def view(
        self, config: RunConfig, kind: Literal["activations", "tokens"], patch: Patch | None = None
    ) -> View[Any, Any]:
        """What a method sees of the model, with what the settings name free to move from where the patch puts it.

        Raises: as `slice`; UsageError for a steering method that would train everything.
        """
        if kind == "activations":
            return self.slice(config, patch)
        self.check_layer(config.layer)
        model = self.model() if patch is None else self._load(None)
        if patch is not None:
            patch.apply_in_memory(model)
        return TokenView(model, trainable(config, model))

    def layers(self, config: RunConfig) -> tuple[LayerSlice, ...]:
        """For each trained layer, the slice of it alone, for solvers that give each layer a target of its own."""
        self.check_layer(config.layer)
        model = self.model(config.layer + 1)
        return tuple(
            LayerSlice(model, layer, layer + 1, trainable_names(model, layer, config.train_modules))
            for layer in config.trained_layers
        )

    def corpora(self, data: DataSettings, reads: str, *, required: bool = True) -> Corpora:
        """The corpora in the form that a method reads.

        Raises: CorpusError.
        """
        return self._corpora(
            (data, reads, required),
            lambda: inputs.read(data, reads, self.base.model, self.tokenizer, required=required),
        )

    def schedule(self, config: RunConfig, corpora: Corpora, steps: int, accumulate: int) -> Schedule:
        """The batches of so many steps.

        Raises: CorpusError.
        """
        return self._schedule(
            (config.data, config.batching, config.seed, steps, accumulate, corpora.reads),
            lambda: self._new_schedule(config, corpora, steps, accumulate),
        )

    def rows(self, config: RunConfig, corpora: Corpora) -> Rows:
        """Every row of the corpora once: topics with their forget batches, and retain batches.

        Raises: CorpusError, EmptyBatchError.
        """
        rng = torch.Generator().manual_seed(config.seed)
        return self._rows(
            (config.data, config.batching, config.seed, corpora.reads), lambda: corpora.topics(config.batching, rng)
        )

    def sets(self, config: RunConfig, corpora: Corpora) -> tuple[EvalSet, ...]:
        """What a run is measured on.

        Raises: QuestionError, CorpusError, RunFolderError.
        """
        return self._sets(
            (config.data, config.evaluation, config.on, corpora.reads),
            lambda: sets_of_run.of_run(config, corpora, self.tokenizer),
        )

    def metrics(self, config: RunConfig, corpora: Corpora, sets: Sequence[EvalSet]) -> Metrics:
        """The metrics that a run names, or all, with what its settings and corpora say of them.

        Raises: UnknownNameError, CorpusError.
        """

        def make() -> Metrics:
            settings = metric_settings(self.base.model, config.evaluation, sets, *corpora.texts(), self.tokenizer)
            return metrics_of(config.evaluation.metrics, **settings)

        return self._metrics((config.data, config.evaluation, corpora.reads), make)

    def refusal_rate(self, corpora: PromptCorpora, evaluation: EvalSettings) -> float:
        """Share of reference prompts that the untouched model refuses.

        Raises: UsageError if it hardly ever does: then there is no direction to refusing.
        """

        def ask() -> float:
            whole = LoadedModel(model=self.model(), tokenizer=self.tokenizer)
            return check_refusals(whole, corpora.prompts.reference, wanted(self.base.model, evaluation.refusals))

        return self._refusals((corpora, evaluation.refusals), ask)

    @contextlib.contextmanager
    def reading(self, model: PreTrainedModel, first: int | None) -> Iterator[None]:
        """While metrics read a model whose layers below `first` are untouched, or all of them."""
        with contextlib.nullcontext() if self.hidden is None else self.hidden.reading(model, first):
            yield

    def clear(self) -> None:
        """Give up what takes memory or disk."""
        remembered: Sequence[Last[Any]] = [
            *self.memo.values(), self.before, self._model, self._corpora, self._sets, self._schedule, self._rows,
            self._refusals,
            self._metrics,
        ]  # fmt: skip
        for part in (*remembered, self.recordings, self.hidden):
            if part is not None:
                part.clear()

    def _load(self, layers: int | None) -> PreTrainedModel:
        source, revision = self.source, self.base.revision
        return load_model(source, layers=layers, dtype=self.dtype, device=str(self.device), revision=revision)

    def _new_schedule(self, config: RunConfig, corpora: Corpora, steps: int, accumulate: int) -> Schedule:
        if self.recordings is not None:
            self.recordings.clear()  # they are of other batches
        rng = torch.Generator().manual_seed(config.seed)
        return corpora.schedule(config.batching, rng, steps=steps, accumulate=accumulate)


def trainable(config: RunConfig, model: PreTrainedModel) -> Trainable:
    """What the settings say moves.

    Raises: UnknownModuleError.
    """
    if config.train == "everything":
        return Everything()
    names = sum((trainable_names(model, layer, config.train_modules) for layer in config.trained_layers), ())
    if config.train == "lora":
        return LowRank(names=names, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    return Matrices(names)
