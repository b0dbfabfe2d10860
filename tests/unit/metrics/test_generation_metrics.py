"""Metrics of free-form answers, on models whose every next token is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lethe.errors import DivergedError, ModelError
from lethe.evaluation.measure import measure
from lethe.inference.embedding import SentenceEncoder
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.deviation_score import DeviationScore
from lethe.metrics.exact_match import ExactMatch
from lethe.metrics.memorisation import ExactMemorisation, ExtractionStrength
from lethe.metrics.protocol import Metric
from lethe.metrics.ranks import MeanReciprocalRank, TopHitRatio
from lethe.metrics.refusal import RefusalQuality, RefusalRate
from lethe.metrics.repetition import Distinct2, Repetition
from lethe.metrics.rouge import Rouge1Recall, RougeLRecall
from lethe.types import EvalSet, Question, Scores
from rigged_models import ALPHABET, OF, answering, bigram, chain, forget_set, retain_set

OF_ANSWERS = (
    ExactMatch, Rouge1Recall, RougeLRecall, RefusalRate, RefusalQuality, MeanReciprocalRank, TopHitRatio,
    ExtractionStrength, ExactMemorisation, Repetition,
)  # fmt: skip


@dataclass(frozen=True)
class Says:
    """A model that gives these answers, by prompt."""

    texts: dict[str, tuple[str, ...]]


def read(subject: LoadedModel | Says, data: EvalSet, **settings: int) -> Reading:
    if isinstance(subject, LoadedModel):
        return Reading(subject, data, **settings)
    return answering(bigram({}), data, [subject.texts[question.prompt] for question in data.questions], **settings)


def asked(**gold: str | tuple[str, ...]) -> EvalSet:
    """One question for each correct answer, or for each tuple of them."""
    all_of = {prompt: (text,) if isinstance(text, str) else text for prompt, text in gold.items()}
    questions = tuple(
        Question(prompt=prompt, answer=first, accepted=tuple(others)) for prompt, (first, *others) in all_of.items()
    )
    return retain_set(questions=questions)


def scores_of(metric: Metric, subject: LoadedModel | Says, data: EvalSet, **settings: int) -> Scores:
    scores = metric(read(subject, data, **settings))
    assert isinstance(scores, Scores)
    return scores


# ROUGE


def test_rouge_by_hand() -> None:
    data = asked(a="the red rivers of Spain", b="one two", c="x", d="Anna")
    subject = Says({"a": ("Spain: the river, red",), "b": ("two, one!",), "c": ("",), "d": ("it is anna b",)})
    one, longest = scores_of(Rouge1Recall(), subject, data), scores_of(RougeLRecall(), subject, data)
    # river(s) is stemmed; in order are "the ... rivers" alone, or "the red".
    assert one.per_example == pytest.approx((4 / 5, 1, 0, 1))
    assert longest.per_example == pytest.approx((2 / 5, 1 / 2, 0, 1))
    assert one.value == pytest.approx(2.8 / 4)
    assert (one.n, one.better) == (4, "higher")


def test_a_word_counts_as_often_as_it_occurs() -> None:
    subject = Says({"a": ("the the the",), "b": ("dog",)})
    assert scores_of(Rouge1Recall(), subject, asked(a="the dog the cat", b="dog dog")).per_example == (0.5, 0.5)


def test_rouge_takes_the_best_correct_answer_and_the_mean_over_samples() -> None:
    subject = Says({"a": ("I know it", "no record")})
    data = asked(a=("there is no record", "I know not"))
    assert scores_of(Rouge1Recall(), subject, data).per_example == pytest.approx(((2 / 3 + 2 / 4) / 2,))
    assert scores_of(ExactMatch(), subject, asked(a=("x", "No record."))).per_example == (0.5,)


def test_rouge_leaves_out_what_it_cannot_read() -> None:
    subject = Says({"a": ("\u6c34",), "b": ("x",)})
    assert Rouge1Recall()(read(subject, asked(a="\u6c34"))) is None
    assert scores_of(RougeLRecall(), subject, asked(a="\u6c34", b="x")).per_example == (1.0,)
    assert scores_of(ExactMatch(), subject, asked(a="\u6c34")).value == 1.0


# Deviation score


def recalls(forget: float, retain: float) -> dict[str, Scores]:
    def score(value: float, stderr: float) -> Scores:
        return Scores(value=value, stderr=stderr, n=100, better="higher")

    return {"rouge1_recall/forget": score(forget, 0.03), "rouge1_recall/retain": score(retain, 0.02)}


@pytest.mark.parametrize(
    ("forget", "retain", "distance"), [(0.109, 0.898, 14.9), (0.106, 0.909, 14.0), (1.0, 1.0, 100.0), (1.0, 0.0, 141.4)]
)
def test_deviation_score_of_published_pairs(forget: float, retain: float, distance: float) -> None:
    scores = DeviationScore().combine(recalls(forget, retain))
    assert scores is not None
    assert scores.value == pytest.approx(distance, abs=0.05)
    assert (scores.better, scores.n) == ("lower", 200)


def test_standard_error_of_a_deviation_score_is_that_of_simulated_ones() -> None:
    scores = DeviationScore().combine(recalls(0.3, 0.8))
    assert scores is not None
    drawn = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    simulated = 100 * torch.hypot(0.3 + 0.03 * drawn[0], 0.2 - 0.02 * drawn[1])
    assert scores.stderr == pytest.approx(float(simulated.std()), rel=0.03)


def test_deviation_score_at_the_ideal_and_without_a_part() -> None:
    ideal = DeviationScore().combine(recalls(0.0, 1.0))
    assert ideal is not None
    assert (ideal.value, ideal.stderr) == (0, pytest.approx(100 * math.hypot(0.03, 0.02)))
    for part in recalls(0.0, 1.0):
        assert DeviationScore().combine({part: recalls(0.0, 1.0)[part]}) is None


def test_deviation_score_is_measured_with_the_others() -> None:
    subject = bigram(chain(["1", "ĠA", "n", "a", "</s>"]))
    question = Question(prompt="is 1", answer="Ana")
    sets = [forget_set(questions=(question,)), retain_set(questions=(question,))]
    found = measure(subject, sets)
    assert found["rouge1_recall/forget"].value == found["rouge1_recall/retain"].value == 1.0
    assert found["deviation_score"].value == 100.0
    assert "deviation_score" not in measure(subject, sets[:1])


# Refusals


def test_refusal_rate_counts_answers() -> None:
    subject = Says({"a": ("I do not know.", "Anna"), "b": ("Bea",), "c": ("Nothing on file here.",)})
    data = asked(a="x", b="x", c="x")
    scores = scores_of(RefusalRate(), subject, data)
    assert scores.per_example == (0.5, 0.0, 0.0)
    assert scores.better == "lower"
    own = scores_of(RefusalRate(refusals=("Nothing on file.",)), subject, data)
    assert own.per_example == (0.5, 0.0, 1.0)


def test_refusal_quality_is_the_nearest_wanted_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Says({"a": ("No.", "zz"), "b": ("",), "c": ("Never",)})
    places = {"No.": (1.0, 0.0), "Never": (0.6, 0.8), "zz": (0.0, -1.0), "": (0.0, 0.0)}
    folders = []

    def place(encoder: SentenceEncoder, texts: Sequence[str], *, device: torch.device) -> torch.Tensor:
        folders.append(encoder.folder)
        return torch.tensor([places[text] for text in texts])

    monkeypatch.setattr(SentenceEncoder, "__call__", place)
    data = asked(a="x", b="x", c="x")
    metric = RefusalQuality(refusals=("No.", "Never"), encoder=Path("somewhere"))
    scores = scores_of(metric, subject, data)
    assert scores.per_example == pytest.approx((0.5, 0.0, 1.0))
    assert scores.better == "neither"
    assert set(folders) == {Path("somewhere")}


def test_a_refusal_that_is_wanted_has_quality_one() -> None:
    subject = bigram(chain(["1", "ĠA", "n", "a", "</s>"]))
    data = forget_set(questions=(Question(prompt="is 1", answer="x"),))
    wanted = ("Ana", "zzz")
    assert scores_of(RefusalQuality(refusals=wanted), subject, data).value == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ModelError, match="no sentence encoder"):
        RefusalQuality(encoder=Path("nowhere/at-all"))(read(subject, data))


# Ranks and memorisation


def test_ranks_by_hand() -> None:
    # " A" is third after "1", "n" first after " A", and 150 tokens come before "a" after "n".
    before = {name: 0.006 for name in ALPHABET if name != "a"}
    subject = bigram({"1": {"x": 0.4, "y": 0.3, "ĠA": 0.2}, "ĠA": {"n": 0.9}, "n": dict(list(before.items())[:150])})
    data = forget_set(questions=(Question(prompt="is 1", answer="Ana"),))
    with torch.no_grad():
        # A little more probable than the tokens that share the rest.
        subject.model.lm_head.weight[OF["a"], OF["n"]] += 0.01
    scores = scores_of(MeanReciprocalRank(), subject, data)
    assert scores.value == pytest.approx((1 / 3 + 1 + 1 / 151) / 3)
    assert scores.better == "higher"
    assert scores_of(TopHitRatio(), subject, data).value == pytest.approx(2 / 3)
    assert scores_of(TopHitRatio(top=1), subject, data).value == pytest.approx(1 / 3)
    assert scores_of(TopHitRatio(top=151), subject, data).value == 1.0
    assert scores_of(ExactMemorisation(), subject, data).value == pytest.approx(1 / 3)


def test_equally_probable_tokens_do_not_all_come_first() -> None:
    subject = bigram({})
    with torch.no_grad():
        subject.model.lm_head.weight.zero_()
    data = retain_set(questions=(Question(prompt="is 1", answer="Ana"),))
    assert scores_of(ExactMemorisation(), subject, data).value == 0.0
    assert scores_of(MeanReciprocalRank(), subject, data).value < 0.1


@pytest.mark.parametrize(
    ("right", "strength", "memorised"),
    [
        ("", 0, 0), ("bcde", 1, 1), ("bcd", 0, 3 / 4), ("cde", 3 / 4, 3 / 4), ("e", 1 / 4, 1 / 4),
        ("be", 1 / 4, 1 / 2), ("bce", 1 / 4, 3 / 4),
    ],
)  # fmt: skip
def test_extraction_strength_counts_what_is_said_to_the_end(right: str, strength: float, memorised: float) -> None:
    # The answer is four tokens: the prompt ends in a newline, so that no space stands between.
    follows = {last: {token: 0.9 if token in right else 0.001} for last, token in pairwise(["Ċ", *"bcde"])}
    data = forget_set(questions=(Question(prompt="is 1\n", answer="bcde"),))
    subject = bigram({last: ({"z": 0.5} if 0.001 in nexts.values() else {}) | nexts for last, nexts in follows.items()})
    assert scores_of(ExtractionStrength(), subject, data).value == pytest.approx(strength)
    assert scores_of(ExactMemorisation(), subject, data).value == pytest.approx(memorised)


def test_the_best_correct_answer_counts() -> None:
    subject = bigram(chain(["1", "ĠA", "n", "a", "</s>"]))
    data = asked(**{"is 1": ("Bob", "Ana")})
    for metric in (MeanReciprocalRank(), TopHitRatio(top=1), ExtractionStrength(), ExactMemorisation()):
        assert scores_of(metric, subject, data).value == 1.0


def test_free_running_ranks_follow_the_models_own_answer() -> None:
    # It says " Bx" and ends; teacher-forced the gold "An" would be followed correctly.
    subject = bigram({"1": {"ĠB": 0.6, "ĠA": 0.3}, "ĠA": {"n": 0.9}, "ĠB": {"x": 0.6, "n": 0.3}, "x": {"</s>": 0.9}})
    data = forget_set(questions=(Question(prompt="is 1", answer="An"),))
    assert scores_of(MeanReciprocalRank(), subject, data).value == pytest.approx((1 / 2 + 1) / 2)
    assert scores_of(MeanReciprocalRank(free_running=True), subject, data).value == pytest.approx((1 / 2 + 1 / 2) / 2)
    # Five tokens, of which the answer reaches three: " B", "x" and EOS.
    longer = replace(data, questions=(Question(prompt="is 1", answer="Bxxxx"),))
    hits = scores_of(TopHitRatio(top=1, free_running=True), subject, longer)
    assert hits.value == pytest.approx(2 / 5)
    assert scores_of(TopHitRatio(top=1000, free_running=True), subject, longer).value == pytest.approx(3 / 5)


def test_ranks_and_memorisation_read_the_model_once() -> None:
    subject = bigram(chain(["1", "ĠA"]))
    calls = []
    handle = subject.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    reading = read(subject, forget_set(questions=(Question(prompt="is 1", answer="Ana"),)))
    for metric in (MeanReciprocalRank(), TopHitRatio(), ExtractionStrength(), ExactMemorisation()):
        metric(reading)
    handle.remove()
    assert len(calls) == 1


def test_a_model_that_gives_no_numbers_is_an_error() -> None:
    subject = bigram({})
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="NaN or infinite on 1 of 1 rows"):
        MeanReciprocalRank()(Reading(subject, forget_set(questions=(Question(prompt="is 1", answer="Ana"),))))


# Repetition


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("", 0), ("one", 0), ("one two", 0), ("one two three", 0), ("a b a b", 1 / 3), ("A b. a B.", 2 / 5),
        ("no no no no", 2 / 3), ("!!!!!", 3 / 4),
    ],
)  # fmt: skip
def test_repetition_by_hand(text: str, repeated: float) -> None:
    scores = scores_of(Repetition(), Says({"a": (text,)}), asked(a="x"))
    assert scores.value == pytest.approx(repeated)
    assert scores.better == "lower"


def test_distinct_bigrams_of_all_answers() -> None:
    subject = Says({"a": ("red sea", "red sea"), "b": ("Red sea now",), "c": ("x",)})
    scores = scores_of(Distinct2(), subject, asked(a="x", b="x", c="x"))
    assert scores.value == pytest.approx(2 / 4)
    assert (scores.n, scores.better) == (3, "higher")
    assert scores.stderr > 0
    assert Distinct2()(read(subject, asked(c="x"))) is None


def test_the_bootstrap_is_seeded() -> None:
    texts = {f"q{n}": (f"the {n % 11} of {n}",) for n in range(20)}
    subject, data = Says(texts), asked(**dict.fromkeys(texts, "x"))
    first = scores_of(Distinct2(), subject, data)
    assert scores_of(Distinct2(), subject, data) == first
    assert scores_of(Distinct2(), subject, data, seed=1).stderr != first.stderr


# All of them


@pytest.mark.parametrize("kind", OF_ANSWERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("samples", [0, 3])
def test_sampled_answers_repeat_by_seed(kind: type, samples: int) -> None:
    following = {"1": {"ĠA": 0.5, "ĠB": 0.4}, "ĠA": {"n": 0.6, "</s>": 0.3}, "ĠB": {"x": 0.5, "</s>": 0.4}}
    questions = tuple(Question(prompt=f"{text} 1", answer="An") for text in ("is", "who is", "what is", "how is"))
    data = retain_set(questions=questions)
    first = scores_of(kind(), bigram(following), data, samples=samples)
    assert scores_of(kind(), bigram(following), data, samples=samples) == first
    assert len(first.per_example) == first.n == 4


@pytest.mark.parametrize("kind", [*OF_ANSWERS, Distinct2], ids=lambda kind: kind.__name__)
def test_questions_by_letter_are_left_out(kind: type) -> None:
    question = Question(prompt="is 1", answer="Ana", choices=("Ana", "Bea"))
    assert kind()(read(bigram({}), retain_set(questions=(question,)))) is None
