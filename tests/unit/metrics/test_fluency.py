"""Entropy of answers, and how improbable the untouched model finds them."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.inference.spans import Span
from lethe.metrics._ngrams import ngrams, words
from lethe.metrics.fluency import NgramEntropy
from lethe.metrics.perplexity import AnswerPerplexity
from lethe.types import Question
from rigged_models import OF, answering, bigram, edited, random_llama, retain_set, tiny_tokenizer

QUESTIONS = tuple(Question(prompt=f"{thing} is", answer="red") for thing in ("ab", "cd", "a b", "ef g", "h"))
DATA = retain_set(questions=QUESTIONS, scoring="cloze")


def test_words_and_their_runs() -> None:
    assert words("It's 5 o'Clock, STRASSE straße.") == [
        "it",
        "'",
        "s",
        "5",
        "o",
        "'",
        "clock",
        ",",
        "strasse",
        "strasse",
        ".",
    ]
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a", "b", "c"], 3) == [("a", "b", "c")]
    assert ngrams(["a"], 2) == []


@pytest.fixture
def say() -> Callable[..., float]:
    """The metric's value where the model gives these answers to its questions."""

    def entropy(*texts: Sequence[str]) -> float:
        subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
        scores = NgramEntropy()(answering(subject, DATA, texts))
        assert scores is not None
        return scores.value

    return entropy


def naive(text: str) -> float:
    said = text.split()
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))
        count = sum(grams.values())
        total += weight * sum(-f / count * math.log2(f / count) for f in grams.values())
    return total / 2


def test_entropy_is_in_bits_and_weighted(say: Callable[..., float]) -> None:
    # Four different bigrams and three trigrams: 2 bits and log2(3) bits.
    assert say(["a b c d e"]) == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    text = "to be or not to be , that is to be the question to be or not"
    assert say([text]) == pytest.approx(naive(text))
    assert say([text], ["a b c d e"]) == pytest.approx((naive(text) + naive("a b c d e")) / 2)
    assert say([text, "a b c d e"]) == pytest.approx((naive(text) + naive("a b c d e")) / 2)


def test_no_variety_is_no_entropy(say: Callable[..., float]) -> None:
    for text in ("", "one", "one two", "no no no no no no"):
        value = say([text])
        assert value == 0
        assert math.copysign(1, value) == 1


def test_the_answers_perplexity_is_the_untouched_models() -> None:
    subject, untouched = edited(random_llama(), 1), random_llama()
    for samples in (0, 3):
        reading = Reading(subject, DATA, samples=samples)
        losses = []
        for spans in reading.continuations:
            each = []
            for span in spans:
                with torch.no_grad():
                    rows = untouched(torch.tensor([span.ids])).logits[0].double().log_softmax(-1)
                asked = range(span.start, len(span.ids))
                each.append(-statistics.fmean(float(rows[place - 1, span.ids[place]]) for place in asked))
            losses.append(statistics.fmean(each))
        scores = AnswerPerplexity()(reading)
        assert scores is not None
        assert scores.per_example == pytest.approx(losses, rel=1e-4)
        assert scores.value == pytest.approx(math.exp(sorted(losses)[2]), rel=1e-4)
        assert scores.n == 5
        assert scores.stderr > 0


def test_gibberish_is_improbable_and_one_wild_answer_does_not_count() -> None:
    subject = bigram({"a": {"b": 0.5}, "b": {"a": 0.5}})
    tame = Span(ids=(0, OF["a"], OF["b"], OF["a"]), start=2)
    wild = Span(ids=(0, OF["a"], OF["z"], OF["z"]), start=2)

    def perplexity(*spans: Span) -> float:
        reading = Reading(subject, DATA)
        reading.__dict__["continuations"] = [(span,) for span in spans]
        scores = AnswerPerplexity()(reading)
        assert scores is not None
        return scores.value

    assert perplexity(tame) == pytest.approx(2, rel=1e-4)
    assert perplexity(tame, wild, tame) == pytest.approx(2, rel=1e-4)
    assert perplexity(wild) > 100


def test_the_spread_of_the_median_is_that_of_other_questions() -> None:
    rng = torch.Generator().manual_seed(0)
    draws = (torch.randn(60, generator=rng) * 0.3 + 2).tolist()
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    with pytest.MonkeyPatch.context() as patched:
        reading = Reading(subject, DATA)
        reading.__dict__["continuations"] = [(Span(ids=(0, 1), start=1),)] * 60
        patched.setattr("lethe.metrics.perplexity.log_probs", lambda *_: [torch.tensor([-loss]) for loss in draws])
        scores = AnswerPerplexity()(reading)
    assert scores is not None
    # A median of n Gaussian values spreads by 1.2533 sigma / sqrt(n).
    assert scores.stderr == pytest.approx(scores.value * 1.2533 * 0.3 / math.sqrt(60), rel=0.4)


def test_without_questions_neither_is_measured() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    for metric in (NgramEntropy(), AnswerPerplexity()):
        assert metric(Reading(subject, retain_set(texts=("one",)))) is None
