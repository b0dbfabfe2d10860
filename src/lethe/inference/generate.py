"""Generation: greedy or sampled continuations of prompts, in batches."""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lethe.data.tokens import encode, pad
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import TOKENS_PER_BATCH, batches, measuring
from lethe.inference.spans import Span, context_length
from lethe.model.layers import device_of


def generate(
    subject: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    lines: bool = True,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[str]:
    """The greedy continuation of each prompt up to EOS, a newline (with `lines`) or its number of new tokens."""
    found = continue_prompts(subject, prompts, max_new_tokens, lines=lines, tokens_per_batch=tokens_per_batch)
    return [first_line_of(subject, span) if lines else _text(subject, span) for span in found]


def continue_prompts(
    subject: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    seed: str | None = None,
    lines: bool = True,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Span]:
    """The tokens of each prompt, and from `start` on those that the model continues it with.

    The last one is EOS or, with `lines`, holds a newline, unless the number of new tokens was used up. With a `seed`
    they are sampled at temperature 1: what is drawn depends on the seed and the prompt's tokens, not on the batch.
    """
    model, tokenizer = subject.model, subject.tokenizer
    stops = eos_ids(model, tokenizer)
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    room = max(1, context_length(model) - max(max_new_tokens, default=0))
    # A space left at the end of a prompt is a token of its own that no answer follows in training text.
    for index, ids in enumerate(encode(tokenizer, [prompt.rstrip(" ") for prompt in prompts])):
        rows[tuple(ids[-room:])].append(index)
    found: dict[int, Span] = {}
    with measuring(model):
        for batch in batches(list(rows), tokens_per_batch):
            ids, mask = pad(batch, side="left", device=device_of(model))
            budget = max(max_new_tokens[index] for row in batch for index in rows[row])
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=budget,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
            )
            draws = [] if seed is None else [_Draw([random.Random(f"{seed} {row}") for row in batch])]
            with _generation_config(model, config):
                output = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare it
                    input_ids=ids,
                    attention_mask=mask.long(),
                    generation_config=config,
                    logits_processor=LogitsProcessorList(draws),
                    stopping_criteria=StoppingCriteriaList([_Newline(tokenizer)] * lines),
                )
            for row, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                end = _end(tokenizer, new, stops, lines)
                for index in rows[row]:
                    found[index] = Span(ids=(*row, *new[: min(end, max_new_tokens[index])]), start=len(row))
    return [found[index] for index in range(len(prompts))]


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({index for index in ids if index is not None})


def first_line_of(subject: LoadedModel, continued: Span) -> str:
    """The first line of what continues a prompt."""
    return _text(subject, continued).partition("\n")[0].strip()


def _text(subject: LoadedModel, continued: Span) -> str:
    stops = eos_ids(subject.model, subject.tokenizer)
    ids = [token for token in continued.ids[continued.start :] if token not in stops]
    return str(subject.tokenizer.decode(ids, skip_special_tokens=True))


def _end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int], lines: bool) -> int:
    """Number of tokens up to the first that is EOS or, with `lines`, holds a newline, that one included."""
    texts = tokenizer.batch_decode([[token] for token in ids]) if lines else [""] * len(ids)
    ends = (n for n, (token, text) in enumerate(zip(ids, texts, strict=True), 1) if token in stops or "\n" in text)
    return next(ends, len(ids))


class _Draw(LogitsProcessor):
    """Leaves one token to choose from: drawn at temperature 1 by each row's own source of random numbers."""

    def __init__(self, rows: Sequence[random.Random]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # One number a row and the inverse of the distribution, so that neither device nor batch changes what is drawn.
        below = scores.float().softmax(-1).cpu().double().cumsum(-1)
        level = below.new_tensor([[row.random()] for row in self.rows]) * below[:, -1:]
        drawn = torch.searchsorted(below, level, right=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, drawn.to(scores.device), 0.0)


class _Newline(StoppingCriteria):
    """A row is finished once its last token holds a newline."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, input_ids: torch.LongTensor, scores: object, **_: object) -> torch.BoolTensor:
        ended = ["\n" in text for text in self.tokenizer.batch_decode(input_ids[:, -1:])]
        return cast(torch.BoolTensor, torch.tensor(ended, device=input_ids.device))


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Greedy for certain: generate() fills what a config leaves open from the model's own, a repetition penalty say."""
    own = model.generation_config
    try:
        model.generation_config = config
        yield
    finally:
        model.generation_config = own
