"""What analyses share: a base model with its corpora and questions, and edits trained in memory.

Everything is trained in the one model that is loaded, and the untouched weights are put back bit for bit.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lethe.data.questions import subset
from lethe.data.text_corpora import TextCorpora
from lethe.data.tokens import has_bos
from lethe.errors import RunFolderError, UnknownNameError, UsageError
from lethe.evaluation import eval_sets
from lethe.inference.choices import choice_hits
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, text_batch
from lethe.inference.reading import Reading
from lethe.inference.spans import encode_texts
from lethe.methods.protocol import Method
from lethe.methods.rmu import RMU
from lethe.model import hooks
from lethe.model.layers import find_layers
from lethe.model.patch import Patch
from lethe.model.recordings import Recordings, Store
from lethe.model.slice import LayerSlice, Recording
from lethe.model.swap import copies, restore, swapped
from lethe.runs import sets_of_run
from lethe.runs.config import GRADIENT, RunConfig
from lethe.runs.config_file import method_name, read_config, read_run_config
from lethe.runs.defaults import defaults
from lethe.runs.run_folder import RunFolder
from lethe.runs.solve import solve
from lethe.runs.workspace import Workspace
from lethe.solvers.gradient import Gradient
from lethe.solvers.protocol import Log
from lethe.solvers.training_state import Checkpoint
from lethe.system import machine
from lethe.system.progress import Progress
from lethe.types import Batch, EvalSet, HistoryRow, Question

Kind = TypeVar("Kind", bound=Method)


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
        self, config: RunConfig, *, run: Path | None = None, method: Method | None = None,
        progress: Progress | None = None,
    ):  # fmt: skip
        """Load the base whole; of a `run` folder also its edit and its method.

        Raises: ModelError, CorpusError, QuestionError, RunFolderError, PatchError.
        """
        self.config = config
        self.progress = progress or Progress()
        self.method_of_run = method
        self.workspace = Workspace(config.base, share=True)
        self.device, self.tokenizer = self.workspace.device, self.workspace.tokenizer
        reads = method.reads if method is not None else "texts"
        read = self.workspace.corpora(config.data, reads, required=False)
        self.forget, self.retain = read.texts()
        found = (
            eval_sets.sets(config.base.model, config.data, config.evaluation, read)
            if run is None
            else sets_of_run.of_run(config, read, self.tokenizer)
        )
        self.sets: dict[str, EvalSet] = {data.name: data for data in found}
        self.model: PreTrainedModel = self.workspace.model()
        self.base = Variant(label="base")
        self.run: Variant | None = None
        """The edit of the run, if this is the bench of one."""
        if run is not None:
            originals = Patch.load(RunFolder(run).patch).apply_in_memory(self.model)
            weights = copies(self.model, originals)
            restore(self.model, originals)
            self.run = Variant(label="this run", coefficient=math.nan, weights=weights)
        # A run may have been solved in closed form; what analyses train goes step by step.
        start = defaults(RMU, config.base.model, solver=GRADIENT)[1].solver
        self.solver = config.solver if isinstance(config.solver, Gradient) else cast(Gradient, start)
        self._corpora = TextCorpora(forget=self.forget, retain=self.retain, tokenizer=self.tokenizer)
        self._trained: dict[tuple[Method, RunConfig], Variant] = {}
        self._norms: list[float] = []
        self._room = machine.free_bytes(self.device) // 4
        self._recorded: RunConfig | None = None
        self.workspace.recordings = Recordings(store=Store(self._room))

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(find_layers(self.model))

    def forget_batches(self) -> dict[str, list[Batch]]:
        """The first forget texts of each topic, by topic; BOS and padding do not count.

        Raises: UsageError without a forget corpus.
        """
        if not self.forget:
            raise UsageError(f"there is no forget text for {self.config.base.model}.\nPass --forget FILE.")
        subject = LoadedModel(model=self.model, tokenizer=self.tokenizer)
        return {topic: _batches(subject, texts[:TEXTS]) for topic, texts in self.forget.items()}

    def questions(self, name: str, count: int) -> tuple[Question, ...]:
        """At most `count` questions of a set, always the same ones.

        Raises: UsageError if the set has none.
        """
        asked = self.sets[name].questions if name in self.sets else ()
        if not asked:
            raise UsageError(
                f"there are no {name} questions for {self.config.base.model}.\nPass --{name}-questions FILE."
            )
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
            return choice_hits(Reading(subject, asked), questions)

    def method(self, kind: type[Kind], settings: Mapping[str, Any]) -> Kind:
        """A method with the built-in model's own settings, or the alpha of the run, and these on top."""
        start, _ = defaults(kind, self.config.base.model, solver=GRADIENT)
        own = {"alpha": self.method_of_run.alpha} if self.method_of_run is not None else {}
        return dataclasses.replace(cast(Kind, start), **(own | dict(settings)))

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
        self, method: Method, *, layer: int | None = None, seed: int | None = None, at: Sequence[int] = ()
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
            raise UsageError(f"training an edit of {self.config.base.model} needs two corpora.\nPass {missing} FILE.")
        config = self.config.changed(
            layer=self.config.layer if layer is None else layer,
            train_layers=self.config.train_layers if layer is None else (),
            seed=self.config.seed if seed is None else seed,
            on=None,
            withdraw=None,
            solver=self.solver,
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

    def _train(self, method: Method, config: RunConfig, at: Sequence[int]) -> Variant:
        if self._recorded != config and self.workspace.recordings is not None:
            self.workspace.recordings.clear()  # room for the next ones
            self._recorded = config
        log = _Snapshots(at, self.workspace.dtype)
        edit = solve(method, config, self.workspace, self._corpora, log=log, progress=self.progress)
        self.model.requires_grad_(False)
        coefficient = method.steering_coeff if isinstance(method, RMU) else math.nan
        return Variant(
            label=f"c = {coefficient:g}" if isinstance(method, RMU) else method_name(method),
            coefficient=coefficient,
            weights=edit.values,
            history=edit.history,
            directions=log.directions,
            snapshots=log.snapshots,
        )


class _Snapshots(Log):
    """Keeps the weights after some steps, and the directions that the method found."""

    def __init__(self, at: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.every = math.gcd(10, *at)
        self.at, self.dtype = at, dtype
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.directions: dict[str, Tensor] = {}

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step in self.at:
            self.snapshots[checkpoint.step] = {
                name.removesuffix("/master"): value.to(self.dtype).clone()
                for name, value in checkpoint.tensors.items()
                if name.endswith("/master")
            }
        found = {
            topic: state["direction"].clone() for topic, state in checkpoint.states.items() if "direction" in state
        }
        self.directions |= found


def open_bench(target: str, given: Mapping[str, Any], progress: Progress | None = None) -> Bench:
    """The bench of a model, or of a run folder with its settings; `given` changes fields of its RunConfig.

    Raises: ModelError, CorpusError, QuestionError, RunFolderError, PatchError.
    """
    run = RunFolder(Path(target))
    if not run.config.exists():
        if run.path.is_dir() and not (run.path / "config.json").exists():
            raise RunFolderError(f"{target} is neither a run folder nor a model folder.\nName one of the two.")
        return Bench(defaults(RMU, target, solver=GRADIENT)[1].changed(**given), progress=progress)
    run.require_patch()
    try:
        method, _ = read_config(run.config)
    except UnknownNameError:
        method = None  # anybody's own method: its edit can be measured all the same
    config = read_run_config(run.config).changed(**given)
    return Bench(config, run=run.path, method=method, progress=progress)


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
