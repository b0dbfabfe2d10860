"""One model on one set: whatever several metrics ask for is read once, when the first of them asks."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lethe.data.tokens import encode, has_bos
from lethe.inference.generate import continue_prompts, first_line_of
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import finite, read_spans
from lethe.inference.prefix_cache import Row
from lethe.inference.spans import (
    Span,
    answer_spans,
    context_length,
    encode_texts,
    generated_spans,
    prompt_and_answers,
)
from lethe.inference.text_pass import TextReading, read_texts
from lethe.model.losses import token_log_probs
from lethe.types import EvalSet, Question

FEWEST_NEW_TOKENS = 24
"""Room that every free-form answer has, so that one that goes on, refuses or repeats itself is seen to."""


def golds(question: Question) -> tuple[str, ...]:
    """Every text that counts as a correct answer."""
    return tuple(gold for gold in (question.answer, *question.accepted) if gold.strip())


def free_form(data: EvalSet) -> tuple[Question, ...]:
    """A set's questions that ask for a text."""
    return tuple(question for question in data.questions if data.scoring == "cloze" or not question.choices)


@dataclass(frozen=True, eq=False)
class Reading:
    """A model under measurement, the set that it is measured on, and all that was read of the two so far.

    The model's weights must stay as they are while it is in use: nothing is read twice.
    """

    model: LoadedModel
    data: EvalSet
    _: KW_ONLY
    samples: int = 0
    """Sampled answers to each question, at temperature 1; 0 is one greedy answer."""
    seed: int = 0
    """Seed of sampled answers and of what a metric draws per question."""
    _tokens: dict[Span, Float[Tensor, "token 3"]] = field(default_factory=dict, init=False, repr=False)
    _texts: dict[Row, TextReading] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def free_form(self) -> tuple[Question, ...]:
        """The questions that ask for a text: not those scored by letters, for their prompt asks for a letter."""
        return free_form(self.data)

    @cached_property
    def answers(self) -> list[tuple[str, ...]]:
        """For each free-form question its greedy answer, or `samples` answers sampled at temperature 1.

        An answer is the generated line, of at most max(`FEWEST_NEW_TOKENS`, 2 * longest correct answer + 8) tokens but
        no more than half the model's context. Sampled ones depend on `seed`, their number and the prompt.
        """
        return [tuple(first_line_of(self.model, span) for span in row) for row in self.continuations]

    @cached_property
    def continuations(self) -> list[tuple[Span, ...]]:
        """The tokens of `answers`, after those of the prompt."""
        if not self.samples:
            return [(span,) for span in self.greedy]
        draws = [self._generate(f"{self.seed} {number}") for number in range(self.samples)]
        return list(zip(*draws, strict=True))

    @cached_property
    def greedy(self) -> list[Span]:
        """The tokens of each free-form question's greedy answer, after those of the prompt."""
        return self._generate(None)

    def log_probs(self, spans: Sequence[Span]) -> list[Float[Tensor, " token"]]:
        """Log-probability of each asked token of each span, fp32 on the CPU.

        Raises: DivergedError, OutOfMemoryError.
        """
        return [tokens[:, 0] for tokens in self._read(spans)]

    @cached_property
    def first_token_confidence(self) -> list[float]:
        """For each question the probability, in (0, 1], of the most probable token where its answer begins."""
        asked = [prompt_and_answers(question, self.data.scoring) for question in self.data.questions]
        # One token is predicted from the same row whichever answer follows; all choices are what multiple choice reads.
        spans = iter(answer_spans(self.model, asked))
        of_questions = [[next(spans) for _ in answers] for _, answers in asked]
        return [float(tokens[0, 2]) for tokens in self._read([choices[0] for choices in of_questions])]

    def gold_ranks(self, *, free_running: bool = False) -> list[tuple[Float[Tensor, " token"], ...]]:
        """For each free-form question the rank of each token of each correct answer, given the prompt and those before.

        Rank 1 is the model's own choice; of equally probable tokens the one of lower id comes first. EOS is left out.
        With `free_running` it is the rank of the j-th token at the j-th step of the model's own greedy answer, and
        infinite beyond the step at which that ends.
        """
        texts = [golds(question) for question in self.free_form]
        asked = [(question.prompt, some) for question, some in zip(self.free_form, texts, strict=True)]
        spans = generated_spans(self.model, asked)
        ranks = iter(self._free_running(spans, texts) if free_running else [part[:, 1] for part in self._read(spans)])
        return [tuple(next(ranks) for _ in some) for some in texts]

    @cached_property
    def text_rows(self) -> list[Row]:
        """Tokens of the beginning of each of the set's texts that has a token to predict."""
        return [row for row in encode_texts(self.model, self.data.texts) if len(row) > 1]

    @cached_property
    def text_log_probs(self) -> list[Float[Tensor, " token"]]:
        """Log-probability of each token but the first of each of these texts.

        Raises: DivergedError if one is NaN or infinite.
        """
        return finite([text.log_probs for text in self.texts(self.text_rows)])

    def rows_to_compare(self, count: int) -> list[Row]:
        """Tokens of the first texts, or of the first prompts of a set without texts; without those of BOS alone."""
        texts = self.data.texts or tuple(question.prompt for question in self.data.questions)
        rows = encode_texts(self.model, texts[:count])
        return [row for row in rows if len(row) > has_bos(self.model.tokenizer, row)]

    def texts(self, rows: Sequence[Row]) -> list[TextReading]:
        """What the model makes of each row."""
        new = [row for row in rows if row not in self._texts]
        self._texts.update(read_texts(self.model, new))
        return [self._texts[row] for row in rows]

    def texts_against_frozen(self, rows: Sequence[Row], *, predictions: bool = False) -> list[TextReading]:
        """The same, with cosines to the untouched model's hidden states and, if asked, how far predictions moved."""
        known = {row for row in rows if row in self._texts and self._texts[row].cosines is not None}
        if predictions:
            known = {row for row in known if self._texts[row].moved is not None}
        new = [row for row in rows if row not in known]
        compared = read_texts(self.model, new, against_frozen=True, predictions=frozenset(new if predictions else ()))
        self._texts.update(compared)
        return [self._texts[row] for row in rows]

    def _read(self, spans: Sequence[Span]) -> list[Float[Tensor, "token 3"]]:
        new = [span for span in dict.fromkeys(spans) if span not in self._tokens]
        self._tokens.update(zip(new, read_spans(self.model.model, new, _of_tokens), strict=True))
        return [self._tokens[span] for span in spans]

    def _free_running(self, golds_spans: Sequence[Span], texts: Sequence[Sequence[str]]) -> list[Tensor]:
        wanted = [span.ids[span.start :] for span in golds_spans]
        own = [said for said, some in zip(self.greedy, texts, strict=True) for _ in some]
        ranks = read_spans(self.model.model, own, _ranks, wanted=wanted)
        pairs = zip(ranks, wanted, strict=True)
        return [nn.functional.pad(found, (0, len(ids) - len(found)), value=math.inf) for found, ids in pairs]

    def _generate(self, seed: str | None) -> list[Span]:
        prompts = [question.prompt for question in self.free_form]
        return continue_prompts(self.model, prompts, self._budgets(), seed=seed)

    def _budgets(self) -> list[int]:
        tokenizer = self.model.tokenizer
        texts = sorted({f" {gold}" for question in self.free_form for gold in golds(question)})
        rows = encode(tokenizer, texts)
        lengths = {text: len(row) - has_bos(tokenizer, row) for text, row in zip(texts, rows, strict=True)}
        longest = [max((lengths[f" {gold}"] for gold in golds(question)), default=0) for question in self.free_form]
        limit = max(1, context_length(self.model.model) // 2)
        return [min(limit, max(FEWEST_NEW_TOKENS, 2 * length + 8)) for length in longest]


def _of_tokens(logits: Float[Tensor, "token vocab"], ids: Int[Tensor, " token"]) -> Float[Tensor, "token 3"]:
    """Of each token its log-probability, its rank, and the probability of the most probable one in its place."""
    highest = logits.float().softmax(-1).amax(-1)
    return torch.stack([token_log_probs(logits, ids), _ranks(logits, ids), highest], dim=-1)


def _ranks(logits: Float[Tensor, "token vocab"], ids: Int[Tensor, " token"]) -> Float[Tensor, " token"]:
    """Rank of each token in its place; NaN where the logits are not numbers."""
    wanted = ids[:, None]
    own = logits.gather(1, wanted)
    lower = torch.arange(logits.shape[1], device=logits.device) < wanted
    ranks = 1.0 + (logits > own).sum(1) + ((logits == own) & lower).sum(1)
    return ranks.masked_fill(~logits.amax(1).isfinite(), math.nan)
