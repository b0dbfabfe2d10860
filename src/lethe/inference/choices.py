"""Multiple choice as the evaluation harness scores it, for everything that asks questions with choices."""

import itertools
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lethe.data.shared_tokens import encode_alike
from lethe.errors import QuestionError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.prefix_cache import shared_log_probs
from lethe.inference.spans import Span, context_length, prompt_and_answers
from lethe.types import Question

Asked = tuple[str, Sequence[str]]
"""A prompt, and all that may follow it."""


def choice_log_probs(subject: LoadedModel, asked: Sequence[Asked]) -> list[list[Float[Tensor, " token"]]]:
    """For each prompt, and each answer to it, the log-probability of each of the answer's tokens.

    A prompt beyond the model's context loses tokens on the left.

    Raises: QuestionError if an answer alone is beyond it; DivergedError, OutOfMemoryError.
    """
    scored = iter(shared_log_probs(subject.model, answer_spans(subject, asked)))
    return [[next(scored) for _ in answers] for _, answers in asked]


def answer_spans(subject: LoadedModel, asked: Sequence[Asked]) -> list[Span]:
    """The tokens of each answer to each prompt after the prompt's, as the evaluation harness cuts them.

    Prompt and answer are tokenised together, and the answer's tokens are those after the prompt's own number of
    tokens. White space at a prompt's end is moved to the answer, where most tokenizers keep it. The model reads as
    many tokens as its context holds: the answer's last one is not read.

    Raises: QuestionError.
    """
    limit = context_length(subject.model)
    texts = [[prompt.rstrip(), *(prompt + answer for answer in answers)] for prompt, answers in asked]
    rows = iter(_encoded(subject.tokenizer, [*itertools.chain.from_iterable(texts)]))
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


def choice_hits(
    subject: LoadedModel, questions: Sequence[Question], scoring: Literal["letter", "cloze"]
) -> list[float]:
    """For each question 1.0 if its answer is the most probable choice, else 0.0.

    Letter scoring takes the log-probability of " A", " B", ... after the rendered question; cloze scoring the
    mean log-probability of each choice's tokens after the prompt. Ties go to the earlier choice.
    """
    asked = [prompt_and_answers(question, scoring) for question in questions]
    hits = []
    for question, choices in zip(questions, choice_log_probs(subject, asked), strict=True):
        totals = [float(tokens.mean() if scoring == "cloze" else tokens.sum()) for tokens in choices]
        hits.append(float(totals.index(max(totals)) == question.answer_index))
    return hits


def chance(questions: Sequence[Question]) -> float:
    """Share of hits that guessing gives: the mean of 1 / number of choices."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids with the tokenizer's own BOS, unless a chat template has written it already."""
    bos = str(tokenizer.bos_token or "")
    return encode_alike(tokenizer, texts, special=not (bos and texts and texts[0].startswith(bos)))
