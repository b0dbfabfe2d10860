"""Batched reading of a model that several metrics share: log-probabilities of continuations, greedy answers.

Rows are sorted by length and batched by their number of tokens; results come back in the order of the input and do
not depend on which rows shared a batch.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lethe import decoder
from lethe.losses import token_log_probs
from lethe.protocols import Subject
from lethe.questions import letter_answers, render_letter
from lethe.types import DivergedError, Question, Scores

TOKENS_PER_BATCH = 4096
"""Most tokens, padding included, that a model reads at a time."""
LOGITS_PER_BATCH = 2**28
"""Most logits of one forward: one GiB in fp32, so that a vocabulary of 256 000 takes smaller batches."""
TOKENS_PER_TEXT = 512
"""A text is read up to this many tokens, or up to the model's context if that is shorter."""

Row = TypeVar("Row", bound=Sequence[int])


@dataclass(frozen=True, kw_only=True)
class Span:
    """Token ids of which those from `start` on are asked for, given all before them."""

    ids: tuple[int, ...]
    start: int
    """At least 1: the first token has nothing to be predicted from."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own BOS and without a closing EOS."""
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=True, truncation=False, padding=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    return [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in rows]


def has_bos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether the row opens with BOS."""
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def encode_texts(subject: Subject, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the beginning of each text, as far as `TOKENS_PER_TEXT` and the model's context go."""
    limit = min(TOKENS_PER_TEXT, context_length(subject.model))
    return [tuple(row[:limit]) for row in encode(subject.tokenizer, texts)]


def pair_spans(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    """The tokens of each continuation after its prompt, tokenised together as the evaluation harness does.

    Spaces at a prompt's end are moved to the continuation, where most tokenizers keep them; the continuation's
    tokens are those after the prompt's own number of tokens. A row beyond the model's context loses tokens on the left.
    """
    moved = []
    for prompt, continuation in pairs:
        bare = prompt.rstrip()
        moved.append((bare, prompt[len(bare) :] + continuation))
    prompts = sorted({prompt for prompt, _ in moved})
    lengths = dict(zip(prompts, map(len, encode(subject.tokenizer, prompts)), strict=True))
    limit = context_length(subject.model)
    spans = []
    for (prompt, _), ids in zip(moved, encode(subject.tokenizer, [a + b for a, b in moved]), strict=True):
        # A continuation that merges into the prompt's last token is still asked for by its last token.
        start = max(1, min(lengths[prompt], len(ids) - 1))
        cut = max(0, len(ids) - limit)
        spans.append(Span(ids=tuple(ids[cut:]), start=max(1, start - cut)))
    return spans


def prompt_and_answers(question: Question, scoring: Literal["letter", "cloze"]) -> tuple[str, tuple[str, ...]]:
    """What the model reads, and what may follow: the letters, each choice's text, or a free-form question's answer."""
    if question.choices and scoring == "letter":
        return render_letter(question), letter_answers(question)
    space = "" if question.prompt[-1:].isspace() else " "
    return question.prompt, tuple(space + text for text in question.choices or (question.answer,))


def read_spans(
    model: PreTrainedModel,
    spans: Sequence[Span],
    read: Callable[[Float[Tensor, "token vocab"], Int[Tensor, " token"]], Tensor],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Tensor]:
    """What `read` makes of each span's ids from `start` on and the logits that predict them, in fp32 on the CPU.

    Spans that differ in their last token only, as the letters A to D do, cost one row.

    Raises: DivergedError if the model gives NaN or infinity.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        rows[span.ids[:-1]].append(index)
    found: dict[int, Tensor] = {}
    device = decoder.device_of(model)
    vocabulary = model.config.get_text_config().vocab_size
    with measuring(model):
        for batch in batches(list(rows), min(tokens_per_batch, LOGITS_PER_BATCH // vocabulary)):
            # Padding on the right: causal layers never look there, so no family needs position ids.
            ids, mask = pad(batch, side="right", device=device)
            logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            for row, row_logits in zip(batch, logits, strict=True):
                for index in rows[row]:
                    span = spans[index]
                    wanted = torch.tensor(span.ids[span.start :], device=logits.device)
                    found[index] = read(row_logits[span.start - 1 : len(row)], wanted).float().cpu()
    results = [found[index] for index in range(len(spans))]
    broken = sum(not bool(result.isfinite().all()) for result in results)
    if broken:
        raise DivergedError(
            f"the model's output is NaN or infinite on {broken} of {len(results)} rows, so it cannot be scored.\n"
            "Load it in float32 or bfloat16, or train it with a lower learning rate or steering coefficient."
        )
    return results


def log_probs(
    model: PreTrainedModel, spans: Sequence[Span], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[Tensor]:
    """Log-probability of each asked token of each span, fp32 [token] on the CPU."""
    return read_spans(model, spans, token_log_probs, tokens_per_batch=tokens_per_batch)


def generate(
    subject: Subject,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[str]:
    """The greedy continuation of each prompt up to EOS, a newline or its number of new tokens."""
    model, tokenizer = subject.model, subject.tokenizer
    stops = _eos_ids(model, tokenizer)
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    room = max(1, context_length(model) - max(max_new_tokens, default=0))
    # A space left at the end of a prompt is a token of its own that no answer follows in training text.
    for index, ids in enumerate(encode(tokenizer, [prompt.rstrip(" ") for prompt in prompts])):
        rows[tuple(ids[-room:])].append(index)
    answers: dict[int, str] = {}
    with measuring(model):
        for batch in batches(list(rows), tokens_per_batch):
            ids, mask = pad(batch, side="left", device=decoder.device_of(model))
            budget = max(max_new_tokens[index] for row in batch for index in rows[row])
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=budget,
                eos_token_id=stops or None,
                pad_token_id=stops[0] if stops else 0,
            )
            with _generation_config(model, config):
                output = model.generate(  # type: ignore[operator]  # PreTrainedModel does not declare it
                    input_ids=ids,
                    attention_mask=mask.long(),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([_Newline(tokenizer)]),
                )
            for row, new in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
                for index in rows[row]:
                    answers[index] = _first_line(tokenizer, new[: max_new_tokens[index]], stops)
    return [answers[index] for index in range(len(prompts))]


def mean_scores(
    values: Sequence[float], better: Literal["higher", "lower", "neither"], *, chance: float | None = None
) -> Scores:
    """The mean of one value per example, with its standard error: sample deviation / sqrt(n), 0 for one example."""
    n = len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    return Scores(
        value=math.fsum(values) / n, stderr=stderr, n=n, better=better, per_example=tuple(values), chance=chance
    )


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; each module's own mode is put back on exit."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def batches(rows: Sequence[Row], tokens_per_batch: int) -> Iterator[list[Row]]:
    """The rows, longest first, in batches of at most so many tokens when padded; never less than one row."""
    batch: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad(
    rows: Sequence[Sequence[int]], *, side: Literal["left", "right"], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids padded to the longest row, and True where they are real."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = True
    return ids.to(device), mask.to(device)


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model can read; without a limit (Mamba, ALiBi), a million."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**6


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({index for index in ids if index is not None})


def _first_line(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> str:
    end = next((place for place, index in enumerate(ids) if index in stops), len(ids))
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
    return str(text).partition("\n")[0].strip()


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
