"""Drift of predictions against a loop over two models, one text at a time."""

import math
import statistics

import pytest
import torch

from lethe.errors import DivergedError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.divergence import KlToFrozen, TopOneAgreement
from lethe.types import EvalSet
from rigged_models import TEXTS, bigram, edited, random_llama, retain_set, tiny_tokenizer

DATA = retain_set(texts=(*TEXTS, TEXTS[0], ""))


def test_both_are_means_over_the_tokens_of_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lethe.inference.text_pass.POSITIONS", 4)
    monkeypatch.setattr("lethe.inference.text_pass.TOKENS_ON_CPU", 40)
    subject, untouched = edited(random_llama(), 1), random_llama()
    # Less of the edit, so that some predictions stay.
    name, value = next(iter(subject.originals.items()))
    with torch.no_grad():
        subject.model.get_parameter(name).lerp_(value, 0.8)
    divergences, agreements = [], []
    for text in DATA.texts[:-1]:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            rows = zip(untouched(ids).logits[0].double(), subject.model(ids).logits[0].double(), strict=True)
        each = [(p.softmax(-1), q.softmax(-1)) for p, q in rows][:-1]
        divergences.append(
            statistics.fmean(
                sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) for p, q in each
            )
        )
        agreements.append(statistics.fmean(float(p.argmax() == q.argmax()) for p, q in each))
    kl, agreement = KlToFrozen()(Reading(subject, DATA)), TopOneAgreement()(Reading(subject, DATA))
    assert kl is not None
    assert agreement is not None
    assert kl.per_example == pytest.approx(divergences, rel=1e-4)
    assert agreement.per_example == pytest.approx(agreements)
    assert kl.value == pytest.approx(statistics.fmean(divergences), rel=1e-4)
    assert kl.stderr == pytest.approx(statistics.stdev(divergences) / math.sqrt(5), rel=1e-4)
    assert 0 < agreement.value < 1


def test_known_predictions_give_a_known_divergence() -> None:
    before = bigram({"a": {"b": 0.8, "c": 0.1}, "b": {"a": 0.6}, "c": {"a": 0.9}})
    after = bigram({"a": {"b": 0.4, "c": 0.5}, "b": {"a": 0.6}, "c": {"a": 0.9}})
    name = "lm_head.weight"
    subject = LoadedModel(
        model=after.model, tokenizer=after.tokenizer, originals={name: before.model.get_parameter(name).detach()}
    )
    # After BOS and after b nothing moved; after a it did.
    data = retain_set(texts=("bab",))
    kl, agreement = KlToFrozen()(Reading(subject, data)), TopOneAgreement()(Reading(subject, data))
    assert kl is not None
    assert agreement is not None
    assert kl.value == pytest.approx((0.8 * math.log(2) + 0.1 * math.log(0.2)) / 3, abs=1e-4)
    assert agreement.value == pytest.approx(2 / 3)


def test_an_unedited_model_has_not_moved() -> None:
    same = edited(random_llama(), 1)
    name, value = next(iter(same.originals.items()))
    with torch.no_grad():
        same.model.get_parameter(name).copy_(value)
    for subject in (LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer()), same):
        for metric, expected in ((KlToFrozen(), 0.0), (TopOneAgreement(), 1.0)):
            scores = metric(Reading(subject, DATA))
            assert scores is not None
            assert (scores.value, scores.stderr, scores.n) == (expected, 0.0, 5)


def test_a_broken_model_is_an_error() -> None:
    subject = edited(random_llama(), 1)
    with torch.no_grad():
        subject.model.get_parameter(next(iter(subject.originals)))[0] = math.nan
    with pytest.raises(DivergedError, match="NaN or infinite"):
        KlToFrozen()(Reading(subject, DATA))


def test_without_a_text_to_keep_it_is_not_measured() -> None:
    subject = edited(random_llama(), 1)
    assert KlToFrozen()(Reading(subject, retain_set(texts=("",)))) is None
    for name in ("forget", "earlier"):
        assert KlToFrozen()(Reading(subject, EvalSet(name=name, role="forget", texts=TEXTS))) is None
        assert TopOneAgreement()(Reading(subject, EvalSet(name=name, role="forget", texts=TEXTS))) is None


def test_the_first_texts_are_read() -> None:
    scores = KlToFrozen(texts=2)(Reading(edited(random_llama(), 1), DATA))
    assert scores is not None
    assert scores.n == 2
    assert scores == KlToFrozen()(Reading(edited(random_llama(), 1), retain_set(texts=TEXTS[:2])))
