"""Membership inference: do the set's texts look more trained on than texts that were held out."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lethe.errors import DivergedError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import log_probs, measuring, read_spans
from lethe.inference.reading import Reading
from lethe.inference.spans import Span, encode_texts
from lethe.metrics import _membership
from lethe.metrics.protocol import Metric
from lethe.model.layers import device_of
from lethe.model.losses import token_log_probs
from lethe.types import Scores, Unit

LABELS = {
    "_loss": "loss",
    "_zlib": "loss over compressed length",
    "_min_k": "Min-K",
    "_min_k_plus_plus": "Min-K++",
    "_grad_norm": "gradient norm",
    "_reference": "loss beyond the retain-only model's",
}
"""What each attack goes by."""


@dataclass(frozen=True, kw_only=True)
class Membership(Metric):
    """How well six attacks tell the set's texts from held-out ones: 1 is memorised, 0.5 cannot be told apart.

    Each is the chance that a held-out text looks less trained on than one of the set (`lethe.membership.auc`): by its
    loss (`_loss`), loss over compressed length (`_zlib`), loss beyond the retain-only model's (`_reference`), least
    probable tokens (`_min_k`), the same in standard deviations (`_min_k_plus_plus`), and the Euclidean norm of the
    loss's gradient, mean over all weight tensors (`_grad_norm`). A score below that of a model which never saw the set
    betrays it as well. Texts are read as for perplexity. None without texts or held-out ones; `_reference` only with a
    retain-only model.
    """

    source: ClassVar[str] = "Shi et al., MUSE (2024), arXiv 2407.06460, and the attacks that open-unlearning has"
    unit: ClassVar[Unit] = "share"
    chance: ClassVar[str] = "0.5"
    needs: ClassVar[str] = "texts and a holdout set; a retain-only model for the reference attack"

    def __call__(self, reading: Reading) -> Mapping[str, Scores] | None:
        """Areas under the curve in [0, 1], with standard errors over texts."""
        data = reading.data
        if not (data.texts and data.holdout):
            return None
        members, holdout = (_score_texts(reading.model, texts) for texts in (data.texts, data.holdout))
        if not (members and holdout):
            return None
        return {
            name: replace(_membership.auc(members[name], holdout[name]), label=f"membership by {LABELS[name]}")
            for name in members
        }


def _score_texts(subject: LoadedModel, texts: Sequence[str]) -> dict[str, list[float]]:
    """Each attack's score of each text of two tokens or more; nothing if there is none."""
    spans = [Span(ids=row, start=1) for row in encode_texts(subject, texts) if len(row) > 1]
    if not spans:
        return {}
    tokens = read_spans(subject.model, spans, _token_statistics)
    read = [subject.tokenizer.decode(list(span.ids), skip_special_tokens=True) for span in spans]
    losses = [_membership.loss(found[:, 0]) for found in tokens]
    scores = {
        "_loss": losses,
        "_zlib": [_membership.zlib_ratio(found[:, 0], str(text)) for found, text in zip(tokens, read, strict=True)],
        "_min_k": [_membership.min_k(found[:, 0]) for found in tokens],
        "_min_k_plus_plus": [_membership.min_k_plus_plus(found[:, 0], found[:, 1], found[:, 2]) for found in tokens],
        "_grad_norm": _gradient_norms(subject.model, spans),
    }
    if (other := subject.retain_only) is not None:
        found = log_probs(other.model, spans)
        scores["_reference"] = [own - _membership.loss(its) for own, its in zip(losses, found, strict=True)]
    return scores


def _token_statistics(
    logits: Float[Tensor, "token vocab"], ids: Int[Tensor, " token"]
) -> Float[Tensor, "token statistic"]:
    """Log-probability of each token, and mean and variance of the log-probability under the prediction itself."""
    every = logits.float().log_softmax(-1)
    probability = every.exp()
    mean = (probability * every).sum(-1, keepdim=True)
    variance = (probability * (every - mean).square()).sum(-1)
    return torch.stack([token_log_probs(logits, ids), mean[:, 0], variance], dim=-1)


def _gradient_norms(model: PreTrainedModel, spans: Sequence[Span]) -> list[float]:
    """For each text the mean over the model's tensors of the Euclidean norm of its mean loss's gradient."""
    norms: list[Tensor] = []
    found = []
    device = device_of(model)
    with measuring(model), torch.enable_grad(), _handing_on_gradients(model, norms.append) as count:
        for span in spans:
            ids = torch.tensor([span.ids], device=device)
            # The labels also keep a shortcut past layers that an edit left alone from being taken: it has no gradient.
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
            found.append(math.fsum(map(float, norms)) / count)
            norms.clear()
    if not all(map(math.isfinite, found)):
        raise DivergedError(
            "the gradient of the model's loss on a text is NaN or infinite, so it cannot be scored.\n"
            "Load the model in float32 or bfloat16."
        )
    return found


@contextmanager
def _handing_on_gradients(model: PreTrainedModel, take: Callable[[Tensor], None]) -> Iterator[int]:
    """Hand the norm of each tensor's gradient on as soon as it is complete, and drop the gradient; yields the number.

    So the memory that gradients take is that of one tensor at a time. A tensor that the loss does not reach has none,
    which counts as a norm of 0. Gradients and `requires_grad` are put back on exit.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]

    def hand_on(parameter: Tensor) -> None:
        if parameter.grad is not None:
            take(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
            parameter.grad = None

    handles = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
            handles.append(parameter.register_post_accumulate_grad_hook(hand_on))
        yield len(parameters)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (wanted, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
