"""Answers to questions: what a model generates, and how it ranks the right ones; found once for all metrics."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.data.tokens import encode, has_bos
from lethe.inference.generate import continue_prompts, first_line_of
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import read_spans
from lethe.inference.spans import Span, answer_spans, context_length
from lethe.types import EvalSet, Question

FEWEST_NEW_TOKENS = 24
"""Room that every free-form answer has, so that one that goes on, refuses or repeats itself is seen to."""


def free_form(data: EvalSet) -> tuple[Question, ...]:
    """The questions that ask for a text: those scored by letters are left out, for their prompt asks for a letter."""
    return tuple(question for question in data.questions if data.scoring == "cloze" or not question.choices)


def golds(question: Question) -> tuple[str, ...]:
    """Every text that counts as a correct answer."""
    return tuple(gold for gold in (question.answer, *question.accepted) if gold.strip())


def answers(subject: LoadedModel, data: EvalSet) -> list[tuple[str, ...]]:
    """For each free-form question its greedy answer, or `data.samples` answers sampled at temperature 1.

    An answer is the generated line, of at most max(`FEWEST_NEW_TOKENS`, 2 * longest correct answer + 8) tokens but no
    more than half the model's context. They are generated once, whoever asks for them. Sampled ones depend on
    `data.seed`, their number and the prompt.
    """
    spans = continuations(subject, data, samples=data.samples)
    return [tuple(first_line_of(subject, span) for span in row) for row in spans]


def continuations(subject: LoadedModel, data: EvalSet, *, samples: int) -> list[tuple[Span, ...]]:
    """The tokens of what `answers` returns, after those of the prompt; `samples=0` is one greedy answer."""

    def find() -> list[tuple[Span, ...]]:
        asked = free_form(data)
        prompts, budgets = [question.prompt for question in asked], _budgets(subject, asked)
        seeds = [f"{data.seed} {number}" for number in range(samples)] or [None]
        draws = [continue_prompts(subject, prompts, budgets, seed=seed) for seed in seeds]
        return list(zip(*draws, strict=True))

    return subject.once(("continuations", data, samples), find)


def _budgets(subject: LoadedModel, questions: Sequence[Question]) -> list[int]:
    texts = sorted({f" {gold}" for question in questions for gold in golds(question)})
    rows = encode(subject.tokenizer, texts)
    lengths = {text: len(row) - has_bos(subject.tokenizer, row) for text, row in zip(texts, rows, strict=True)}
    longest = [max((lengths[f" {gold}"] for gold in golds(question)), default=0) for question in questions]
    limit = max(1, context_length(subject.model) // 2)
    return [min(limit, max(FEWEST_NEW_TOKENS, 2 * length + 8)) for length in longest]


def gold_ranks(
    subject: LoadedModel, data: EvalSet, *, free_running: bool = False
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


def _ranks(logits: Float[Tensor, "step vocab"], ids: Int[Tensor, " token"]) -> Float[Tensor, " rank"]:
    """Rank of the j-th id at the j-th step, as far as both go; NaN where the logits are not numbers."""
    count = min(len(logits), len(ids))
    logits, wanted = logits[:count], ids[:count, None]
    own = logits.gather(1, wanted)
    lower = torch.arange(logits.shape[1], device=logits.device) < wanted
    ranks = 1.0 + (logits > own).sum(1) + ((logits == own) & lower).sum(1)
    return ranks.masked_fill(~logits.amax(1).isfinite(), math.nan)
