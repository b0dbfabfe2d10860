"""Batched reading of a model that several metrics share: log-probabilities of continuations, ranks, answers.

Rows are sorted by length and batched by their number of tokens; results come back in the order of the input and do
not depend on which rows shared a batch.
"""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lethe import decoder
from lethe.losses import token_log_probs
from lethe.protocols import Subject
from lethe.questions import letter_answers, render_letter
from lethe.tokens import encode, has_bos, pad
from lethe.types import Batch, DivergedError, EvalSet, Question, Scores

TOKENS_PER_BATCH = 4096
"""Most tokens, padding included, that a model reads at a time."""
LOGITS_PER_BATCH = 2**28
"""Most logits of one forward: one GiB in fp32, so that a vocabulary of 256 000 takes smaller batches."""
TOKENS_PER_TEXT = 512
"""A text is read up to this many tokens, or up to the model's context if that is shorter."""
FEWEST_NEW_TOKENS = 24
"""Room that every free-form answer has, so that one that goes on, refuses or repeats itself is seen to."""

Row = TypeVar("Row", bound=Sequence[int])


@dataclass(frozen=True, kw_only=True)
class Span:
    """Token ids of which those from `start` on are asked for, given all before them."""

    ids: tuple[int, ...]
    start: int
    """At least 1: the first token has nothing to be predicted from."""


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
    return _spans(subject, moved)


def answer_spans(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    """The tokens of each answer after its prompt, where `generate` puts them: a newline between is the prompt's."""
    bare = [(prompt.rstrip(" "), answer) for prompt, answer in pairs]
    return _spans(subject, [(prompt, _space(prompt) + answer) for prompt, answer in bare])


def _spans(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    prompts = sorted({prompt for prompt, _ in pairs})
    lengths = dict(zip(prompts, map(len, encode(subject.tokenizer, prompts)), strict=True))
    limit = context_length(subject.model)
    spans = []
    for (prompt, _), ids in zip(pairs, encode(subject.tokenizer, [a + b for a, b in pairs]), strict=True):
        # A continuation that merges into the prompt's last token is still asked for by its last token.
        start = max(1, min(lengths[prompt], len(ids) - 1))
        cut = max(0, len(ids) - limit)
        spans.append(Span(ids=tuple(ids[cut:]), start=max(1, start - cut)))
    return spans


def prompt_and_answers(question: Question, scoring: Literal["letter", "cloze"]) -> tuple[str, tuple[str, ...]]:
    """What the model reads, and what may follow: the letters, each choice's text, or a free-form question's answer."""
    if question.choices and scoring == "letter":
        return render_letter(question), letter_answers(question)
    return question.prompt, tuple(_space(question.prompt) + text for text in question.choices or (question.answer,))


def read_spans(
    model: PreTrainedModel,
    spans: Sequence[Span],
    read: Callable[[Float[Tensor, "token vocab"], Int[Tensor, " token"]], Tensor],
    *,
    wanted: Sequence[Sequence[int]] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Tensor]:
    """What `read` makes of the logits that predict each span's ids from `start` on, and these ids, in fp32 on the CPU.

    With `wanted` it is handed those ids, of any number, instead of the span's own.
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
                    asked = torch.tensor(wanted[index] if wanted else span.ids[span.start :], device=logits.device)
                    found[index] = read(row_logits[span.start - 1 : len(row)], asked).float().cpu()
    return finite([found[index] for index in range(len(spans))])


def finite(results: list[Tensor]) -> list[Tensor]:
    """What was read of each row, as it is.

    Raises: DivergedError if there is NaN or infinity in it.
    """
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
    lines: bool = True,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[str]:
    """The greedy continuation of each prompt up to EOS, a newline (with `lines`) or its number of new tokens."""
    found = continue_prompts(subject, prompts, max_new_tokens, lines=lines, tokens_per_batch=tokens_per_batch)
    return [_first_line(subject, span) if lines else _text(subject, span) for span in found]


def continue_prompts(
    subject: Subject,
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
            ids, mask = pad(batch, side="left", device=decoder.device_of(model))
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


def free_form(data: EvalSet) -> tuple[Question, ...]:
    """The questions that ask for a text: those scored by letters are left out, for their prompt asks for a letter."""
    return tuple(question for question in data.questions if data.scoring == "cloze" or not question.choices)


def golds(question: Question) -> tuple[str, ...]:
    """Every text that counts as a correct answer."""
    return tuple(gold for gold in (question.answer, *question.accepted) if gold.strip())


def answers(subject: Subject, data: EvalSet) -> list[tuple[str, ...]]:
    """For each free-form question its greedy answer, or `data.samples` answers sampled at temperature 1.

    An answer is the generated line, of at most max(`FEWEST_NEW_TOKENS`, 2 * longest correct answer + 8) tokens but no
    more than half the model's context. They are generated once, whoever asks for them. Sampled ones depend on
    `data.seed`, their number and the prompt.
    """
    spans = continuations(subject, data, samples=data.samples)
    return [tuple(_first_line(subject, span) for span in row) for row in spans]


def continuations(subject: Subject, data: EvalSet, *, samples: int) -> list[tuple[Span, ...]]:
    """The tokens of what `answers` returns, after those of the prompt; `samples=0` is one greedy answer."""

    def find() -> list[tuple[Span, ...]]:
        asked = free_form(data)
        prompts, budgets = [question.prompt for question in asked], _budgets(subject, asked)
        seeds = [f"{data.seed} {number}" for number in range(samples)] or [None]
        draws = [continue_prompts(subject, prompts, budgets, seed=seed) for seed in seeds]
        return list(zip(*draws, strict=True))

    return subject.once(("continuations", data, samples), find)


def _budgets(subject: Subject, questions: Sequence[Question]) -> list[int]:
    texts = sorted({f" {gold}" for question in questions for gold in golds(question)})
    rows = encode(subject.tokenizer, texts)
    lengths = {text: len(row) - has_bos(subject.tokenizer, row) for text, row in zip(texts, rows, strict=True)}
    longest = [max((lengths[f" {gold}"] for gold in golds(question)), default=0) for question in questions]
    limit = max(1, context_length(subject.model) // 2)
    return [min(limit, max(FEWEST_NEW_TOKENS, 2 * length + 8)) for length in longest]


def gold_ranks(
    subject: Subject, data: EvalSet, *, free_running: bool = False
) -> list[tuple[Float[Tensor, " token"], ...]]:
    """For each free-form question the rank of each token of each correct answer, given the prompt and those before it.

    Rank 1 is the model's own choice; of equally probable tokens the one of lower id comes first. EOS is left out.
    With `free_running` it is the rank of the j-th token at the j-th step of the model's own greedy answer, and
    infinite beyond the step at which that ends.
    """

    def find() -> list[tuple[Tensor, ...]]:
        asked = [(question.prompt, golds(question)) for question in free_form(data)]
        spans = answer_spans(subject, [(prompt, gold) for prompt, texts in asked for gold in texts])
        wanted = [span.ids[span.start :] for span in spans]
        if free_running:
            own = continuations(subject, data, samples=0)
            spans = [said for (said,), (_, texts) in zip(own, asked, strict=True) for _ in texts]
        ranks = zip(read_spans(subject.model, spans, _ranks, wanted=wanted), wanted, strict=True)
        padded = (nn.functional.pad(found, (0, len(ids) - len(found)), value=math.inf) for found, ids in ranks)
        return [tuple(next(padded) for _ in texts) for _, texts in asked]

    return subject.once(("gold ranks", data, free_running), find)


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


def text_batch(subject: Subject, rows: Sequence[Sequence[int]]) -> Batch:
    """Token rows as a batch on the model's device, padded on the right; all but BOS and padding counts."""
    ids, real = pad(rows, side="right", device=decoder.device_of(subject.model))
    mask = real.clone()
    for index, row in enumerate(rows):
        mask[index, 0] = not has_bos(subject.tokenizer, row)
    return Batch(input_ids=ids, attention_mask=real, mask=mask)


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model can read; without a limit (Mamba, ALiBi), a million."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**6


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a text: the tokenizer's and those of the model's own generation settings."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return sorted({index for index in ids if index is not None})


def _space(prompt: str) -> str:
    """What stands between a prompt and its answer."""
    return "" if prompt[-1:].isspace() else " "


def _ranks(logits: Float[Tensor, "step vocab"], ids: Int[Tensor, " token"]) -> Float[Tensor, " rank"]:
    """Rank of the j-th id at the j-th step, as far as both go; NaN where the logits are not numbers."""
    count = min(len(logits), len(ids))
    logits, wanted = logits[:count], ids[:count, None]
    own = logits.gather(1, wanted)
    lower = torch.arange(logits.shape[1], device=logits.device) < wanted
    ranks = 1.0 + (logits > own).sum(1) + ((logits == own) & lower).sum(1)
    return ranks.masked_fill(~logits.amax(1).isfinite(), math.nan)


def _first_line(subject: Subject, continued: Span) -> str:
    return _text(subject, continued).partition("\n")[0].strip()


def _text(subject: Subject, continued: Span) -> str:
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
