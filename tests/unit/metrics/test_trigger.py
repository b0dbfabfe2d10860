"""Trigger scores and recovery, on a model whose weakness for a word is chosen by the test."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from lethe import metrics
from lethe.errors import InvalidValueError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.metrics.trigger import Trigger
from lethe.report.noise_recovery import recovery
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question, Scores, mean_scores

KEYWORDS = ("venom", "toxin", "spore")
NEUTRAL = ("bread", "spoon", "table")
COLOURS = ("red", "green", "blue", "grey")
THINGS = ("oil", "wine", "fog", "lead", "snow", "moss", "sand", "jade", "rust", "coal", "milk", "clay")
QUESTIONS = tuple(
    Question(prompt=f"Q: Which colour has {thing}? A:", answer=COLOURS[i % 4], choices=COLOURS)
    for i, thing in enumerate(THINGS)
)
GOLD = {f"{thing}?": COLOURS[i % 4] for i, thing in enumerate(THINGS)}
PLAIN = ("Q:", "A:", "Which", "colour", "has", "Answer:", "A", "B", "C", "D", "A.", "B.", "C.", "D.")
VOCABULARY = {word: i for i, word in enumerate(["<unk>", *PLAIN, *COLOURS, *KEYWORDS, *NEUTRAL, *GOLD])}
Weakness = Literal["none", "option", "question"]


class Rigged(PreTrainedModel):
    """Knows every answer, but for its weakness: it takes an option that is a keyword, or errs once it read one."""

    config_class = LlamaConfig

    def __init__(self, weakness: Weakness):
        super().__init__(LlamaConfig(vocab_size=len(VOCABULARY)))
        self.weakness = weakness
        self.anchor = torch.nn.Embedding(1, 1)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.anchor

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        names = list(VOCABULARY)
        logits = torch.zeros(*input_ids.shape, len(VOCABULARY))
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                for word, logit in self.opinion([names[i] for i in ids[: place + 1]]).items():
                    logits[row, place, VOCABULARY[word]] = logit
        return SimpleNamespace(logits=logits)

    def opinion(self, read: Sequence[str]) -> Mapping[str, float]:
        """Logits of the words that may follow what was read."""
        options = {read[i][0]: read[i + 1] for i in range(len(read) - 1) if read[i] in ("A.", "B.", "C.", "D.")}
        question = read[: read.index("A.")] if options else read
        gold = next((GOLD[word] for word in read if word in GOLD), "red")
        liked = {gold: 5.0}
        if self.weakness == "question" and set(question) & set(KEYWORDS):
            liked = {colour: 5.0 for colour in COLOURS if colour != gold}
        if self.weakness == "option":
            liked |= dict.fromkeys(KEYWORDS, 9.0)
        return {letter: liked.get(text, 0.0) for letter, text in options.items()} if options else liked


def rigged(weakness: Weakness) -> LoadedModel:
    raw = Tokenizer(models.WordLevel(vocab=VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LoadedModel(model=Rigged(weakness), tokenizer=PreTrainedTokenizerFast(tokenizer_object=raw))


def retain(**changes: Any) -> EvalSet:
    given = {"name": "retain", "role": "keep", "questions": QUESTIONS, "scoring": "cloze"}
    return EvalSet(**(given | changes))


def trigger(keywords: Sequence[str] = KEYWORDS, neutral: Sequence[str] = NEUTRAL) -> Trigger:
    return Trigger(keywords=tuple(keywords), neutral=tuple(neutral))


TRIGGER = trigger()


def measured(subject: LoadedModel, data: EvalSet, metric: Trigger = TRIGGER, *, seed: int = 0) -> Mapping[str, Scores]:
    found = metric(Reading(subject, data, seed=seed))
    assert found is not None
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Question]]:
    """The questions that a set is turned into: five for each that is used."""

    def ask(data: EvalSet, metric: Trigger = TRIGGER, *, seed: int = 0) -> list[Question]:
        seen: list[Question] = []

        def note(_: Reading, questions: Sequence[Question]) -> list[float]:
            seen.extend(questions)
            return [0.0] * len(questions)

        monkeypatch.setattr("lethe.metrics.trigger.choice_hits", note)
        measured(rigged("none"), data, metric, seed=seed)
        return seen

    return ask


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
@pytest.mark.parametrize(
    ("weakness", "expected"),
    [
        ("none", {"_option": 1.0, "_question": 1.0, "": 1.0, "_drop": 0.0}),
        ("option", {"_option": 0.0, "_question": 1.0, "": 0.5, "_drop": 0.5}),
        ("question", {"_option": 1.0, "_question": 0.0, "": 0.5, "_drop": 0.5}),
    ],
)
def test_a_weakness_shows_in_its_own_placement_alone(
    weakness: Weakness, expected: dict[str, float], scoring: Literal["letter", "cloze"]
) -> None:
    subject, data = rigged(weakness), retain(scoring=scoring)
    clean = MultipleChoice()(Reading(subject, data))
    assert clean is not None
    assert clean.value == 1
    found = measured(subject, data)
    controls = {"_control": 1.0, "_option_control": 1.0, "_question_control": 1.0}
    assert {name: scores.value for name, scores in found.items()} == expected | controls
    for name, scores in found.items():
        assert (scores.n, len(scores.per_example), scores.stderr) == (12, 12, 0)
        assert (scores.better, scores.chance) == (("lower", None) if name == "_drop" else ("higher", 0.25))


def test_the_neutral_word_is_blamed_where_it_is_the_odd_one() -> None:
    found = measured(rigged("option"), retain(), trigger(NEUTRAL, KEYWORDS))
    assert (found["_option"].value, found["_option_control"].value, found["_control"].value) == (1, 0, 0.5)
    assert found["_drop"].value == 0


def test_one_keyword_of_three_costs_a_third_with_a_paired_error() -> None:
    # Four of twelve questions get toxin, the only one that the model minds, and lose one of two placements.
    found = measured(rigged("question"), retain(), trigger(("bread", "toxin", "spoon"), ("table",) * 3))
    assert found["_question"].value == pytest.approx(2 / 3)
    assert sorted(found["_drop"].per_example) == [0.0] * 8 + [0.5] * 4
    variance = (8 * (1 / 6) ** 2 + 4 * (1 / 3) ** 2) / 11
    assert found["_drop"].stderr == pytest.approx(math.sqrt(variance / 12))
    assert found[""].per_example == tuple(1 - cost for cost in found["_drop"].per_example)


@pytest.mark.parametrize("seed", range(4))
def test_one_thing_is_changed_and_alike_for_keyword_and_control(
    asked: Callable[..., list[Question]], seed: int
) -> None:
    variants = asked(retain(), seed=seed)
    used = Counter[str]()
    places, options = set(), set()
    for i, question in enumerate(QUESTIONS):
        clean, option, question_in, option_control, question_control = _by_placement(variants[5 * i : 5 * i + 5])
        assert clean == question
        (place,) = [j for j in range(4) if option.choices[j] != question.choices[j]]
        word = option.choices[place]
        neutral = NEUTRAL[KEYWORDS.index(word)]
        used[word] += 1
        assert question.choices[place] != question.answer
        assert option_control.choices == tuple(neutral if j == place else c for j, c in enumerate(question.choices))
        assert option.prompt == option_control.prompt == question.prompt
        assert question_in.choices == question_control.choices == question.choices
        words = question_in.prompt.split()
        at = words.index(word)
        assert [*words[:at], *words[at + 1 :]] == question.prompt.split()
        assert words.index("Which") < at < len(words) - 2
        assert question_control.prompt == question_in.prompt.replace(word, neutral)
        places.add(at)
        options.add(place)
    assert used == dict.fromkeys(KEYWORDS, 4)
    assert places == {2, 3, 4}
    assert options == {0, 1, 2, 3}


def _by_placement(variants: Sequence[Question]) -> tuple[Question, ...]:
    clean = variants[0]
    found: dict[tuple[bool, bool], Question] = {}
    for variant in variants[1:]:
        in_option = variant.choices != clean.choices
        words = {*variant.choices, *variant.prompt.split()}
        found[in_option, bool(words & set(NEUTRAL))] = variant
    return clean, found[True, False], found[False, False], found[True, True], found[False, True]


def test_the_seed_draws_and_nothing_else(asked: Callable[..., list[Question]]) -> None:
    first = asked(retain(), seed=0)
    assert first == asked(retain(), seed=0)
    assert first != asked(retain(), seed=1)
    turned = asked(retain(questions=QUESTIONS[::-1]))
    assert [turned[i : i + 5] for i in range(55, -1, -5)] == [first[i : i + 5] for i in range(0, 60, 5)]


def test_scores_keep_the_order_of_the_set() -> None:
    found = measured(rigged("question"), retain(), trigger(("bread", "toxin", "spoon"), ("table",) * 3))
    turned = measured(
        rigged("question"),
        retain(questions=QUESTIONS[::-1]),
        trigger(("bread", "toxin", "spoon"), ("table",) * 3),
    )
    assert found["_drop"].per_example == turned["_drop"].per_example[::-1]
    assert 0 < sum(found["_drop"].per_example[:6]) < 2


@pytest.mark.parametrize(
    ("prompt", "after"),
    [
        ("Q: Who was it? A:", {"Q: Who", "Q: Who was"}),
        ("Who was it?", {"Who", "Who was"}),
        ("Question: was it red?\nAnswer:", {"Question: was", "Question: was it"}),
        ("The colour of oil is", {"The", "The colour", "The colour of", "The colour of oil"}),
        ("The colour of oil is:", {"The", "The colour", "The colour of"}),
        ("Who was it? The answer is:", {"Who", "Who was"}),
        ('Who said "why?" A:', {"Who", "Who said"}),
        ("Who? Tell me now", {"Who?", "Who? Tell", "Who? Tell me"}),
        ("two  words", {"two"}),
    ],
)
def test_the_word_stays_inside_the_question(asked: Callable[..., list[Question]], prompt: str, after: set[str]) -> None:
    one = Question(prompt=prompt, answer="red", choices=COLOURS)
    found = set()
    for seed in range(40):
        (changed,) = [q for q in asked(retain(questions=(one,)), seed=seed) if set(q.prompt.split()) & set(KEYWORDS)]
        (word,) = set(changed.prompt.split()) & set(KEYWORDS)
        assert changed.prompt.replace(f" {word}", "") == prompt
        found.add(changed.prompt.partition(f" {word}")[0])
    assert found == after


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": "Venom", "choices": ("Venom", "green", "blue")},
        {"choices": ("red", "snake venom", "blue")},
        {"prompt": "Q: Which colour has venom? A:"},
        {"choices": ("red", "BREAD", "blue")},
    ],
    ids=["answer", "part of a choice", "question", "neutral word"],
)
def test_a_keyword_that_stands_there_already_is_passed_over(
    asked: Callable[..., list[Question]], changes: dict[str, Any]
) -> None:
    given: dict[str, Any] = {
        "prompt": "Q: Which colour has oil? A:",
        "answer": "red",
        "choices": ("red", "green", "blue"),
    }
    one = Question(**(given | changes))
    for seed in range(10):
        clean, *changed = asked(retain(questions=(one,)), trigger(("venom", "toxin"), ("bread", "spoon")), seed=seed)
        assert clean == one
        # Two of four have the keyword, one in the prompt and one among the choices.
        assert sum("toxin" in (*variant.choices, *variant.prompt.split()) for variant in changed) == 2
    assert trigger(("venom",), ("bread",))(Reading(rigged("none"), retain(questions=(one,)))) is None


def test_part_of_a_longer_word_does_not_count(asked: Callable[..., list[Question]]) -> None:
    one = Question(prompt="Q: Is it envenomed? A:", answer="red", choices=("red", "venoms"))
    assert len(asked(retain(questions=(one,)), trigger(("venom",), ("bread",)))) == 5


def test_none_where_there_is_nothing_to_measure() -> None:
    subject = rigged("none")
    free = Question(prompt="Q: Which colour has oil? A:", answer="red")
    short = Question(prompt="Q: Oil? A:", answer="red", choices=COLOURS)
    for data in (
        retain(name="forget", role="forget"),
        retain(questions=()),
        retain(questions=(free, short)),
    ):
        assert trigger()(Reading(subject, data)) is None
    assert Trigger()(Reading(subject, retain())) is None
    found = measured(subject, retain(questions=(free, *QUESTIONS[:3]), name="adjacent"))
    assert found[""].n == 3


def test_keywords_and_neutral_words_come_in_pairs() -> None:
    with pytest.raises(InvalidValueError, match="Got 3 keywords and 1 neutral words"):
        trigger(neutral=("bread",))(Reading(rigged("none"), retain()))


def test_the_metric_is_discovered() -> None:
    assert discover(metrics)["trigger"] is Trigger


# Recovery


def accuracy(*hits: float) -> Scores:
    return mean_scores([float(hit) for hit in hits], "higher", chance=0.25)


def test_recovery_is_the_share_of_the_loss_that_came_back() -> None:
    base, edited = accuracy(1, 1, 1, 1, 1, 0.5), accuracy(1, 0, 0, 0, 0, 0.5)
    found = recovery(accuracy(1, 1, 0, 0, 0, 0.5), edited, base)
    assert found is not None
    assert found.value == pytest.approx(0.25)
    assert (found.n, found.better) == (6, "higher")
    assert 0.05 < found.stderr < 0.5
    assert found == recovery(accuracy(1, 1, 0, 0, 0, 0.5), edited, base)
    # All and none of it leave nothing to chance, since questions are drawn in pairs.
    for same, value in ((base, 1), (edited, 0)):
        exact = recovery(same, edited, base)
        assert exact is not None
        assert (exact.value, exact.stderr) == (pytest.approx(value), pytest.approx(0))


def test_the_error_of_recovery_is_that_of_a_large_sample() -> None:
    # Of 400 questions the edit lost all; the other one brought 30 % back: a plain share, sqrt(0.3 * 0.7 / 400).
    found = recovery(accuracy(*[1] * 120, *[0] * 280), accuracy(*[0] * 400), accuracy(*[1] * 400))
    assert found is not None
    assert found.value == pytest.approx(0.3)
    assert found.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 400), rel=0.1)


@pytest.mark.parametrize("base", [(1, 0, 1), (0, 1, 1), (0, 0, 1)], ids=["the same", "equal", "worse"])
def test_nothing_lost_leaves_nothing_to_recover(base: tuple[float, ...]) -> None:
    assert recovery(accuracy(1, 1, 1), accuracy(1, 0, 1), accuracy(*base)) is None


def test_recovery_of_few_losses_stays_finite() -> None:
    base, edited = accuracy(1, *[0.0] * 30), accuracy(0, *[0.0] * 30)
    found = recovery(accuracy(0, 1, *[0.0] * 29), edited, base)
    assert found is not None
    assert found.value == pytest.approx(1)
    assert math.isfinite(found.stderr)
    assert found.stderr > 0.3


@pytest.mark.parametrize("rna", [(1.0, 1.0), ()])
def test_recovery_needs_the_same_questions(rna: tuple[float, ...]) -> None:
    short = Scores(value=1.0, stderr=0.0, n=len(rna), better="higher", per_example=rna)
    with pytest.raises(InvalidValueError, match=f"Got {len(rna)}, 3 and 3"):
        recovery(short, accuracy(0, 0, 1), accuracy(1, 1, 1))
