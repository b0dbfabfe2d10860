"""Metrics on models whose answers are known in advance."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from lethe import metrics
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.confidence import AnswerConfidence
from lethe.metrics.drift import ActivationNorm, CosineToFrozen
from lethe.metrics.exact_match import ExactMatch, is_match
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.metrics.perplexity import Perplexity
from lethe.metrics.protocol import Metric
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question
from rigged_models import TEXTS, bigram, chain, edited, forget_set, random_llama, retain_set, tiny_tokenizer

# Multiple choice


def test_letters_are_scored_after_the_rendered_question() -> None:
    subject = bigram({":": {"ĠB": 0.5, "ĠA": 0.3}})
    questions = tuple(
        Question(prompt=f"Question {index}?", answer=answer, choices=("p", "q", "r", "s"))
        for index, answer in enumerate("pqrqq")
    )
    scores = MultipleChoice()(Reading(subject, forget_set(questions=questions, scoring="letter")))
    assert scores is not None
    assert scores.per_example == (0.0, 1.0, 0.0, 1.0, 1.0)
    assert scores.value == pytest.approx(0.6)
    assert scores.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert (scores.n, scores.better, scores.chance) == (5, "higher", 0.25)


def test_cloze_takes_the_mean_over_an_options_tokens() -> None:
    # Summed, the one-token option would win: log 0.2 against 3 x log 0.5.
    subject = bigram({"?": {"ĠA": 0.2, "ĠB": 0.5}, "B": {}, "ĠB": {"b": 0.5}, "b": {"c": 0.5}})
    data = EvalSet(
        name="forget",
        role="forget",
        questions=(
            Question(prompt="Who?", answer="Bbc", choices=("A", "Bbc")),
            Question(prompt="And who?", answer="A", choices=("A", "Bbc", "D")),
        ),
        scoring="cloze",
    )
    scores = MultipleChoice()(Reading(subject, data))
    assert scores is not None
    assert scores.per_example == (1.0, 0.0)
    assert scores.chance == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_questions_without_choices_are_no_multiple_choice() -> None:
    subject = bigram({":": {"ĠA": 0.9}})
    free = Question(prompt="Who?", answer="p")
    choice = Question(prompt="Who?", answer="p", choices=("p", "q"))
    assert MultipleChoice()(Reading(subject, retain_set(questions=(free,)))) is None
    scores = MultipleChoice()(Reading(subject, retain_set(questions=(free, choice))))
    assert scores is not None
    assert (scores.value, scores.n, scores.stderr) == (1.0, 1, 0.0)


# Exact match


@pytest.mark.parametrize(
    "end",
    [["</s>"], [".", "Ġ", "A"], ["Ċ", "x"], ["!", "!", "!"]],
    ids=["EOS", "full stop", "newline", "marks"],
)
def test_exact_match_accepts_an_answer_that_ends(end: list[str]) -> None:
    subject = bigram(chain(["1", "ĠA", "n", "a", *end]))
    questions = (Question(prompt="Who is 1", answer="Ana"), Question(prompt="Who is the one called 1", answer="Bea"))
    scores = ExactMatch()(Reading(subject, retain_set(questions=questions)))
    assert scores is not None
    assert scores.per_example == (1.0, 0.0)
    assert (scores.value, scores.n, scores.better) == (0.5, 2, "higher")
    assert scores.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / 1))


@pytest.mark.parametrize("end", [["e", "</s>"], ["Ġ", "k", "</s>"], ["-", "k", "</s>"]])
def test_exact_match_refuses_an_answer_that_goes_on(end: list[str]) -> None:
    subject = bigram(chain(["1", "ĠA", "n", "a", *end]))
    scores = ExactMatch()(Reading(subject, retain_set(questions=(Question(prompt="Who is 1", answer="Ana"),))))
    assert scores is not None
    assert scores.value == 0.0


def test_exact_match_takes_accepted_answers_and_gives_them_room() -> None:
    subject = bigram(chain(["1", "ĠC", *"efghijklmnopq", "</s>"]))
    question = Question(prompt="Who is 1", answer="A", accepted=("D.", "CEFGHIJKLMNOPQ."))
    scores = ExactMatch()(Reading(subject, EvalSet(name="unknown", role="neither", questions=(question,))))
    assert scores is not None
    assert scores.value == 1.0


@pytest.mark.parametrize(
    ("generated", "gold", "right"),
    [
        ("Anna", "anna.", True),
        ("  anna. She wrote", "Anna", True),
        ("Anna, of course", "Anna", True),
        ("The   Red\tRiver", "the red river", True),
        ("Anna Karenina", "Anna", False),
        ("Annabel", "Anna", False),
        ("Anna-Lena", "Anna", False),
        ("12.5", "12", False),
        ("12.", "12", True),
        ("It is Anna", "Anna", False),
        ("", "Anna", False),
        ("anything", "?", False),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
    ],
)
def test_rule_of_exact_match(generated: str, gold: str, right: bool) -> None:
    assert is_match(generated, (gold,)) is right


def test_letter_questions_are_not_free_form() -> None:
    subject = bigram({})
    question = Question(prompt="Who?", answer="p", choices=("p", "q"))
    assert ExactMatch()(Reading(subject, forget_set(questions=(question,), scoring="letter"))) is None
    assert ExactMatch()(Reading(subject, forget_set(questions=(question,), scoring="cloze"))) is not None


# Perplexity


def test_perplexity_of_a_known_bigram_model() -> None:
    subject = bigram({"<s>": {"x": 0.5}, "x": {"y": 0.25}, "y": {"x": 0.1}})
    scores = Perplexity()(Reading(subject, retain_set(texts=("xy", "x", "xyx"))))
    assert scores is not None
    half, quarter, tenth = math.log(2), math.log(4), math.log(10)
    totals, counts = [half + quarter, half, half + quarter + tenth], [2, 1, 3]
    mean = sum(totals) / 6
    spread = sum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    assert scores.value == pytest.approx(math.exp(mean), rel=1e-5)
    assert scores.stderr == pytest.approx(math.exp(mean) * math.sqrt(spread * 3 / 2) / 6, rel=1e-5)
    assert scores.per_example == pytest.approx([t / c for t, c in zip(totals, counts, strict=True)], rel=1e-5)
    assert (scores.n, scores.better) == (3, "lower")


def test_perplexity_is_the_librarys_loss_on_one_text() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    ids = torch.tensor([subject.tokenizer(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        loss = subject.model(input_ids=ids, labels=ids).loss
    scores = Perplexity()(Reading(subject, retain_set(texts=(TEXTS[2],))))
    assert scores is not None
    assert scores.value == pytest.approx(float(loss.exp()), rel=1e-5)
    assert scores.stderr == 0.0


def test_perplexity_stays_finite() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        subject.model.lm_head.weight.mul_(1e5)
    scores = Perplexity()(Reading(subject, retain_set(texts=TEXTS)))
    assert scores is not None
    assert math.isfinite(scores.value)
    assert math.isfinite(scores.stderr)


# Confidence


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_confidence_is_the_highest_probability_after_the_prompt(scoring: str) -> None:
    subject = bigram({":": {"ĠA": 0.7}, "?": {"x": 0.4}, "Ġ": {"z": 0.99}})
    questions = (
        Question(prompt="Who?", answer="q", choices=("p", "q")),
        Question(prompt="And who?", answer="Anna"),
        Question(prompt="Name: ", answer="Anna"),
    )
    scores = AnswerConfidence()(Reading(subject, forget_set(questions=questions, scoring=scoring)))
    assert scores is not None
    first = 0.7 if scoring == "letter" else 0.4
    assert scores.per_example == pytest.approx((first, 0.4, 0.7), rel=1e-5)
    assert scores.value == pytest.approx((first + 0.4 + 0.7) / 3, rel=1e-5)
    assert scores.better == "neither"


# Drift


def layer_outputs(model: LlamaForCausalLM, text: str) -> torch.Tensor:
    """[layer, pos, d_model] of the layers' own outputs, BOS left out."""
    ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    found = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(output)) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack([output[0] if isinstance(output, tuple) else output for output in found])[:, 0, 1:]


def test_norms_of_a_model_that_adds_nothing() -> None:
    scores = ActivationNorm()(Reading(bigram({}), retain_set(texts=TEXTS)))
    assert scores is not None
    assert scores.by_layer == (1.0, 1.0)
    assert (scores.value, scores.stderr, scores.n, scores.better) == (1.0, 0.0, 4, "neither")


def test_norms_equal_a_loop_over_texts() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    scores = ActivationNorm()(Reading(subject, retain_set(texts=TEXTS)))
    assert scores is not None
    expected = torch.stack([layer_outputs(subject.model, text).norm(dim=-1).mean(-1) for text in TEXTS])
    assert scores.by_layer == pytest.approx(expected.mean(0).tolist(), rel=1e-5)
    assert scores.per_example == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
    assert scores.value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert scores.stderr == pytest.approx(expected.mean(1).std().item() / 2, rel=1e-5)


def test_cosine_to_frozen_is_exactly_one_without_an_edit() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    scores = CosineToFrozen()(Reading(subject, retain_set(texts=TEXTS)))
    assert scores is not None
    assert scores.by_layer == (1.0, 1.0, 1.0, 1.0)
    assert scores.per_example == (1.0, 1.0, 1.0, 1.0)
    assert (scores.value, scores.stderr, scores.better) == (1.0, 0.0, "neither")


def test_cosine_to_frozen_begins_to_fall_at_the_edited_layer() -> None:
    model = random_llama()
    before = [layer_outputs(model, text) for text in TEXTS]
    subject = edited(model, 2)
    after = [layer_outputs(model, text) for text in TEXTS]
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    scores = CosineToFrozen()(Reading(subject, forget_set(texts=TEXTS)))

    assert scores is not None
    cosines = [torch.cosine_similarity(a, b, dim=-1).mean(-1) for a, b in zip(before, after, strict=True)]
    assert scores.by_layer[:2] == (1.0, 1.0)
    assert max(scores.by_layer[2:]) < 0.99
    assert scores.by_layer == pytest.approx(torch.stack(cosines).mean(0).tolist(), rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_drift_reads_prompts_where_there_is_no_text_and_only_the_first_ones() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    prompts = tuple(Question(prompt=text, answer="x") for text in TEXTS)
    of_texts = ActivationNorm(texts=2)(Reading(subject, retain_set(texts=TEXTS)))
    assert of_texts is not None
    assert of_texts.n == 2
    assert ActivationNorm(texts=2)(Reading(subject, retain_set(questions=prompts))) == of_texts


def test_a_text_that_is_read_twice_counts_twice() -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    data = retain_set(texts=("one", "another text", "one"))
    for metric in (ActivationNorm(), Perplexity()):
        scores = metric(Reading(subject, data))
        assert scores is not None
        assert scores.n == 3
        assert scores.per_example[0] == scores.per_example[2] != scores.per_example[1]


# All of them


EVERY = sorted((name, kind) for name, kind in discover(metrics).items() if isinstance(kind(), Metric))


def test_the_folder_holds_these_metrics() -> None:
    assert {
        "activation-norm",
        "answer-confidence",
        "cosine-to-frozen",
        "exact-match",
        "multiple-choice",
        "perplexity",
        "rouge1-recall",
        "rouge-l-recall",
        "refusal-rate",
        "refusal-quality",
        "mean-reciprocal-rank",
        "top-hit-ratio",
        "extraction-strength",
        "exact-memorisation",
        "repetition",
        "distinct2",
        "deviation-score",
    } <= set(discover(metrics))


@pytest.mark.parametrize("kind", [kind for _, kind in EVERY], ids=[name for name, _ in EVERY])
def test_nothing_to_measure_gives_none(kind: Callable[[], Metric]) -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    assert kind()(Reading(subject, EvalSet(name="adjacent", role="keep"))) is None
