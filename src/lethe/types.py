"""The nouns that every other module shares."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

RUN_FORMAT = 2
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


Role = Literal["forget", "keep", "neither"]
"""What an edit should do to what a set asks: make it go, leave it, or neither (what nobody can answer, say)."""


ROLES: Mapping[str, Role] = {"forget": "forget", "adjacent": "keep", "retain": "keep", "unknown": "neither"}
"""The sets of a run, in their order, and what is asked of each."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """What one set (forget, adjacent, retain, unknown) is measured on."""

    name: str
    role: Role
    questions: tuple[Question, ...] = ()
    texts: tuple[str, ...] = ()
    scoring: Literal["letter", "cloze"] = "letter"
    """How multiple choice is scored: by the letters A-D, or by each option's mean token log-probability."""
    passages: tuple[tuple[str, str], ...] = ()
    """Beginnings of passages of the corpus, each with how it goes on, for verbatim memorisation."""
    holdout: tuple[str, ...] = ()
    """Texts like this set's that the model was never trained on, for membership inference."""


Unit = Literal["share", "nats", "bits", "points", ""]
"""What a number counts: a part of a whole (shown in per cent), nats, bits, points of a hundred, or itself."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measured number with everything needed to trust it, and to print it."""

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
    unit: Unit = ""
    label: str = ""
    """How people call the metric; empty where that is its name without underscores."""
    hint: str = ""
    """Which way is which, where that is not whether the model knows more."""
    role: Role | None = None
    """Of the set; None for a number that joins several."""

    def summary(self) -> dict[str, Any]:
        """What report.json keeps: everything but the per-example values; absent parts are left out."""
        row = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, "", ())}
        row.pop("per_example", None)
        if self.by_layer:
            row["by_layer"] = list(self.by_layer)
        return row | {"unit": self.unit}


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """One training step, as a line of history.jsonl."""

    step: int
    topic: str
    forget_loss: float
    retain_loss: float
    """Before it is weighted by alpha."""
    seconds: float
    peak_mb: float
    measures: Mapping[str, float] = field(default_factory=dict)
    """What the method wrote down about the step, by name."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "HistoryRow":
        """A row from a line of history.jsonl, also of Lethe 0.1, which had the measures of steering as fields.

        Raises: KeyError, TypeError, AttributeError if it is something else.
        """
        own = {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}
        if "measures" in values:
            return cls(**own)
        rest = {name: value for name, value in values.items() if name not in own and value is not None}
        for side in ("forget", "retain"):
            norms = rest.pop(f"{side}_norm")
            rest |= {f"{side}_norm_{name}": norm for name, norm in norms.items()}
        return cls(**own, measures=rest)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {**dataclasses.asdict(self), "measures": dict(self.measures)}


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


def last_tokens(batch: Batch) -> torch.Tensor:
    """Index of each row's last real token [batch]."""
    position = torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device)
    return torch.where(batch.attention_mask, position, 0).amax(dim=1)


def mean_scores(
    values: Sequence[float], better: Literal["higher", "lower", "neither"], *, chance: float | None = None
) -> Scores:
    """The mean of one value per example, with its standard error: sample deviation / sqrt(n), 0 for one example."""
    n = len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Scores(
        value=math.fsum(values) / n, stderr=stderr, n=n, better=better, per_example=tuple(values), chance=chance
    )
