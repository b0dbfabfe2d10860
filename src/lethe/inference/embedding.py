"""Texts as vectors whose cosine says how alike they are."""

from collections.abc import Sequence
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


def embed(subject: LoadedModel, texts: Sequence[str], encoder: Path | None) -> Float[Tensor, "text width"]:
    """One row of length 1 for each text, in fp32 on the CPU; zero for a text that has no token.

    With the folder of a sentence encoder it is the mean of its last hidden states over all tokens. Without one it is
    the mean of the untouched measured model's, BOS left out, less the mean vector of the refusals in
    `lethe.refusals`: a decoder's hidden states share one large direction, which makes all texts look alike. On the
    built-in model this takes the nearness of right answers to its four ways to decline from 0.44 to 0.14, while a
    decline stays at 1.

    Raises: ModelError if the folder is missing or holds no encoder that can be read.
    """
    if encoder is None:
        centre = subject.once("embedding centre", lambda: _own(subject, (*WANTED, *UNWANTED)).mean(0))
        found = _own(subject, texts)
        return normalize(torch.where(found.any(1, keepdim=True), found - centre, 0.0), dim=1)
    model, tokenizer = subject.once(("encoder", encoder), lambda: _load(encoder, device_of(subject.model)))
    return normalize(_means(model, *_encoder_rows(model, tokenizer, texts)), dim=1)


def _own(subject: LoadedModel, texts: Sequence[str]) -> Float[Tensor, "text width"]:
    rows = encode_texts(subject, texts)
    with subject.frozen():
        return _means(subject.model.base_model, rows, [int(has_bos(subject.tokenizer, row)) for row in rows])


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


def _load(folder: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # A head for whole sentences is not read, so it may be absent.
    model, tokenizer = load_folder(AutoModel, folder, device, what="sentence encoder", spare="pooler")
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{folder} holds an encoder with a decoder ({model.config.model_type}).\nPass a model of one part, as BERT."
        )
    return model, tokenizer
