"""RunConfig: the one place of each setting's name, type, default, meaning and source; and its config.yaml."""

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

from lethe.data.settings import Counted, Positions
from lethe.errors import InvalidLayerError, InvalidValueError
from lethe.suites.world.settings import BUILTIN


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run but its method. Defaults are the published settings for 7B models."""

    model: str
    """`builtin` (the shipped small model), a Hugging Face folder, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    forget: tuple[str, ...] = (BUILTIN,)
    """Forget corpora, one topic each: .jsonl, .json, .txt (paragraphs), a dataset folder or a hub dataset id. A method
    that reads prompts takes .jsonl or .json with question (and answer), or a line of .txt each. Of the built-in world
    one topic alone is `builtin:pathogens` or `builtin:exploits`."""
    retain: str = BUILTIN
    """Retain corpus, in the same formats."""
    data: Path | None = None
    """Folder with forget.jsonl (or forget/*.jsonl, one topic each), retain.jsonl and questions.jsonl: they stand where
    the corpora and questions are not named otherwise."""
    reference: str = BUILTIN
    """Prompts that the model cannot answer, for methods that steer towards refusing; by default questions about things
    that do not exist."""
    positions: Positions = "last"
    """Tokens of a forget prompt that are steered: its last one, those from the first that sets it apart from every
    retain prompt, or all (published). Of a retain prompt then count: its last token and its answer; all but BOS; or all
    but BOS, without the answer. Only methods that read prompts have them."""
    on: Path | None = None
    """Run folder of an earlier request on the same model: this one is added to it."""
    withdraw: str | None = None
    """Name of a request in `on` that is taken back instead of adding one (ridge only); a request is named by its run
    folder."""
    text_field: str = "text"
    """Field of a .jsonl row that holds the text."""
    layer: int = 7
    """Layer l, counted from 0, at whose output activations are steered; on the command line `auto` takes the one that
    `lethe advise` proposes."""
    train_layers: tuple[int, ...] = ()
    """Layers whose matrices are trained; by default l-2, l-1 and l (those that exist), or l alone if the solver is not
    gradient."""
    layers_from: Path | None = None
    """Result of `lethe layers`: its chosen layers take the place of `layer` and `train_layers` on the command line, and
    the report shows it."""
    train_modules: tuple[str, ...] = ()
    """Matrices to train in each of these layers, `mlp.down_proj`; by default the MLP output matrices."""
    solver: Literal["gradient", "ridge", "pooled"] = "gradient"
    """How the matrices are found: AdamW on the activations at `layer`; in closed form, for one matrix per layer; or
    AdamW on that matrix's pooled inputs and outputs, as LUNAR's code does."""
    lam: float | None = None
    """Ridge: weight of the distance to the untouched matrix, as a multiple of the mean diagonal of the normal
    equations' matrix; by default the best of several on held-out rows."""
    keep_sums: bool = True
    """Ridge: keep the sums that the solution is made of, so that requests can be added and withdrawn later; without,
    methods that add one vector are solved by conjugate gradients, without a square matrix."""
    steps: int = 150
    """Optimizer steps over all topics together."""
    batch_size: int = 4
    """Rows in a forget batch and in a retain batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    epochs: int = 1
    """How often a corpus may be repeated to fill the steps."""
    max_length: tuple[int, ...] = (512,)
    """Tokens of a row: one number for all corpora, or one for each topic and a last one for the retain corpus."""
    chunk: bool = False
    """Cut longer rows into several instead of dropping their tails."""
    count: Counted = "no-bos"
    """Tokens that count in losses and norms: all real ones but BOS, whose norm is several times that of others; all
    real ones; or padding, too (as published)."""
    lr: float = 5e-5
    """Learning rate of AdamW, constant."""
    seed: int = 0
    """Seed of directions and of the order of rows."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; auto takes cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights while training and measuring; auto is the checkpoint's (on a CPU fp32 for fp16)."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    as_published: bool = False
    """Repeat the authors' code with every quirk: padding counts in both losses and is on the left, rows in the corpus's
    order, the same retain rows for each topic, 512 tokens for the first topic and the retain corpus and 768 for others,
    raw JSON lines as text, norm of the first batch, no fp32 masters."""
    allow_overlap: bool = False
    """Go on although rows of a forget corpus also stand in the retain corpus."""
    evaluate: Literal["all", "none"] = "all"
    """Measure before and after with the whole model in memory, or not at all."""
    forget_questions: Path | None = None
    """Questions on what should be forgotten: .jsonl, .json or .csv with question, choices (optional) and answer."""
    adjacent_questions: Path | None = None
    """Questions close to the forget topics that should still be answered."""
    retain_questions: Path | None = None
    """Questions that should still be answered."""
    scoring: Literal["letter", "cloze"] = "letter"
    """Multiple choice by the letters A-D (lm-evaluation-harness), or by each option's mean token log-probability."""
    split: Literal["dev", "test", "all"] = "test"
    """Half of the built-in questions: choose settings on dev, report on test."""
    limit: int | None = None
    """At most this many questions of each set, drawn with a fixed seed."""
    refusals: Path | None = None
    """Wanted refusals, one a line: answers like these count as refusals, and refusal quality is nearness to them."""
    encoder: Path | None = None
    """Folder of a sentence encoder for refusal quality; by default the measured model's own mean hidden state."""
    samples: int = 0
    """Sampled answers to each question, at temperature 1, for the metrics of answers; 0 measures the greedy answer."""
    free_running: bool = False
    """Rank gold tokens along the model's own answer, as LUNAR's code does, instead of teacher-forced."""
    keywords: tuple[str, ...] = ()
    """Forget keywords that the trigger metric puts into questions; by default found in the forget corpora."""
    holdout: Path | None = None
    """Texts like the forget corpora that the model was never trained on, for membership attacks; formats as of
    `forget`."""
    nli: Path | None = None
    """Folder of a model of natural language inference, for entailment; without it that is not measured."""
    show_forget: bool = False
    """Write answers to forget questions into the report; without it no text of the forget set is written anywhere."""
    out: Path = Path("runs/latest")
    """Run folder."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if get_origin(field.type) is Literal and (value := getattr(self, field.name)) not in get_args(field.type):
                choices = ", ".join(get_args(field.type))
                raise InvalidValueError(f"'{field.name}' must be one of {choices}. Got {value}.")
        for name in ("steps", "batch_size", "accumulate", "epochs"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"'{name}' must be at least 1. Got {getattr(self, name)}.")
        if self.limit is not None and self.limit < 1:
            raise InvalidValueError(f"'limit' must be at least 1. Got {self.limit}.")
        if self.samples < 0:
            raise InvalidValueError(f"'samples' must be 0 or more. Got {self.samples}.")
        if self.lam is not None and not (self.lam >= 0 and math.isfinite(self.lam)):
            raise InvalidValueError(f"'lam' must be a number of 0 or more. Got {self.lam}.")
        if self.withdraw is not None and (self.on is None or self.solver != "ridge"):
            raise InvalidValueError("'withdraw' needs --on RUN and --solver ridge: it takes a request out of that run.")
        if self.threads is not None and self.threads < 1:
            raise InvalidValueError(f"'threads' must be at least 1. Got {self.threads}.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidValueError(f"'lr' must be a positive number. Got {self.lr}.")
        if not 0 <= self.seed < 2**63:
            raise InvalidValueError(f"'seed' must be in [0, 2^63). Got {self.seed}.")
        if not self.forget:
            raise InvalidValueError("'forget' must name at least one corpus.")
        if self.layer < 0:
            raise InvalidLayerError(f"'layer' must be 0 or more. Got {self.layer}.")
        outside = [layer for layer in self.train_layers if not 0 <= layer <= self.layer]
        if outside:
            raise InvalidLayerError(
                f"'train_layers' must lie in [0, {self.layer}]: a layer after --layer {self.layer} cannot change its "
                f"output. Got {', '.join(map(str, outside))}."
            )
        if any(length < 2 for length in self.max_length) or not self.max_length:
            raise InvalidValueError(f"'max_length' must be 2 or more. Got {' '.join(map(str, self.max_length))}.")

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """`train_layers`; by default `layer` alone for solvers of one matrix, else l-2, l-1, l as far as these exist.

        The gradient solver moves all of them for one target at `layer`; the others solve each layer for a target of
        its own at its own output.
        """
        if self.solver != "gradient" and not self.train_layers:
            return (self.layer,)
        return tuple(sorted(set(self.train_layers))) or tuple(range(max(0, self.layer - 2), self.layer + 1))

    def resolved(self, topics: int) -> "RunConfig":
        """The same run with `max_length` written out for each topic and the retain corpus.

        Raises: InvalidValueError if their number does not fit the topics.
        """
        if self.as_published:
            return replace(self, count="all-tokens", max_length=(512, *[768] * (topics - 1), 512))
        lengths = self.max_length * (topics + 1) if len(self.max_length) == 1 else self.max_length
        if len(lengths) != topics + 1:
            raise InvalidValueError(
                f"'max_length' needs one number, or {topics + 1} for {topics} topic{'s' * (topics > 1)} and the retain "
                f"corpus. Got {len(lengths)}."
            )
        return replace(self, max_length=lengths)


def of_corpora(config: RunConfig) -> RunConfig:
    """The same for all runs that read the same rows of the same corpora in the same order."""
    return replace(
        config,
        **{"layer": 0, "train_layers": (), "layers_from": None, "train_modules": (), "lr": 1.0},
        **{"lam": None, "keep_sums": True, "on": None, "withdraw": None, "evaluate": "all", "out": Path()},
    )
