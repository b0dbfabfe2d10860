"""Spans of tokens that are scored: texts, and answers behind prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from lethe.data.questions import letter_answers, render_letter
from lethe.data.shared_tokens import encode_alike
from lethe.data.tokens import encode
from lethe.errors import QuestionError
from lethe.inference.loaded_model import LoadedModel
from lethe.types import Question

TOKENS_PER_TEXT = 512
"""A text is read up to this many tokens, or up to the model's context if that is shorter."""


Asked = tuple[str, Sequence[str]]
"""A prompt, and all that may follow it."""


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


def answer_spans(subject: LoadedModel, asked: Sequence[Asked]) -> list[Span]:
    """The tokens of each answer to each prompt after the prompt's, as the evaluation harness cuts them.

    Prompt and answer are tokenised together, and the answer's tokens are those after the prompt's own number of
    tokens. White space at a prompt's end is moved to the answer, where most tokenizers keep it. The model reads as
    many tokens as its context holds: the answer's last one is not read, and a longer row loses tokens on the left.

    Raises: QuestionError if an answer alone is beyond the context.
    """
    moved = []
    for prompt, answers in asked:
        bare = prompt.rstrip()
        moved.append((bare, [prompt[len(bare) :] + answer for answer in answers]))
    return _spans(subject, moved)


def generated_spans(subject: LoadedModel, asked: Sequence[Asked]) -> list[Span]:
    """`answer_spans` of bare answers, where `generate` puts them: a newline at a prompt's end stays the prompt's.

    Raises: QuestionError.
    """
    bare = [(prompt.rstrip(" "), answers) for prompt, answers in asked]
    return _spans(subject, [(prompt, [_space(prompt) + answer for answer in answers]) for prompt, answers in bare])


def _spans(subject: LoadedModel, asked: Sequence[Asked]) -> list[Span]:
    limit, bos = context_length(subject.model), str(subject.tokenizer.bos_token or "")
    texts = [*itertools.chain.from_iterable((prompt, *(prompt + one for one in answers)) for prompt, answers in asked)]
    # The tokenizer's own BOS, unless a chat template has written it already.
    rows = iter(encode_alike(subject.tokenizer, texts, special=not (bos and texts and texts[0].startswith(bos))))
    spans = []
    for number, (_, answers) in enumerate(asked, start=1):
        length = len(next(rows))
        for _ in answers:
            ids = next(rows)
            # An answer that merges into the prompt's last token is still asked for by its last token.
            start = max(1, min(length, len(ids) - 1))
            if len(ids) - start > limit:
                raise QuestionError(
                    f"question {number}: an answer has {len(ids) - start} tokens, and the model reads {limit}.\n"
                    "Remove the question, or take a model with a longer context."
                )
            cut = max(0, len(ids) - limit - 1)
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
