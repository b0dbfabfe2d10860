"""Which layer to redirect: steer each one by a hook, let the model answer, and see whether it declines as wanted."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lethe.data.prompts import Prompts
from lethe.data.refusals import UNWANTED, WANTED, is_refusal
from lethe.data.tokens import encode, pad
from lethe.errors import InvalidValueError, RunFolderError
from lethe.evaluation import eval_sets
from lethe.evaluation.measure import check_refusals
from lethe.inference.embedding import SentenceEncoder, embedder
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import batches, measuring
from lethe.model import hooks
from lethe.model.layers import d_model, device_of, find_layers
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.runs.workspace import Workspace
from lethe.system.atomic_files import read_number, write_json
from lethe.system.machine import threads
from lethe.system.progress import Progress
from lethe.types import Batch, Question

ASKED = 32
"""Forget prompts that are answered at each layer."""


NEW_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """What steering at one layer's output does."""

    layer: int
    wanted: float
    """Mean over answers of the highest cosine to a wanted refusal (s1)."""
    unwanted: float
    """Mean over answers of the highest cosine to an unwanted one: unethical, illegal (s2)."""
    refusal_rate: float
    """Share of answers that decline."""
    length: float
    """Norm of the direction, before the coefficient."""


@dataclass(frozen=True, kw_only=True)
class LayerSearch:
    """Every layer's scores, and the chosen layers: the smallest of those with the highest score, best first."""

    coefficient: float
    layers: tuple[LayerScore, ...]
    chosen: tuple[int, ...]

    def save(self, path: Path) -> Path:
        """Write as JSON."""
        return write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "LayerSearch":
        """Read what `save` wrote.

        Raises: RunFolderError if it is missing or something else.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            scores = tuple(
                LayerScore(layer=row.pop("layer"), **{name: read_number(value) for name, value in row.items()})
                for row in found["layers"]
            )
            return cls(coefficient=found["coefficient"], layers=scores, chosen=tuple(found["chosen"]))
        except (OSError, AttributeError, ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"{path} is no layer search.\nMake one: lethe layers MODEL --out {path}") from error


def search(
    subject: LoadedModel,
    asked: Prompts,
    *,
    coefficient: float = 2.0,
    top: int = 1,
    wanted: Sequence[str] = (),
    encoder: Path | None = None,
    progress: Progress | None = None,
) -> LayerSearch:
    """Add coefficient * (mean of reference - mean of forget prompts) at each layer in turn, at the prompt's last token.

    A layer's score is s1 - s2 times its refusal rate: nearness in meaning alone cannot tell a refusal from a gibberish
    that resembles one. The published rule, s1 - s2 with an unknown encoder and threshold, is in the table as well.

    Raises: InvalidValueError for a number of layers that the model does not have.
    """
    layers = find_layers(subject.model)
    if not 1 <= top <= len(layers):
        raise InvalidValueError(f"'top' must be in [1, {len(layers)}] for this model. Got {top}.")
    forget = [question for found in asked.forget.values() for question in found]
    difference = _mean_last(subject, asked.reference) - _mean_last(subject, forget)
    step = max(1, len(forget) // ASKED)
    prompts = [question.prompt for question in forget[::step][:ASKED]]
    embed = embedder(subject, SentenceEncoder(encoder) if encoder else None)
    sides = [embed(texts) for texts in (wanted or WANTED, UNWANTED)]
    if progress:
        progress.phase("search layers", len(layers))
    scores = []
    for layer, r in enumerate(difference):
        with steered(layers[layer], coefficient * r):
            answers = generate(subject, prompts, [NEW_TOKENS] * len(prompts))
        said = embed(answers)
        near = [float((said @ side.T).amax(dim=1).mean()) for side in sides]
        rate = sum(is_refusal(answer, wanted) for answer in answers) / len(answers)
        scores.append(
            LayerScore(layer=layer, wanted=near[0], unwanted=near[1], refusal_rate=rate, length=float(r.norm()))
        )
        if progress:
            progress.advance(f"layer {layer}: {100 * rate:.0f} % refused")
    ranked = sorted(scores, key=lambda score: (-(score.wanted - score.unwanted) * score.refusal_rate, score.layer))
    return LayerSearch(
        coefficient=coefficient, layers=tuple(scores), chosen=tuple(score.layer for score in ranked[:top])
    )


def search_run(config: RunConfig, *, coefficient: float, top: int, progress: Progress) -> LayerSearch:
    """Search the layers of a run's model with the prompts that the run would read.

    Raises: CorpusError, ModelError; UsageError if the model hardly refuses the reference prompts.
    """
    workspace = Workspace(config.base)
    asked = inputs.read_prompts(config.data, config.base.model, workspace.tokenizer)
    with threads(config.base.threads):
        subject = LoadedModel(model=workspace.model(), tokenizer=workspace.tokenizer)
        wanted = eval_sets.wanted(config.base.model, config.evaluation.refusals)
        check_refusals(subject, asked.reference, wanted)
        return search(
            subject,
            asked,
            coefficient=coefficient,
            top=top,
            wanted=wanted,
            encoder=config.evaluation.encoder,
            progress=progress,
        )


@contextmanager
def steered(layer: nn.Module, shift: Float[Tensor, "d_model"]) -> Iterator[None]:
    """Add a vector to the layer's output at the last token of every prompt, for as long as the context lasts.

    Prompts are padded on the left, and tokens that are generated later pass alone.
    """

    def add(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 1:
            return hidden
        hidden = hidden.clone()
        hidden[:, -1] += shift.to(hidden)
        return hidden

    with hooks.changed(layer, add):
        yield


def _mean_last(subject: LoadedModel, asked: Sequence[Question]) -> Float[Tensor, "layer d_model"]:
    """Mean over prompts of every layer's output at the last token, in fp64."""
    rows = encode(subject.tokenizer, [question.prompt.rstrip(" ") for question in asked])
    layers = list(find_layers(subject.model))
    total = torch.zeros(len(layers), d_model(subject.model), dtype=torch.float64)
    with measuring(subject.model):
        for batch in batches(rows, 4096):
            ids, mask = pad(batch, side="left", device=device_of(subject.model))
            outputs: list[Tensor] = []
            with hooks.outputs(layers, lambda _, h, outputs=outputs: outputs.append(h[:, -1])):
                hooks.forward(subject.model, Batch(input_ids=ids, attention_mask=mask, mask=mask))
            total += torch.stack([output.double().sum(dim=0).cpu() for output in outputs])
    return total / len(rows)
