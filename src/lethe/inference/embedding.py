"""Texts as vectors whose cosine says how alike they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from lethe.data.refusals import UNWANTED, WANTED
from lethe.data.tokens import has_bos, pad
from lethe.errors import ModelError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, measuring
from lethe.inference.spans import encode_texts
from lethe.model.layers import device_of
from lethe.model.loading import load_folder

MOST_TOKENS = 512
"""A sentence encoder reads a text up to this many tokens, or up to its own limit if that is lower."""


def embedder(
    subject: LoadedModel, encoder: "SentenceEncoder | None"
) -> Callable[[Sequence[str]], Float[Tensor, "text width"]]:
    """What turns texts into rows of length 1: a sentence encoder or, without one, the untouched model itself."""
    return OwnEncoder(subject) if encoder is None else partial(encoder, device=device_of(subject.model))


@dataclass(frozen=True)
class OwnEncoder:
    """The untouched measured model itself, which compares sentences by their mean hidden states.

    They are taken without BOS and less the mean vector of the refusals in `lethe.data.refusals`: a decoder's hidden
    states share one large direction, which makes all texts look alike. On the built-in model this takes the nearness
    of right answers to its four ways to decline from 0.44 to 0.14, while a decline stays at 1.
    """

    model: LoadedModel

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """One row of length 1 for each text, in fp32 on the CPU; zero for a text that has no token."""
        means = self._means(texts)
        return normalize(torch.where(means.any(1, keepdim=True), means - self._centre, 0.0), dim=1)

    @cached_property
    def _centre(self) -> Float[Tensor, " width"]:
        return self._means((*WANTED, *UNWANTED)).mean(0)

    def _means(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        rows = encode_texts(self.model, texts)
        with self.model.frozen():
            starts = [int(has_bos(self.model.tokenizer, row)) for row in rows]
            return _means(self.model.model.base_model, rows, starts)


@dataclass(frozen=True)
class SentenceEncoder:
    """A model that was made to compare sentences, read from its folder when it is first asked, and then kept."""

    folder: Path

    def __call__(self, texts: Sequence[str], *, device: torch.device) -> Float[Tensor, "text width"]:
        """The mean of its last hidden states over all tokens, as rows of length 1, in fp32 on the CPU.

        Raises: ModelError if the folder is missing or holds no encoder that can be read.
        """
        model, tokenizer = self._loaded
        model.to(device)  # type: ignore[arg-type]
        return normalize(_means(model, *_encoder_rows(model, tokenizer, texts)), dim=1)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        # A head for whole sentences is not read, so it may be absent.
        cpu = torch.device("cpu")
        model, tokenizer = load_folder(AutoModel, self.folder, cpu, what="sentence encoder", spare="pooler")
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{self.folder} holds an encoder with a decoder ({model.config.model_type}).\n"
                "Pass a model of one part, as BERT."
            )
        return model, tokenizer


def _encoder_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[list[tuple[int, ...]], list[int]]:
    limits = (MOST_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", MOST_TOKENS))
    rows = tokenizer(list(texts), truncation=True, max_length=min(limits))["input_ids"] if texts else []
    return [tuple(row) for row in rows], [0] * len(rows)


def _means(model: Any, rows: Sequence[tuple[int, ...]], starts: Sequence[int]) -> Float[Tensor, "text width"]:
    """Mean last hidden state of each row from its start on; zero where there is none."""
    width = model.config.get_text_config().hidden_size
    found: dict[tuple[int, ...], Tensor] = {}
    first = dict(zip(rows, starts, strict=True))
    with measuring(model):
        for batch in batches([row for row in first if len(row) > first[row]], TOKENS_PER_BATCH):
            ids, mask = pad(batch, side="right", device=model.device)
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            for row, states in zip(batch, hidden, strict=True):
                found[row] = states[first[row] : len(row)].float().mean(0).cpu()
    nothing = torch.zeros(width)
    return torch.stack([found.get(row, nothing) for row in rows]) if rows else torch.zeros(0, width)
