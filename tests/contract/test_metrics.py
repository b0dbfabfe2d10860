"""What every metric promises, tried on each one that is found: a new file in metrics/ needs no test of its own here."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lethe import metrics
from lethe.protocols import Combination, Metric, Subject, discover
from lethe.types import EvalSet, Question, Scores

METRICS = {name: kind for name, kind in discover(metrics).items() if isinstance(kind(), Metric)}
COMBINATIONS = {name: kind for name, kind in discover(metrics).items() if isinstance(kind(), Combination)}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
COLOURS = ("red", "green", "blue", "grey")
QUESTIONS = tuple(
    Question(prompt=f"The colour of {thing} is", answer=colour, choices=COLOURS, topic="colours")
    for thing, colour in zip(("oil", "a frog", "the deep sea", "lead", "wine", "fog"), COLOURS * 2, strict=False)
)
FREE = tuple(replace(question, choices=(), accepted=("clear",)) for question in QUESTIONS)
TEXTS = ("A frog sat still.", "Oil floats.", "Lead sinks, and wine does not.", "Fog.")
WORDS: dict[str, Any] = {"keywords": ("oil", "wine"), "neutral": ("ink", "milk")}
SETS = {
    "cloze": EvalSet(name="retain", questions=QUESTIONS, texts=TEXTS, scoring="cloze", **WORDS),
    "letter": EvalSet(name="retain", questions=QUESTIONS, texts=TEXTS, scoring="letter", **WORDS),
    "free-form": EvalSet(name="unknown", questions=FREE, texts=TEXTS),
    "questions alone": EvalSet(name="adjacent", questions=QUESTIONS, scoring="cloze", **WORDS),
    "texts alone": EvalSet(name="adjacent", texts=TEXTS),
    "sampled": EvalSet(name="unknown", questions=FREE, texts=TEXTS, samples=2, seed=5, free_running=True),
    "one of each": EvalSet(name="retain", questions=QUESTIONS[:1], texts=TEXTS[:1]),
}
# Metrics whose value is the plain mean over examples.
MEANS = set(METRICS) - {"perplexity", "distinct2"}


@pytest.fixture(params=METRICS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SETS)
def data(request: pytest.FixtureRequest) -> EvalSet:
    return SETS[request.param]


@pytest.fixture
def subject(tiny_model: Callable[..., PreTrainedModel]) -> Subject:
    """An edited model: one matrix is not what it was."""
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *LETTERS])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    model = tiny_model(vocab_size=2 + len(LETTERS), max_position_embeddings=256, bos_token_id=0, eos_token_id=1)
    assert model.generation_config is not None
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.3)
    edited = "model.layers.2.mlp.down_proj.weight"
    originals = {edited: model.get_parameter(edited).detach().clone()}
    with torch.no_grad():
        model.get_parameter(edited).mul_(-1)
    return Subject(model=model, tokenizer=tokenizer, originals=originals)


def state_of(subject: Subject) -> dict[str, Any]:
    """Everything that measuring might disturb."""
    model = subject.model
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "originals": {name: value.clone() for name, value in subject.originals.items()},
        "gradients": [parameter.grad is not None for parameter in model.parameters()],
        "wants gradients": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),  # type: ignore[union-attr]
        "tokenizer": (subject.tokenizer.padding_side, subject.tokenizer.truncation_side, len(subject.tokenizer)),
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part, value in before.items():
        if part in ("weights", "originals"):
            assert value.keys() == after[part].keys()
            assert all(torch.equal(value[name], after[part][name]) for name in value), part
        elif part == "random":
            assert torch.equal(value, after[part]), part
        else:
            assert value == after[part], part


def several(scores: Scores | Mapping[str, Scores] | None) -> Mapping[str, Scores]:
    return {"": scores} if isinstance(scores, Scores) else scores or {}


def test_there_are_metrics() -> None:
    assert {"multiple-choice", "exact-match", "perplexity", "answer-confidence", "activation-norm"} <= set(METRICS)


def test_it_is_a_frozen_dataclass_with_a_default_for_every_setting(name: str) -> None:
    kind = METRICS[name]
    assert isinstance(kind(), Metric)
    assert kind() == kind()
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(kind))


def test_it_says_what_it_measures_and_where_it_comes_from(name: str) -> None:
    assert METRICS[name].source  # type: ignore[attr-defined]
    text = inspect.getdoc(METRICS[name]) or ""
    assert not text.startswith(METRICS[name].__name__ + "("), "the docstring that dataclasses make up"
    assert "." in text


def test_its_numbers_can_be_trusted(name: str, data: EvalSet, subject: Subject) -> None:
    for scores in several(METRICS[name]()(subject, data)).values():
        assert isinstance(scores, Scores)
        assert math.isfinite(scores.value)
        assert math.isfinite(scores.stderr)
        assert scores.stderr >= 0
        assert scores.n >= 1
        assert scores.better in ("higher", "lower", "neither")
        assert len(scores.per_example) in (0, scores.n)
        assert all(map(math.isfinite, (*scores.per_example, *scores.by_layer)))
        assert scores.chance is None or 0 < scores.chance < 1
        assert len(scores.by_layer) in (0, subject.model.config.num_hidden_layers)
        if name in MEANS:
            assert scores.value == pytest.approx(sum(scores.per_example) / scores.n, rel=1e-9)
        if scores.n == 1:
            assert scores.stderr == 0


def test_it_measures_every_kind_of_set_that_it_should(name: str, subject: Subject) -> None:
    measured = {kind for kind, data in SETS.items() if METRICS[name]()(subject, data) is not None}
    assert measured, "it measures nothing"
    if measured >= {"questions alone", "texts alone"}:
        assert measured == set(SETS)


def test_an_empty_set_gives_none(name: str, subject: Subject) -> None:
    assert METRICS[name]()(subject, EvalSet(name="forget")) is None


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_everything_as_it_was(name: str, training: bool, subject: Subject) -> None:
    subject.model.train(training)
    subject.model.model.layers[1].train(not training)
    try:
        before = state_of(subject)
        METRICS[name]()(subject, SETS["cloze"])
        assert_same(before, state_of(subject))
    finally:
        subject.model.eval()


def test_it_leaves_everything_as_it_was_when_it_fails(
    name: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    before = state_of(subject)
    with monkeypatch.context() as patched:
        patched.setattr(subject.model.model.layers[3], "forward", fail)
        with pytest.raises(RuntimeError, match=r"^no$"):
            METRICS[name]()(subject, SETS["cloze"])
    assert_same(before, state_of(subject))


def test_it_gives_the_same_twice(name: str, data: EvalSet, subject: Subject) -> None:
    torch.manual_seed(0)
    first = METRICS[name]()(subject, data)
    torch.manual_seed(1)
    # Another subject of the same model: nothing that was generated for the first one is known to it.
    assert METRICS[name]()(replace(subject, known={}), data) == first


def test_the_order_of_a_set_does_not_matter(name: str, subject: Subject) -> None:
    data = SETS["cloze"]
    turned = replace(data, questions=data.questions[::-1], texts=data.texts[::-1])
    here, there = METRICS[name]()(subject, data), METRICS[name]()(subject, turned)
    assert several(here).keys() == several(there).keys() != set()
    for part, scores in several(here).items():
        other = several(there)[part]
        assert other.value == pytest.approx(scores.value, rel=1e-6)
        assert other.per_example[::-1] == pytest.approx(scores.per_example, rel=1e-5)


def test_a_combination_is_documented_and_needs_what_it_combines() -> None:
    assert COMBINATIONS.keys() | METRICS.keys() == discover(metrics).keys()
    for name, kind in COMBINATIONS.items():
        assert kind().source, name
        assert inspect.getdoc(kind), name
        assert kind().combine({}) is None, name
