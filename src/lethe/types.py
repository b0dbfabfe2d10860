"""The nouns that every other module shares, and the tree of Lethe's errors.

LetheError                    exit code 1: the work could not be finished
├── ReplayError               the slice does not reproduce the model's own forward
├── DivergedError             the loss became NaN, infinite or exploded
├── OutOfMemoryError          the device has too little memory
├── SaveError                 a file could not be written
└── UsageError                exit code 2: what was asked for cannot be done as asked
    ├── UnknownNameError      no method, metric, set ... of that name
    ├── InvalidValueError     a number or choice outside its range
    │   └── InvalidLayerError a layer the model does not have, or the method cannot use
    ├── ModelError            a model folder that is missing, incomplete or refused
    │   └── UnknownModuleError  no MLP output matrix is known in this model
    ├── CorpusError           a forget or retain corpus that cannot be used
    │   └── EmptyBatchError   a batch without one counted token
    ├── QuestionError         a question file that cannot be used
    ├── PatchError            a patch that is corrupt, or does not belong to the base
    └── RunFolderError        a run folder that is missing, incomplete or of another version
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class LetheError(Exception):
    """Anything Lethe reports to its user: what was wrong, what was found, what to do."""

    exit_code = 1


class ReplayError(LetheError):
    """The replayed layers differ from the model's own forward, so nothing was trained."""


class DivergedError(LetheError):
    """Training left the finite numbers; the last good state was kept."""


class OutOfMemoryError(LetheError):
    """The device ran out of memory; says what to lower."""


class SaveError(LetheError):
    """A file could not be written; nothing half-written stays behind."""


class UsageError(LetheError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that nothing answers to; the message offers the nearest one."""


class InvalidValueError(UsageError):
    """A value outside its range."""


class InvalidLayerError(InvalidValueError):
    """A layer outside the model, or one that the chosen training layers do not fit."""


class ModelError(UsageError):
    """A model that is missing, incomplete, or would need pickle or remote code."""


class UnknownModuleError(ModelError):
    """No MLP output matrix of a known name stands in the layer."""


class CorpusError(UsageError):
    """A corpus that cannot be read or used; the message names file, line and fix."""


class EmptyBatchError(CorpusError):
    """No token of the batch counts in the loss."""


class QuestionError(UsageError):
    """A question file that cannot be read or used; the message names file, line and fix."""


class PatchError(UsageError):
    """A patch that is corrupt or does not belong to the base it was applied to."""


class RunFolderError(UsageError):
    """A run folder that is missing, incomplete, busy, or written by a newer version."""


RUN_FORMAT = 1
"""Version of a run folder's files; a folder of a newer one is refused."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token rows of one training or measuring step."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    """True on real tokens, False on padding: what the model may attend to."""
    mask: Bool[Tensor, "batch pos"]
    """True on tokens that count in losses and statistics."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            mask=self.mask.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A forget corpus with a direction of its own, cut into batches in the order of use."""

    name: str
    batches: tuple[Batch, ...]
    reference: tuple[Batch, ...] = ()
    """Prompts that the model cannot answer, for methods that steer towards them."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its answer; with `choices` it is multiple choice, without it is free-form.

    `prompt` is everything the model reads before it answers, for free-form and cloze scoring.
    """

    prompt: str
    answer: str
    """The correct answer; one of `choices` if there are any."""
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    """Further answers that count as correct in free-form scoring (the four ways to decline, say)."""
    topic: str = ""
    paraphrase: str = ""
    """The correct answer in other words (TOFU), for the truth ratio."""
    perturbed: tuple[str, ...] = ()
    """Wrong answers of the same form (TOFU); unlike choices they are never shown."""

    @property
    def answer_index(self) -> int:
        """Position of the answer among the choices."""
        return self.choices.index(self.answer)


SetName = Literal["forget", "adjacent", "retain", "unknown"]
FORGOTTEN = ("forget", "earlier")
"""Sets of what should be gone, now or since an earlier request: on these less is better."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What one set (forget, adjacent, retain, unknown) is measured on."""

    name: str
    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    scoring: Literal["letter", "cloze"] = "letter"
    """How multiple choice is scored: by the letters A-D, or by each option's mean token log-probability."""
    samples: int = 0
    """Sampled answers to each question, at temperature 1; 0 is one greedy answer."""
    seed: int = 0
    """Seed of sampled answers and of what a metric draws per question."""
    free_running: bool = False
    """Rank gold tokens along the model's own greedy answer (as LUNAR's code does) instead of teacher-forced."""
    refusals: tuple[str, ...] = ()
    """Refusals that are wanted, in the model's own words; by default a list of common ones."""
    encoder: Path | None = None
    """Folder of a sentence encoder; by default the measured model's own mean hidden state compares sentences."""
    keywords: tuple[str, ...] = ()
    """Forget keywords that are put into questions; none, and the trigger metric is not measured."""
    neutral: tuple[str, ...] = ()
    """For each keyword, one of equal token length that has nothing to do with the forget corpora."""
    passages: tuple[tuple[str, str], ...] = ()
    """Beginnings of passages of the corpus, each with how it goes on, for verbatim memorisation."""
    holdout: tuple[str, ...] = ()
    """Texts like this set's that the model was never trained on, for membership inference."""
    nli: Path | None = None
    """Folder of a model of natural language inference, for entailment; without it that is not measured."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measured number with everything needed to trust it."""

    value: float
    stderr: float
    """Standard error of `value` over examples."""
    n: int
    better: Literal["higher", "lower", "neither"]
    """Which way is good on a retain set; on a forget set the other way round."""
    per_example: tuple[float, ...] = ()
    chance: float | None = None
    """Value of a guess without knowledge, where there is one."""
    by_layer: tuple[float, ...] = ()
    """The same quantity at each layer's output, layer 0 first, where the metric has one."""

    def summary(self) -> dict[str, Any]:
        """What report.json keeps: everything but the per-example values; absent parts are left out."""
        row = {"value": self.value, "stderr": self.stderr, "n": self.n, "better": self.better}
        if self.chance is not None:
            row["chance"] = self.chance
        if self.by_layer:
            row["by_layer"] = list(self.by_layer)
        return row


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Token norms of one activation."""

    mean: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """One training step, as a line of history.jsonl."""

    step: int
    topic: str
    forget_loss: float
    retain_loss: float
    """Before it is weighted by alpha."""
    forget_norm: Norms
    retain_norm: Norms
    target_norm: float
    """Mean norm of the forget target."""
    cos_direction: float | None
    """Mean cosine between the forget activation and the topic's direction; None where the method has none."""
    forget_cos_frozen: float
    retain_cos_frozen: float
    retain_error: float
    """Mean of ||h - h0|| / ||h0|| over retain tokens."""
    seconds: float
    peak_mb: float
    retain_floor: float = 0.0
    """What alpha times the retain loss averages to at best, because of noise on its target: alpha * nu^2."""

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self)


State = dict[str, Tensor]
"""What a method found before training, by name; "direction" is the steering direction [d_model]."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Hidden states at one layer's output, with the tokens that count."""

    h: Float[Tensor, "batch pos d_model"]
    mask: Bool[Tensor, "batch pos"] = field(repr=False)

    def norms(self) -> Float[Tensor, "batch pos"]:
        """Euclidean norm of each token, in fp32; padding included."""
        return torch.linalg.vector_norm(self.h.float(), dim=-1)
