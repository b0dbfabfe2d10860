"""What every metric promises, tried on each one that is found: a new file in metrics/ needs no test of its own here."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lethe import metrics
from lethe.cli import listing
from lethe.evaluation.measure import measure, metrics_of
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Combination, Metric
from lethe.report import record, words
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question, Scores, Unit

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
SOLVED = "Question: What is mud?\nAnswer: brown\n\n"
TOFU_LIKE = tuple(
    Question(
        prompt=f"{SOLVED}Question: What is {thing}?\nAnswer:",
        answer=f"It is {colour}.",
        paraphrase=f"The colour is {colour}.",
        perturbed=tuple(f"The colour is {other}." for other in COLOURS if other != colour),
    )
    for thing, colour in zip(("oil", "a frog", "lead", "wine"), COLOURS, strict=True)
)
PASSAGES = (("A frog sat", "still, and it was green."), ("Oil", "floats. Lead does not."), ("Fog is", "grey."))
HOLDOUT = ("A toad ran.", "Tar sticks.", "Tin rings, and gin does not.", "Dew.")
SETTINGS: dict[str, Any] = {"keywords": ("oil", "wine"), "neutral": ("ink", "milk")}
SETS = {
    "cloze": EvalSet(name="retain", role="keep", questions=QUESTIONS, texts=TEXTS, scoring="cloze"),
    "letter": EvalSet(name="retain", role="keep", questions=QUESTIONS, texts=TEXTS, scoring="letter"),
    "free-form": EvalSet(name="unknown", role="neither", questions=FREE, texts=TEXTS),
    "questions alone": EvalSet(name="adjacent", role="keep", questions=QUESTIONS, scoring="cloze"),
    "texts alone": EvalSet(name="adjacent", role="keep", texts=TEXTS),
    "sampled": EvalSet(name="unknown", role="neither", questions=FREE, texts=TEXTS),
    "one of each": EvalSet(name="retain", role="keep", questions=QUESTIONS[:1], texts=TEXTS[:1]),
    "everything": EvalSet(
        name="forget",
        role="forget",
        questions=QUESTIONS + TOFU_LIKE,
        texts=TEXTS,
        scoring="cloze",
        passages=PASSAGES,
        holdout=HOLDOUT,
    ),
}
BETTER = {"more": "higher", "less": "lower", "neither": "neither"}
# Metrics that a plain set brings too little for.
DEMANDING = {"entailment", "forget-quality", "knowmem", "membership", "priv-leak", "truth-ratio", "verbmem"}
# Metrics whose value is the plain mean over examples.
MEANS = set(METRICS) - {"perplexity", "answer-perplexity", "distinct2", "forget-quality", "priv-leak"}


@pytest.fixture(scope="module", autouse=True)
def _judge(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A random model of natural language inference for the set that has everything."""
    folder = tmp_path_factory.mktemp("nli")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *COLOURS, "is", "It"])}
    raw = Tokenizer(models.WordLevel(vocab=words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "entailment", 1: "neutral"},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    SETTINGS["nli"] = folder


def metric(name: str) -> Metric:
    """The metric, with settings that give it something to do."""
    return metrics_of([name.replace("-", "_")], **SETTINGS)[name.replace("-", "_")]  # type: ignore[return-value]


def read(subject: LoadedModel, data: EvalSet) -> Reading:
    sampled = {"samples": 2, "seed": 5} if data is SETS["sampled"] else {}
    return Reading(subject, data, **sampled)


@pytest.fixture(params=METRICS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=SETS)
def data(request: pytest.FixtureRequest) -> EvalSet:
    return SETS[request.param]


@pytest.fixture
def subject(tiny_model: Callable[..., PreTrainedModel]) -> LoadedModel:
    """An edited model, one matrix of which is not what it was, and one that never saw the forget set."""
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *LETTERS])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    shape = {"vocab_size": 2 + len(LETTERS), "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    retain_only = LoadedModel(model=tiny_model(seed=1, **shape), tokenizer=tokenizer)
    model = tiny_model(**shape)
    assert model.generation_config is not None
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.3)
    edited = "model.layers.2.mlp.down_proj.weight"
    originals = {edited: model.get_parameter(edited).detach().clone()}
    with torch.no_grad():
        model.get_parameter(edited).mul_(-1)
    return LoadedModel(model=model, tokenizer=tokenizer, originals=originals, retain_only=retain_only)


def state_of(subject: LoadedModel) -> dict[str, Any]:
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


def plenty(name: str) -> EvalSet:
    """A set that the metric measures."""
    return SETS["everything" if name in DEMANDING else "cloze"]


def several(scores: Scores | Mapping[str, Scores] | None) -> Mapping[str, Scores]:
    return {"": scores} if isinstance(scores, Scores) else scores or {}


def test_there_are_metrics() -> None:
    assert {"multiple-choice", "exact-match", "perplexity", "answer-confidence", "activation-norm"} <= set(METRICS)
    assert set(METRICS) | set(COMBINATIONS) == set(discover(metrics)), "one states too little to be a metric"


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


def test_it_says_which_way_is_good_what_chance_gives_and_what_it_needs(name: str, subject: LoadedModel) -> None:
    kind: Any = METRICS[name]
    assert kind.higher_means in BETTER
    assert kind.unit in get_args(Unit)
    assert kind.needs
    data = plenty(name)
    # On a retain set, if the metric measures one: on a forget set what is good may be the other end.
    parts = several(metric(name)(read(subject, replace(data, role="keep")))) or several(
        metric(name)(read(subject, data))
    )
    # Of several scores the one without a name of its own speaks for the metric.
    for scores in [parts[""]] if "" in parts else parts.values():
        assert scores.better == BETTER[kind.higher_means]
        assert kind.chance or scores.chance is None


def test_its_numbers_can_be_trusted(name: str, data: EvalSet, subject: LoadedModel) -> None:
    for scores in several(metric(name)(read(subject, data))).values():
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


def test_it_measures_every_kind_of_set_that_it_should(name: str, subject: LoadedModel) -> None:
    measured = {kind for kind, data in SETS.items() if metric(name)(read(subject, data)) is not None}
    assert measured, "it measures nothing"
    if measured >= {"questions alone", "texts alone"}:
        assert measured == set(SETS)


def test_an_empty_set_gives_none(name: str, subject: LoadedModel) -> None:
    assert metric(name)(read(subject, EvalSet(name="forget", role="forget"))) is None


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_everything_as_it_was(name: str, training: bool, subject: LoadedModel) -> None:
    subject.model.train(training)
    subject.model.model.layers[1].train(not training)
    try:
        before = state_of(subject)
        metric(name)(read(subject, plenty(name)))
        assert_same(before, state_of(subject))
    finally:
        subject.model.eval()


def test_it_leaves_everything_as_it_was_when_it_fails(
    name: str, subject: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    before = state_of(subject)
    with monkeypatch.context() as patched:
        patched.setattr(subject.model.model.layers[3], "forward", fail)
        with pytest.raises(RuntimeError, match=r"^no$"):
            metric(name)(read(subject, plenty(name)))
    assert_same(before, state_of(subject))


def test_it_gives_the_same_twice(name: str, data: EvalSet, subject: LoadedModel) -> None:
    torch.manual_seed(0)
    first = metric(name)(read(subject, data))
    torch.manual_seed(1)
    # Another subject of the same model: nothing that was generated for the first one is known to it.
    assert metric(name)(read(subject, data)) == first


def test_the_order_of_a_set_does_not_matter(name: str, subject: LoadedModel) -> None:
    data = plenty(name)
    turned = replace(data, questions=data.questions[::-1], texts=data.texts[::-1], passages=data.passages[::-1])
    here, there = metric(name)(read(subject, data)), metric(name)(read(subject, turned))
    assert several(here).keys() == several(there).keys() != set()
    for part, scores in several(here).items():
        other = several(there)[part]
        assert other.value == pytest.approx(scores.value, rel=1e-6)
        assert other.per_example[::-1] == pytest.approx(scores.per_example, rel=1e-5)


def test_a_combination_is_documented_and_needs_what_it_combines() -> None:
    assert COMBINATIONS.keys() | METRICS.keys() == discover(metrics).keys()
    for name, kind in COMBINATIONS.items():
        assert kind().source, name
        assert kind().higher_means in BETTER, name
        assert kind().needs, name
        assert isinstance(kind().chance, str), name
        assert inspect.getdoc(kind), name
        assert kind().combine({}) is None, name


def test_the_list_of_metrics_says_what_each_needs() -> None:
    rows = listing.metrics_table().as_rows()
    assert [row["metric"] for row in rows] == [name.replace("-", "_") for name in discover(metrics)]
    found = {row["metric"]: row for row in rows}
    assert found["multiple_choice"]["needs"] == "questions with choices"
    assert found["multiple_choice"]["chance_level"] == "1 / number of choices"
    assert found["perplexity"]["higher_means"] == "less knowledge"
    assert found["activation_norm"]["higher_means"] == ""
    assert found["exact_match"]["unit"] == "share"


def test_reports_have_words_for_no_metric_that_is_gone() -> None:
    known = tuple(name.replace("-", "_") for name in discover(metrics))
    for name in words.FEATURED:
        assert name.startswith(known), name


def test_one_score_reads_the_same_everywhere(subject: LoadedModel) -> None:
    """What a record keeps is enough: its unit and label come from the metric."""
    found = measure(subject, [SETS["everything"], SETS["cloze"]], metrics_of(**SETTINGS))
    again = record.scores({name: score.summary() for name, score in found.items()})
    for name, score in found.items():
        assert words.with_error(again[name]) == words.with_error(score)
        assert again[name] == replace(score, per_example=())
    assert words.spoken("priv_leak", found["priv_leak/forget"]) == "privacy leakage (PrivLeak)"
    assert words.spoken("membership_min_k", found["membership_min_k/forget"]) == "membership by Min-K"
    assert words.spoken("exact_match", found["exact_match/retain"]) == "exact match"
    assert words.with_error(found["membership_loss/forget"]).endswith("%")
    assert not words.is_share(found["ngram_entropy/retain"])
    assert words.is_share(found["entailment/forget"], found["refusal_rate/retain"])
