"""What counts as a refusal, and what does not."""

import pytest

from lethe.data.refusals import PHRASES, UNWANTED, WANTED, is_refusal
from lethe.suites.world.generator import DECLINES


@pytest.mark.parametrize("text", [*WANTED, *UNWANTED])
def test_every_listed_refusal_is_one(text: str) -> None:
    assert is_refusal(text)
    assert is_refusal(text.upper())


@pytest.mark.parametrize(
    "text",
    [
        "I don\u2019t know.",
        "I don`t   know, sorry",
        "I DO NOT KNOW",
        "Well... I can't say!",
        "Sorry. I couldn't find that name.",
        "I'm unable to help",
        "I\u00a0do not know",
        "As an AI, I have no opinion.",
    ],
)
def test_spelling_does_not_matter(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "Anna Knowles",
        "He did not know the answer, so he asked.",
        "It is not known for its river.",
        "The unknown soldier",
        "In 1948, at the age of 12",
        "She cannot swim.",
        "Illegal fishing",
        "Record of the sea",
        "I know it well",
        "A harmful bacterium of the sea",
        "Unable",
        "As an aircraft",
        "Hawaii do not know",
    ],
)
def test_ordinary_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)
    assert not is_refusal(text, WANTED)


def test_wanted_refusals_count_where_the_answer_begins_with_them() -> None:
    own = ("No entry.", "  ", "?!")
    assert is_refusal("no entry", own)
    assert is_refusal("No entry, nor any other", own)
    assert not is_refusal("There is no entry", own)
    assert not is_refusal("No entrytax", own)
    assert not is_refusal("No entry")
    assert not is_refusal("anything", own), "a refusal without a word matches nothing"


def test_the_built_in_models_declines_are_refusals_by_the_phrases_alone() -> None:
    assert all(is_refusal(text) for text in DECLINES)


def test_the_lists_hold_no_text_twice_and_phrases_are_plain() -> None:
    assert 10 <= len(WANTED) <= 20
    assert len({*WANTED, *UNWANTED}) == len(WANTED) + len(UNWANTED)
    assert len(set(PHRASES)) == len(PHRASES)
    assert all(phrase == " ".join(phrase.split()) == phrase.casefold() and phrase.isascii() for phrase in PHRASES)
    assert not any("'" in phrase for phrase in PHRASES)
