"""What analyses share: a base model with its corpora and questions, and edits trained in memory.

Everything is trained in the one model that is loaded, and the untouched weights are put back bit for bit.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.data.batches import Schedule
from lethe.data.questions import subset
from lethe.data.tokens import has_bos
from lethe.errors import RunFolderError, UnknownNameError, UsageError
from lethe.evaluation import eval_sets
from lethe.inference.choices import choice_hits
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, text_batch
from lethe.inference.spans import encode_texts
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.model import hooks
from lethe.model.layers import find_layers, trainable_names
from lethe.model.loading import load_model, load_tokenizer
from lethe.model.patch import Patch
from lethe.model.recordings import Recordings, Store
from lethe.model.slice import LayerSlice, Recording
from lethe.model.swap import copies, restore, swapped
from lethe.runs import config_file as configs
from lethe.runs import inputs, sets_of_run
from lethe.runs.config import RunConfig
from lethe.runs.run_folder import RunFolder
from lethe.solvers.gradient import Gradient
from lethe.solvers.training_state import Checkpoint
from lethe.suites.world.settings import BUILTIN, OF_METHODS, ON_BUILTIN
from lethe.system import machine
from lethe.system.plugins import kebab
from lethe.system.progress import Progress
from lethe.types import Batch, EvalSet, HistoryRow, Question

Kind = TypeVar("Kind", bound=SteeringMethod)


TEXTS = 64
"""Most forget texts of each topic that an analysis reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """New values of a few weights of the base; of none for the base itself."""

    label: str
    """As legends name it: `base`, `c = 160`, `this run`."""
    coefficient: float = 0.0
    """Length c of the forget target; 0 for the base, NaN where the edit has none."""
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    history: tuple[HistoryRow, ...] = field(default=(), repr=False)
    directions: Mapping[str, Float[Tensor, "d_model"]] = field(default_factory=dict, repr=False)
    """By topic."""
    snapshots: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    """Weights after so many steps, where they were asked for."""

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        kept = [self.weights, *self.snapshots.values()]
        return sum(t.numel() * t.element_size() for weights in kept for t in weights.values())


class Bench:
    """A base model with its corpora and questions, and the edited model of a run if there is one."""

    def __init__(
        self, config: RunConfig, *, run: Path | None = None, method: SteeringMethod | None = None,
        changes: Mapping[str, Any] | None = None, progress: Progress | None = None,
    ):  # fmt: skip
        """Load the base whole; of a `run` folder also its edit, its method, and its questions with some `changes`.

        Raises: ModelError, CorpusError, QuestionError, RunFolderError, PatchError.
        """
        self.config = config
        self.progress = progress or Progress()
        self.method_of_run = method
        self.device = machine.find_device(config.device)
        source = inputs.model_source(config.model)
        dtype = inputs.find_dtype(config.dtype, source, config.revision, self.device)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(source, config.revision)
        if method is not None and method.reads == "prompts":
            self.forget, self.retain = inputs.read_prompts(config, self.tokenizer).texts()
        else:
            self.forget, self.retain = inputs.read_corpora(config, required=False)
        found = (
            eval_sets.sets(config, self.forget, self.retain)
            if run is None
            else sets_of_run.of_folder(run, changes or {}, self.tokenizer)
        )
        self.sets: dict[str, EvalSet] = {data.name: data for data in found}
        self.model: PreTrainedModel = load_model(source, dtype=dtype, device=str(self.device), revision=config.revision)
        self.base = Variant(label="base")
        self.run: Variant | None = None
        """The edit of the run, if this is the bench of one."""
        if run is not None:
            originals = Patch.load(RunFolder(run).patch).apply_in_memory(self.model)
            weights = copies(self.model, originals)
            restore(self.model, originals)
            self.run = Variant(label="this run", coefficient=math.nan, weights=weights)
        self._trained: dict[tuple[SteeringMethod, RunConfig], Variant] = {}
        self._norms: list[float] = []
        self._room = machine.free_bytes(self.device) // 4
        self._recordings = Recordings(store=Store(self._room))
        self._slice: tuple[RunConfig, LayerSlice, Schedule] | None = None

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(find_layers(self.model))

    def forget_batches(self) -> dict[str, list[Batch]]:
        """The first forget texts of each topic, by topic; BOS and padding do not count.

        Raises: UsageError without a forget corpus.
        """
        if not self.forget:
            raise UsageError(f"there is no forget text for {self.config.model}.\nPass --forget FILE.")
        subject = LoadedModel(model=self.model, tokenizer=self.tokenizer)
        return {topic: _batches(subject, texts[:TEXTS]) for topic, texts in self.forget.items()}

    def questions(self, name: str, count: int) -> tuple[Question, ...]:
        """At most `count` questions of a set, always the same ones.

        Raises: UsageError if the set has none.
        """
        asked = self.sets[name].questions if name in self.sets else ()
        if not asked:
            raise UsageError(f"there are no {name} questions for {self.config.model}.\nPass --{name}-questions FILE.")
        return subset(asked, count, 0)

    def asked(self, name: str, count: int) -> EvalSet:
        """The set with at most `count` of its questions, and without its texts.

        Raises: UsageError if it has none.
        """
        return dataclasses.replace(self.sets[name], questions=self.questions(name, count), texts=())

    def hits(self, weights: Mapping[str, Tensor], asked: EvalSet) -> list[float]:
        """For each question with choices 1.0 if the edited model chooses the right one, else 0.0.

        Raises: UsageError if no question has choices.
        """
        questions = [question for question in asked.questions if question.choices]
        if not questions:
            raise UsageError(
                f"the {asked.name} questions have no choices, so there is no accuracy.\n"
                f"Pass --{asked.name}-questions with multiple-choice questions."
            )
        with self.applied(weights) as subject:
            return choice_hits(subject, questions, asked.scoring)

    def method(self, kind: type[Kind], settings: Mapping[str, Any]) -> Kind:
        """A method with the built-in model's own settings, or the alpha of the run, and these on top."""
        own: dict[str, Any] = dict(OF_METHODS.get(kebab(kind.__name__), {})) if self.config.model == BUILTIN else {}
        if self.method_of_run is not None:
            own["alpha"] = self.method_of_run.alpha
        return kind(**(own | dict(settings)))

    def rmu(self, coefficient: float) -> RMU:
        """RMU with c of this length."""
        return self.method(RMU, {"steering_coeff": coefficient})

    def norms(self) -> list[float]:
        """Median norm of forget tokens of the base at each layer's output, BOS left out.

        Raises: UsageError without a forget corpus.
        """
        if self._norms:
            return self._norms
        by_layer: list[list[Tensor]] = [[] for _ in range(self.depth)]
        layers = self.layers()
        for batch in (batch for part in self.forget_batches().values() for batch in part):
            outputs = walk(layers, layers.record(batch))
            for found, h in zip(by_layer, outputs, strict=True):
                found.append(torch.linalg.vector_norm(h.float(), dim=-1)[batch.mask.to(h.device)].cpu())
        self._norms = [float(torch.cat(found).median()) for found in by_layer]
        return self._norms

    def coefficients(self, multiples: Sequence[float], layer: int | None = None) -> list[float]:
        """These multiples of the median forget norm at a layer (the config's), to three digits."""
        norm = self.norms()[self.config.layer if layer is None else layer]
        return [float(f"{multiple * norm:.3g}") for multiple in multiples]

    def variants(self, multiples: Sequence[float]) -> list[Variant]:
        """The base and what it is compared with: the run, or else RMU with c at multiples of the forget norm.

        Raises: UsageError if it takes training and a corpus is missing.
        """
        if self.run is not None:
            return [self.base, self.run]
        return [self.base, *(self.train(self.rmu(c)) for c in self.coefficients(multiples))]

    def layers(self, start: int = 0, stop: int | None = None) -> LayerSlice:
        """Layers [start, stop) of the model as it is now, nothing in them to be trained."""
        return LayerSlice(self.model, start, stop or self.depth, ())

    def train(
        self, method: SteeringMethod, *, layer: int | None = None, seed: int | None = None, at: Sequence[int] = ()
    ) -> Variant:
        """The edit that a run with these changes would make; `at` names steps whose weights are wanted as well.

        The weights are equal to those of `lethe unlearn`. Recordings serve all methods and coefficients of one layer
        and seed; edits are kept and not made twice.

        Raises: UsageError if a corpus is missing, InvalidLayerError, ReplayError, DivergedError.
        """
        if not self.forget or not self.retain:
            missing = " and ".join(
                flag for flag, texts in (("--forget", self.forget), ("--retain", self.retain)) if not texts
            )
            raise UsageError(f"training an edit of {self.config.model} needs two corpora.\nPass {missing} FILE.")
        config = dataclasses.replace(
            self.config,
            layer=self.config.layer if layer is None else layer,
            train_layers=self.config.train_layers if layer is None else (),
            seed=self.config.seed if seed is None else seed,
            solver="gradient",
            on=None,
            withdraw=None,
        )
        known = self._trained.get((method, config))
        if known is not None and set(at) <= set(known.snapshots):
            return known
        edit = self._train(method, config, at)
        if edit.nbytes <= self._room:
            self._room -= edit.nbytes
            self._trained[method, config] = edit
        return edit

    @contextlib.contextmanager
    def applied(self, weights: Mapping[str, Tensor]) -> Iterator[LoadedModel]:
        """The edited model for as long as the context lasts; the base is put back on exit, bit for bit."""
        with swapped(self.model, weights) as originals:
            yield LoadedModel(model=self.model, tokenizer=self.tokenizer, originals=originals)

    def _train(self, method: SteeringMethod, config: RunConfig, at: Sequence[int]) -> Variant:
        if self._slice is None or self._slice[0] != config:
            self._recordings.clear()  # room for the next ones
            inputs.check_layer(config)
            plan = inputs.training_schedule(config, self.forget, self.retain, self.tokenizer)
            names = [trainable_names(self.model, k, config.train_modules) for k in config.trained_layers]
            layers = self._recordings.cut(self.model, config.trained_layers[0], config.layer + 1, sum(names, ()))
            layers.check(plan.at(0)[1])
            self._slice = (config, layers, plan)
        _, layers, plan = self._slice
        history: list[HistoryRow] = []
        snapshots: dict[int, dict[str, Tensor]] = {}
        directions: dict[str, Tensor] = {}

        def on_row(row: HistoryRow) -> None:
            history.append(row)
            self.progress.advance(f"layer {config.layer}, seed {config.seed}")

        def on_checkpoint(checkpoint: Checkpoint) -> None:
            if checkpoint.step in at:
                snapshots[checkpoint.step] = layers.delta()
            directions.update({t: s["direction"].clone() for t, s in checkpoint.states.items() if "direction" in s})

        self.progress.phase(f"train {configs.method_name(method)}", plan.steps)
        solver = Gradient(lr=config.lr, accumulate=config.accumulate, fp32_masters=not config.as_published)
        for parameter in layers.trained.values():
            parameter.requires_grad_(True)
        try:
            solver.solve(
                layers,
                configs.as_run(method, config),
                plan,
                torch.Generator().manual_seed(config.seed),
                on_row=on_row,
                on_checkpoint=on_checkpoint,
                checkpoint_every=math.gcd(10, *at),
            )
            weights = layers.delta()
        finally:
            restore(self.model, layers.originals)
            for parameter in layers.trained.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        coefficient = method.steering_coeff if isinstance(method, RMU) else math.nan
        return Variant(
            label=f"c = {coefficient:g}" if isinstance(method, RMU) else configs.method_name(method),
            coefficient=coefficient,
            weights=weights,
            history=tuple(history),
            directions=directions,
            snapshots=snapshots,
        )


def open_bench(target: str, given: Mapping[str, Any], progress: Progress | None = None) -> Bench:
    """The bench of a model, or of a run folder with its settings; `given` changes fields of its RunConfig.

    Raises: ModelError, CorpusError, QuestionError, RunFolderError, PatchError.
    """
    run = RunFolder(Path(target))
    if not run.config.exists():
        if run.path.is_dir() and not (run.path / "config.json").exists():
            raise RunFolderError(f"{target} is neither a run folder nor a model folder.\nName one of the two.")
        settings = {**(ON_BUILTIN if target == BUILTIN else {}), **given}
        return Bench(RunConfig(model=target, **settings), progress=progress)
    run.require_patch()
    try:
        method, _ = configs.read_config(run.config)
    except UnknownNameError:
        method = None  # anybody's own method: its edit can be measured all the same
    config = dataclasses.replace(configs.read_run_config(run.config), **given)
    return Bench(config, run=run.path, method=method, changes=given, progress=progress)


def walk(
    layers: LayerSlice,
    recording: Recording,
    hidden: Float[Tensor, "batch pos d_model"] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The outputs of layers [start, stop) of the slice, counted from its first, without gradient.

    `hidden` enters the first of them; by default it is what was recorded, and `start` is 0.
    """
    h = recording.hidden if hidden is None else hidden
    outputs = []
    with torch.no_grad():
        for layer, (args, kwargs) in list(zip(layers.layers, recording.calls, strict=True))[start:stop]:
            h = hooks.hidden_of(layer(h, *args, **kwargs))
            outputs.append(h)
    return outputs


def spread_layers(depth: int, count: int) -> tuple[int, ...]:
    """So many layers, evenly spread from the third (the first that has two before it to train) to the last."""
    first, last = min(2, depth - 1), depth - 1
    return tuple(sorted({round(first + (last - first) * part / max(1, count - 1)) for part in range(count)}))


def _batches(subject: LoadedModel, texts: Sequence[str]) -> list[Batch]:
    rows = [row for row in encode_texts(subject, texts) if len(row) > has_bos(subject.tokenizer, row)]
    return [text_batch(subject, part) for part in batches(rows, TOKENS_PER_BATCH)]
