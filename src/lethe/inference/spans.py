"""Spans of tokens that are scored: texts, answers behind prompts, pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from lethe.data.questions import letter_answers, render_letter
from lethe.data.tokens import encode
from lethe.inference.loaded_model import LoadedModel
from lethe.types import Question

TOKENS_PER_TEXT = 512
"""A text is read up to this many tokens, or up to the model's context if that is shorter."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Token ids of which those from `start` on are asked for, given all before them."""

    ids: tuple[int, ...]
    start: int
    """At least 1: the first token has nothing to be predicted from."""


def encode_texts(subject: LoadedModel, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the beginning of each text, as far as `TOKENS_PER_TEXT` and the model's context go."""
    limit = min(TOKENS_PER_TEXT, context_length(subject.model))
    return [tuple(row[:limit]) for row in encode(subject.tokenizer, texts)]


def pair_spans(subject: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    """The tokens of each continuation after its prompt, tokenised together as the evaluation harness does.

    Spaces at a prompt's end are moved to the continuation, where most tokenizers keep them; the continuation's
    tokens are those after the prompt's own number of tokens. A row beyond the model's context loses tokens on the left.
    """
    moved = []
    for prompt, continuation in pairs:
        bare = prompt.rstrip()
        moved.append((bare, prompt[len(bare) :] + continuation))
    return _spans(subject, moved)


def answer_spans(subject: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    """The tokens of each answer after its prompt, where `generate` puts them: a newline between is the prompt's."""
    bare = [(prompt.rstrip(" "), answer) for prompt, answer in pairs]
    return _spans(subject, [(prompt, _space(prompt) + answer) for prompt, answer in bare])


def _spans(subject: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Span]:
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


def context_length(model: PreTrainedModel) -> int:
    """Most tokens that the model can read; without a limit (Mamba, ALiBi), a million."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**6


def _space(prompt: str) -> str:
    """What stands between a prompt and its answer."""
    return "" if prompt[-1:].isspace() else " "
