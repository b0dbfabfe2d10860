"""Membership attacks against second implementations, and the area under the curve against counted pairs."""

import itertools
import math
import statistics
import zlib
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from lethe.errors import InvalidValueError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics import _membership
from lethe.metrics.membership import Membership
from lethe.model.hidden_cache import HiddenCache
from lethe.model.recordings import Store
from lethe.types import EvalSet, Scores
from rigged_models import edited, forget_set, random_llama, tiny_tokenizer

MEMBERS = ("one short text", "another text, a little longer", "x: y", "one short text")
HOLDOUT = ("a text that was kept aside", "ha", "z z z z z z z z", "so it goes on, and on", "Q")


def data(**changes: object) -> EvalSet:
    return replace(forget_set(texts=MEMBERS, holdout=HOLDOUT), **changes)  # type: ignore[arg-type]


def measure(subject: LoadedModel, found: EvalSet | None = None) -> dict[str, Scores]:
    scores = Membership()(Reading(subject, found or data()))
    assert scores is not None
    return dict(scores)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    rng = torch.Generator().manual_seed(0)
    members = torch.randint(0, 9, (7,), generator=rng).double().tolist()
    holdout = torch.randint(2, 12, (11,), generator=rng).double().tolist()
    pairs = [1.0 if h > m else 0.5 if h == m else 0.0 for m, h in itertools.product(members, holdout)]
    found = _membership.auc(members, holdout)
    assert 0.5 in pairs
    assert found.value == pytest.approx(sum(pairs) / len(pairs))
    assert found.per_example == pytest.approx([statistics.fmean(pairs[i * 11 : i * 11 + 11]) for i in range(7)])
    assert (found.n, found.better, found.chance) == (7, "higher", 0.5)
    assert _membership.auc(holdout, members).value == pytest.approx(1 - found.value)
    assert _membership.auc([1.0], [2.0]) == _membership.auc([0.0], [9.0])
    assert (_membership.auc([1.0], [2.0]).value, _membership.auc([1.0], [2.0]).stderr) == (1.0, 0.0)


def test_the_standard_error_of_the_area_is_its_spread_over_samples() -> None:
    rng = torch.Generator().manual_seed(1)
    drawn = [
        _membership.auc(torch.randn(40, generator=rng).tolist(), (torch.randn(25, generator=rng) + 0.8).tolist())
        for _ in range(300)
    ]
    # 300 draws give the spread within 4 %, one standard deviation.
    assert statistics.fmean(found.stderr for found in drawn) == pytest.approx(
        statistics.stdev(found.value for found in drawn), rel=0.12
    )


def test_an_area_needs_both_groups() -> None:
    for groups in (([], [1.0]), ([1.0], [])):
        with pytest.raises(InvalidValueError, match="membership needs texts of both groups"):
            _membership.auc(*groups)


@pytest.mark.parametrize(("share", "expected"), [(0.4, 4.5), (0.2, 5.0), (0.01, 5.0), (1.0, 3.0), (0.79, 4.0)])
def test_min_k_is_the_mean_of_the_lowest(share: float, expected: float) -> None:
    assert _membership.min_k(torch.tensor([-4.0, -1.0, -5.0, -2.0, -3.0]), share) == expected


def test_min_k_refuses_what_it_cannot_take() -> None:
    with pytest.raises(InvalidValueError, match=r"must be in \(0, 1\]. Got 40.0"):
        _membership.min_k(torch.ones(3), 40.0)
    with pytest.raises(InvalidValueError, match="needs a token"):
        _membership.min_k(torch.ones(0))


def test_min_k_plus_plus_stays_finite_where_a_prediction_is_certain() -> None:
    zeros = torch.zeros(2)
    assert _membership.min_k_plus_plus(zeros, zeros, zeros) == 0.0
    assert _membership.min_k_plus_plus(zeros - 1, zeros, zeros, 1.0) == pytest.approx(1e3)


def naive(model: LlamaForCausalLM, other: LlamaForCausalLM, text: str) -> dict[str, float]:
    """Every score of one text, by loops and the formulas alone."""
    ids = tiny_tokenizer()(text)["input_ids"]

    def predict(which: LlamaForCausalLM) -> list[dict[int, float]]:
        logits = which(torch.tensor([ids])).logits[0, :-1].double()
        return [dict(enumerate(row.log_softmax(-1).tolist())) for row in logits]

    rows = predict(model)
    own = [row[token] for row, token in zip(rows, ids[1:], strict=True)]
    its = [row[token] for row, token in zip(predict(other), ids[1:], strict=True)]
    scores = []
    for row, value in zip(rows, own, strict=True):
        mean = sum(math.exp(log) * log for log in row.values())
        square = sum(math.exp(log) * log**2 for log in row.values())
        scores.append((value - mean) / math.sqrt(square - mean**2))
    lowest = max(1, math.floor(0.4 * len(own)))
    model.zero_grad()
    (-model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(own)), ids[1:]].mean()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return {
        "_loss": -statistics.fmean(own),
        "_zlib": -statistics.fmean(own) / len(zlib.compress(text.encode())),
        "_reference": statistics.fmean(its) - statistics.fmean(own),
        "_min_k": -statistics.fmean(sorted(own)[:lowest]),
        "_min_k_plus_plus": -statistics.fmean(sorted(scores)[:lowest]),
        "_grad_norm": statistics.fmean(float(found.norm()) for found in gradients if found is not None),
    }


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    other = random_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return random_llama(), other


def test_every_attack_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = models()
    seen: list[tuple[list[float], list[float]]] = []

    def note(members: list[float], holdout: list[float]) -> Scores:
        seen.append((members, holdout))
        return Scores(value=0.0, stderr=0.0, n=4, better="higher")

    expected = {text: naive(model, other, text) for text in (*MEMBERS, *HOLDOUT)}
    monkeypatch.setattr(_membership, "auc", note)
    # Texts of more tokens than are looked at together.
    monkeypatch.setattr("lethe.inference.log_probs.LOGITS_AT_ONCE", 3 * 264)
    tokenizer = tiny_tokenizer()
    found = measure(
        LoadedModel(model=model, tokenizer=tokenizer, retain_only=LoadedModel(model=other, tokenizer=tokenizer))
    )
    assert found.keys() == expected["x: y"].keys()
    for name, (members, holdout) in zip(found, seen, strict=True):
        assert members == pytest.approx([expected[text][name] for text in MEMBERS], rel=1e-4), name
        assert holdout == pytest.approx([expected[text][name] for text in HOLDOUT], rel=1e-4), name


def test_a_model_that_learnt_the_texts_by_heart_gives_itself_away() -> None:
    model, other = models()
    tokenizer = tiny_tokenizer()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        for text in set(MEMBERS):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    model.zero_grad()
    reference = LoadedModel(model=other, tokenizer=tokenizer)
    knows = measure(LoadedModel(model=model, tokenizer=tokenizer, retain_only=reference))
    assert all(scores.value > 0.85 for scores in knows.values()), {k: v.value for k, v in knows.items()}
    turned = measure(LoadedModel(model=model, tokenizer=tokenizer), data(texts=HOLDOUT, holdout=MEMBERS))
    assert "_reference" not in turned
    assert all(scores.value == pytest.approx(1 - knows[name].value) for name, scores in turned.items())


def test_without_a_holdout_set_or_texts_it_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    assert Membership()(Reading(subject, data(holdout=("",)))) is None
    # Nor is anything read for it: this is the common case.
    monkeypatch.setattr("lethe.metrics.membership.read_spans", None)
    assert Membership()(Reading(subject, data(holdout=()))) is None
    assert Membership()(Reading(subject, data(texts=()))) is None


def test_gradients_and_what_wants_them_stay_as_they_were() -> None:
    subject = edited(random_llama(), 1)
    first, second, *rest = subject.model.parameters()
    for parameter in rest:
        parameter.requires_grad_(False)
    first.grad = torch.ones_like(first)
    kept = first.grad
    found = measure(subject)
    assert first.grad is kept
    assert torch.equal(kept, torch.ones_like(first))
    assert second.grad is None
    assert [parameter.requires_grad for parameter in subject.model.parameters()] == [True, True] + [False] * len(rest)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in subject.model.parameters())
    first.grad = None
    assert measure(subject) == found


def test_layers_below_the_edit_count_though_other_metrics_pass_them_by() -> None:
    subject = edited(random_llama(), 3)
    alone = measure(subject)
    starts = HiddenCache([3], Store(10**8))
    with starts.reading(subject.model, 3):
        assert measure(subject) == alone
        assert measure(subject) == alone
    assert starts.served > 0
