"""Marks of exams whose answers are known."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethe import LoadedModel, load_tokenizer
from lethe.data.exams import Exam, ExamQuestion
from lethe.errors import QuestionError
from lethe.evaluation.exam import Marks, sit
from lethe.inference.choices import choice_hits
from lethe.inference.log_probs import log_probs
from lethe.inference.reading import Reading
from lethe.inference.spans import answer_spans
from lethe.suites.world import MODEL_FOLDER
from lethe.types import EvalSet


def question(
    number: int, gold: int, topic: str = "x", choices: tuple[str, ...] = ("one", "two", "three", "four")
) -> ExamQuestion:
    return ExamQuestion(prompt=f"Which is {number}?", choices=choices, answer=choices[gold], gold=gold, topic=topic)


def marks(picked: list[int], golds: list[int], topics: list[str] | None = None) -> Marks:
    asked = [question(n, gold, (topics or ["x"] * len(golds))[n]) for n, gold in enumerate(golds)]
    values = [tuple(-float(place != one) for place in range(4)) for one in picked]
    return Marks(questions=tuple(asked), log_likelihoods=tuple(values), picked=tuple(picked))


def small(context: int = 128) -> LoadedModel:
    tokenizer = load_tokenizer(MODEL_FOLDER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=context, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
        )  # fmt: skip
        return LoadedModel(model=LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def test_subjects_and_groups_are_weighted_by_their_size() -> None:
    found = marks([0, 1, 2, 3, 0], [0, 1, 0, 0, 0], ["a", "a", "a", "b", "c"]).scores(
        {"a and b": ["a", "b"], "none": []}
    )
    assert {name: (score.value, score.n) for name, score in found.items()} == {
        "": (pytest.approx(0.6), 5), "a": (pytest.approx(2 / 3), 3), "b": (0.0, 1), "c": (1.0, 1), "a and b": (0.5, 4),
    }  # fmt: skip
    assert found[""].chance == 0.25
    assert found[""].per_example == (1.0, 1.0, 0.0, 0.0, 1.0)
    assert found[""].stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert found[""].better == "higher"


def test_share_and_entropy_of_what_is_picked() -> None:
    even = marks([0, 1, 2, 3] * 2, [0] * 8)
    assert (even.top_share(), even.entropy()) == (0.25, 2.0)
    assert (marks([2] * 8, [0] * 8).top_share(), marks([2] * 8, [0] * 8).entropy()) == (1.0, 0.0)
    assert marks([0, 0, 0, 1], [0] * 4).entropy() == pytest.approx(0.8112781)


def test_a_preference_for_a_letter_is_told_from_knowledge() -> None:
    (said,) = marks([1] * 40, [0, 1, 2, 3] * 10).biases()
    assert (
        said == "B is picked in 100 % of the questions and right in 25 %: the accuracy shows a preference for a letter."
    )
    assert marks([1] * 40, [1] * 40).biases() == (), "right each time"
    assert marks([0, 1, 2, 3] * 10, [0, 1, 2, 3] * 10).biases() == ()
    assert marks([1] * 4, [0, 1, 2, 3]).biases() == (), "four questions show no preference"


def test_less_than_a_guess_is_a_bias_where_it_is_more_than_noise() -> None:
    (said,) = marks([0, 1, 2, 3] * 10, [1, 2, 3, 0] * 10).biases()
    assert said.startswith("0.0 % is below the 25.0 % of a guess: the right answers are avoided")
    assert marks([0, 1, 2, 3, 0], [0, 2, 3, 0, 1]).biases() == (), "20 % of five questions is noise"
    assert marks([0], [1]).biases() == (), "one question missed, of which the hits' own error is 0"
    assert marks([0, 1, 2, 3] * 2, [1, 2, 3, 0] * 2).biases() == (), "0 of 8: one guess in ten"
    assert len(marks([0, 1, 2, 3] * 4, [1, 2, 3, 0] * 4).biases()) == 1, "0 of 16: one in a hundred"


def test_sitting_an_exam_picks_the_most_probable_letter_and_text() -> None:
    subject = small()
    exam = Exam(
        questions=tuple(question(n, n % 4) for n in range(12)), examples={"x": tuple(question(n, 1) for n in (50, 51))}
    )
    for scoring in ("letter", "cloze"):
        found = sit(subject, exam, shots=2, scoring=scoring, tokens_per_batch=200)
        for one, values, picked in zip(exam.questions, found.log_likelihoods, found.picked, strict=True):
            weights = [len(choice) if scoring == "cloze" else 1 for choice in one.choices]
            per = [value / weight for value, weight in zip(values, weights, strict=True)]
            assert picked == per.index(max(per))
        assert found.hits == tuple(float(p == q.gold) for p, q in zip(found.picked, exam.questions, strict=True))


def test_a_likelihood_is_that_of_a_plain_forward() -> None:
    subject = small()
    first, second = log_probs(subject.model, answer_spans(subject, [("Which is it? ", ("the one", "two"))]))
    for text, found in (("Which is it? the one", first), ("Which is it? two", second)):
        ids = torch.tensor([subject.tokenizer(text)["input_ids"]])
        before = len(subject.tokenizer("Which is it?")["input_ids"])
        with torch.no_grad():
            logs = subject.model(ids).logits.log_softmax(-1)[0]
        right = torch.stack([logs[place - 1, ids[0, place]] for place in range(before, ids.shape[1])])
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_the_context_is_used_to_its_last_token() -> None:
    subject = small(context=16)
    whole = subject.tokenizer("word " * 40 + "end")["input_ids"]
    (span,) = answer_spans(subject, [("word " * 40, ("end",))])
    assert list(span.ids) == whole[-17:], "the last one is predicted, not read"
    with pytest.raises(QuestionError, match=r"^question 1: an answer has \d+ tokens, and the model reads 16\.\n"):
        answer_spans(subject, [("Which?", (" end" * 40,))])


def test_a_template_that_writes_bos_gets_no_second_one() -> None:
    subject = small()
    bos = str(subject.tokenizer.bos_token)
    (with_text,) = answer_spans(subject, [(bos + "Which?", (" A",))])
    assert with_text.ids.count(0) == 1


def test_hits_by_place_where_the_right_text_stands_twice() -> None:
    subject = small()
    twice = [question(0, gold, choices=("same", "same", "x", "y")) for gold in range(4)]
    assert sum(choice_hits(Reading(subject, EvalSet(name="exam", role="neither")), twice)) == 1
