"""TOFU: its files as sets, its metrics by hand and against a second implementation, and the example that runs it."""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from transformers import PreTrainedModel

from lethe import suites
from lethe.errors import InvalidValueError, QuestionError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.answer_probability import AnswerProbability
from lethe.metrics.forget_quality import ForgetQuality
from lethe.metrics.model_utility import ModelUtility
from lethe.metrics.protocol import Metric
from lethe.metrics.truth_ratio import TruthRatio
from lethe.suites.protocol import Suite
from lethe.suites.tofu import TOFU
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question, Scores
from rigged_models import bigram, tiny_tokenizer

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data" / "tofu"
needs_data = pytest.mark.skipif(not (DATA / "full.json").is_file(), reason=f"the TOFU data is not in {DATA}")
NINE = tuple(
    f"{part}/{name}"
    for part in ("answer_probability", "rouge_l_recall", "truth_ratio")
    for name in ("retain", "real_authors", "world_facts")
)


def scores_of(metric: Metric, subject: LoadedModel, data: EvalSet) -> Scores:
    scores = metric(Reading(subject, data))
    assert isinstance(scores, Scores)
    return scores


def asked(name: str, *questions: Question) -> EvalSet:
    return EvalSet(name=name, role="forget" if name == "forget" else "keep", questions=questions)


# By hand: after "q" stands a space for certain, after it a, b, c, d as chosen, after a letter "x" with 1/4.

KNOWN = bigram(
    {
        "q": {"Ġ": 1 - 1e-9},
        "Ġ": {"a": 0.5, "b": 0.2, "c": 0.1, "d": 0.05},
        **{letter: {"x": 0.25} for letter in "abcd"},
    }
)


def question(**given: Any) -> Question:
    return Question(**{"prompt": "q", "answer": "a", **given})


def test_probability_is_the_geometric_mean_over_tokens() -> None:
    data = asked("retain", question(), question(answer="bx", paraphrase="a", perturbed=("c",)))
    found = scores_of(AnswerProbability(), KNOWN, data)
    # " a" is the tokens space and a; " bx" is three.
    assert found.per_example == pytest.approx((0.5 ** (1 / 2), (0.2 * 0.25) ** (1 / 3)), rel=1e-4)
    assert (found.n, found.better, found.chance) == (2, "higher", None)


def test_probability_is_a_share_where_wrong_answers_close_the_list() -> None:
    data = asked("world_facts", question(perturbed=("b", "c", "d")))
    found = scores_of(AnswerProbability(), KNOWN, data)
    right, *wrong = (math.sqrt(chance) for chance in (0.5, 0.2, 0.1, 0.05))
    assert found.value == pytest.approx(right / (right + sum(wrong)), rel=1e-4)
    assert found.chance == 1 / 4


def test_truth_ratio_averages_the_losses_of_wrong_answers() -> None:
    true = question(answer="dx", paraphrase="b", perturbed=("c", "d"))
    false = question(paraphrase="d", perturbed=("a", "b"))
    forget = scores_of(TruthRatio(), KNOWN, asked("forget", true, false))
    other = scores_of(TruthRatio(), KNOWN, asked("retain", true, false))
    # Each text is a space and a letter, so probabilities count by their square roots.
    ratios = [math.sqrt(math.sqrt(0.1 * 0.05) / 0.2), math.sqrt(math.sqrt(0.5 * 0.2) / 0.05)]
    assert forget.per_example == pytest.approx((ratios[0], 1 / ratios[1]), rel=1e-4)
    assert other.per_example == pytest.approx((1 - ratios[0], 0), rel=1e-4)
    # Which way is good on a retain set: on the forget set, where higher is good, it is the other one.
    assert (forget.better, other.better) == ("lower", "higher")


def test_the_answer_stands_in_for_a_paraphrase() -> None:
    found = scores_of(TruthRatio(), KNOWN, asked("real_authors", question(perturbed=("b",))))
    assert found.value == pytest.approx(1 - math.sqrt(0.2 / 0.5), rel=1e-4)


def test_a_space_at_the_end_of_a_prompt_changes_nothing() -> None:
    plain, spaced = (asked("retain", question(prompt=prompt, perturbed=("b",))) for prompt in ("q", "q "))
    assert scores_of(TruthRatio(), KNOWN, spaced) == scores_of(TruthRatio(), KNOWN, plain)


def test_questions_without_wrong_answers_have_no_truth_ratio() -> None:
    assert TruthRatio()(Reading(KNOWN, asked("forget", question(paraphrase="a")))) is None
    mixed = asked("forget", question(), question(perturbed=("b",)))
    assert scores_of(TruthRatio(), KNOWN, mixed).n == 1


def test_utility_is_a_harmonic_mean_of_nine() -> None:
    values = (0.9, 0.5, 0.4, 0.8, 0.6, 0.5, 0.7, 0.3, 0.2)
    parts = {
        name: Scores(value=value, stderr=0.02, n=10, better="higher") for name, value in zip(NINE, values, strict=True)
    }
    found = ModelUtility().combine(parts | {"truth_ratio/forget": replace(parts[NINE[0]], value=0.001)})
    assert found is not None
    assert found.value == pytest.approx(9 / sum(1 / value for value in values))
    assert (found.n, found.better) == (90, "higher")
    # The slope by differences.
    slopes = []
    for name in NINE:
        moved = ModelUtility().combine(parts | {name: replace(parts[name], value=parts[name].value + 1e-6)})
        assert moved is not None
        slopes.append((moved.value - found.value) / 1e-6)
    assert found.stderr == pytest.approx(0.02 * math.hypot(*slopes), rel=1e-3)
    nothing = ModelUtility().combine(parts | {NINE[4]: replace(parts[NINE[4]], value=0.0)})
    assert nothing is not None
    assert nothing.value == 0
    for name in NINE:
        assert ModelUtility().combine({key: score for key, score in parts.items() if key != name}) is None


# A second implementation, from the formulas, on a random model


@pytest.fixture
def subject(tiny_model: Callable[..., PreTrainedModel]) -> LoadedModel:
    shape = {"vocab_size": 264, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
    retain_only = LoadedModel(model=tiny_model(seed=1, **shape), tokenizer=tiny_tokenizer())
    return LoadedModel(model=tiny_model(**shape), tokenizer=tiny_tokenizer(), retain_only=retain_only)


WORDS = ("oil", "ale", "tea of mint", "rum", "sap")
RANDOM = tuple(
    Question(
        prompt=f"Question: What does {name} sell?\nAnswer:",
        answer=f"{name} sells {WORDS[number % 5]}.",
        paraphrase=f"It is {WORDS[number % 5]} that {name} sells.",
        perturbed=tuple(f"It is {WORDS[(number + step) % 5]} that {name} sells." for step in (1, 2, 3)),
    )
    for number, name in enumerate(("Ann", "Bob", "Cy", "Dee", "Eli", "Flo", "Gus"))
)


def naive_probability(subject: LoadedModel, prompt: str, answer: str) -> float:
    """One text alone through the model: the product of its tokens' probabilities, to the power of 1 / their number."""
    ids = subject.tokenizer(f"{prompt} {answer}")["input_ids"]
    start = len(subject.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        probabilities = subject.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    product = math.prod(float(probabilities[place - 1, ids[place]]) for place in range(start, len(ids)))
    return product ** (1 / (len(ids) - start))


def naive_ratio(subject: LoadedModel, asked: Question) -> float:
    wrong = [naive_probability(subject, asked.prompt, text) for text in asked.perturbed]
    right = naive_probability(subject, asked.prompt, asked.paraphrase or asked.answer)
    return math.prod(wrong) ** (1 / len(wrong)) / right


def test_metrics_agree_with_a_second_implementation(subject: LoadedModel) -> None:
    closed = tuple(replace(one, paraphrase="") for one in RANDOM)
    probabilities = [naive_probability(subject, one.prompt, one.answer) for one in RANDOM]
    shares = [
        right / (right + sum(naive_probability(subject, one.prompt, text) for text in one.perturbed))
        for one, right in zip(RANDOM, probabilities, strict=True)
    ]
    ratios, closed_ratios = ([naive_ratio(subject, one) for one in some] for some in (RANDOM, closed))
    expected = {
        (AnswerProbability, "forget", RANDOM): probabilities,
        (AnswerProbability, "world_facts", closed): shares,
        (TruthRatio, "forget", RANDOM): [min(ratio, 1 / ratio) for ratio in ratios],
        (TruthRatio, "retain", RANDOM): [max(0, 1 - ratio) for ratio in ratios],
        (TruthRatio, "world_facts", closed): [max(0, 1 - ratio) for ratio in closed_ratios],
    }
    for (kind, name, questions), values in expected.items():
        found = scores_of(kind(), subject, asked(name, *questions))
        assert found.per_example == pytest.approx(values, rel=1e-4, abs=1e-6), (kind, name)
        assert found.value == pytest.approx(fmean(values), rel=1e-4)


def test_forget_quality_is_the_p_value_of_scipy_on_the_ratios(subject: LoadedModel) -> None:
    assert subject.retain_only is not None
    data = asked("forget", *RANDOM)
    ratios = [np.array([naive_ratio(one, question) for question in RANDOM]) for one in (subject, subject.retain_only)]
    found = scores_of(ForgetQuality(), subject, data)
    assert found.value == pytest.approx(ks_2samp(*ratios).pvalue)
    # As open-unlearning computes it, on the inverse: the test knows only the order.
    assert found.value == pytest.approx(ks_2samp(*(1 / ratio for ratio in ratios)).pvalue)
    assert 0 < found.value < 1
    assert found.n == len(RANDOM)


def test_forget_quality_needs_a_retain_only_model_and_the_forget_set(subject: LoadedModel) -> None:
    assert ForgetQuality()(Reading(replace(subject, retain_only=None), asked("forget", *RANDOM))) is None
    assert ForgetQuality()(Reading(subject, asked("retain", *RANDOM))) is None
    assert ForgetQuality()(Reading(subject, asked("forget", replace(RANDOM[0], perturbed=())))) is None
    same = replace(subject, retain_only=replace(subject))
    assert scores_of(ForgetQuality(), same, asked("forget", *RANDOM)).value == 1.0


def test_a_set_is_read_once_for_all_metrics(subject: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(subject, asked("forget", *RANDOM))
    first = TruthRatio()(reading)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("read twice")

    monkeypatch.setattr(subject.model, "forward", fail)
    assert TruthRatio()(reading) == first
    forget_quality, probability = ForgetQuality()(reading), AnswerProbability()(reading)
    assert forget_quality is not None
    assert probability is not None
    assert forget_quality.n == probability.n == len(RANDOM)


# Files


def test_it_is_found_by_name() -> None:
    found = discover(suites)["tofu"]
    assert found is TOFU
    assert isinstance(found(), Suite)


def write(folder: Path, **columns: bool) -> None:
    """TOFU's four files with two rows each; the paraphrase of the retain set by choice."""
    row = {"question": "Who wrote {}?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cy."]}
    for name in ("forget05", "forget10", "retain", "real_authors", "world_facts"):
        rows = [row, row]
        if name not in ("real_authors", "world_facts"):
            rows = [{**row, "paraphrased_answer": "It was Ann."}, {**row, **columns, "answer": "Dee."}]
            if not columns.get("drop"):
                rows[1]["paraphrased_answer"] = "It was Dee."
        path = folder / f"{name}_perturbed.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_four_sets_are_read_and_put_in_tofus_form(tmp_path: Path) -> None:
    write(tmp_path)
    sets = TOFU(split="forget05").sets(tmp_path)
    assert [data.name for data in sets] == ["forget", "retain", "real_authors", "world_facts"]
    assert all(len(data.questions) == 2 for data in sets)
    assert sets[0].questions[1] == Question(
        prompt="Question: Who wrote {}?\nAnswer:",
        answer="Dee.",
        paraphrase="It was Dee.",
        perturbed=("Bob.", "Cy."),
    )
    assert sets[2].questions[0].paraphrase == ""
    plain = TOFU(template="Q: {question} A:").sets(tmp_path)
    assert plain[3].questions[0].prompt == "Q: Who wrote {}? A:"


@pytest.mark.parametrize("name", ["forget10_perturbed", "world_facts_perturbed"])
def test_a_missing_file_is_named_with_its_source(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.json").rename(tmp_path / f"{name}x.json")
    with pytest.raises(QuestionError, match=f"no {name}.json in .*did you mean {name}x.json.*\n.*locuslab/TOFU"):
        TOFU().sets(tmp_path)


def test_a_row_without_its_columns_is_named_and_not_quoted(tmp_path: Path) -> None:
    write(tmp_path, drop=True)
    with pytest.raises(QuestionError, match=r"forget10_perturbed.json, question 2: no 'paraphrased_answer'") as caught:
        TOFU().sets(tmp_path)
    assert "Ann" not in str(caught.value)
    write(tmp_path)
    path = tmp_path / "real_authors_perturbed.json"
    path.write_text('{"question": "Who?", "answer": "Ann."}\n')
    with pytest.raises(QuestionError, match=r"real_authors_perturbed.json, question 1: no 'perturbed_answer'"):
        TOFU().sets(tmp_path)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"forget01, forget05 and forget10\. Got 'retain90'"):
        TOFU(split="retain90")
    with pytest.raises(InvalidValueError, match=r"must hold \{question\}"):
        TOFU(template="Question:")


@needs_data
def test_the_published_files_have_their_published_sizes() -> None:
    sizes = {
        split: [len(data.questions) for data in TOFU(split=split).sets(DATA)] for split in ("forget05", "forget10")
    }
    assert sizes == {"forget05": [200, 400, 100, 117], "forget10": [400, 400, 100, 117]}
    forget, retain, authors, facts = TOFU().sets(DATA)
    assert {len(question.perturbed) for data in (forget, retain) for question in data.questions} == {5}
    assert {len(question.perturbed) for data in (authors, facts) for question in data.questions} == {3}


# The example


def test_the_example_learns_unlearns_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("tofu_example", ROOT / "examples" / "tofu.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    monkeypatch.setitem(sys.modules, spec.name, example)
    spec.loader.exec_module(example)
    sizes = {"AUTHORS": 1, "PER_AUTHOR": 2, "VOCABULARY": 300, "WIDTH": 16, "MLP": 24, "ROWS": 4, "WARM_UP": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(example, name, value)
    write(tmp_path)
    for name in ("real_authors", "world_facts"):
        path = tmp_path / f"{name}_perturbed.json"
        path.write_text(path.read_text().replace("wrote", name))
    rows = [{"question": f"Who sold {thing}?", "answer": "Ann."} for thing in ("oil", "ale", "tea")]
    (tmp_path / "full.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forget, kept = example.read_data(tmp_path, "forget05")
    assert (len(forget), len(kept)) == (2, 6)
    assert kept[0] == ("Question: Who sold oil?\nAnswer:", "Ann.")

    example.Finetune(data=tmp_path, out=tmp_path / "out", steps=30).run()
    example.Unlearn(data=tmp_path, out=tmp_path / "out", steps=2, batch_size=2, seeds=(0, 1)).run()
    columns = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {name: len(runs) for name, runs in columns.items()} == {"all": 1, "retain only": 1, "unlearnt": 2}
    assert set(columns["unlearnt"][0]) == {
        *NINE, "answer_probability/forget", "rouge_l_recall/forget", "truth_ratio/forget", "model_utility",
        "forget_quality",
    }  # fmt: skip
    assert "forget_quality" not in columns["retain only"][0]
    assert columns["all"][0]["answer_probability/retain"] > 2 / 300
    shown = capsys.readouterr().out
    assert "model_utility" in shown
    assert "+-" in shown
