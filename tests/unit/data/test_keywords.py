"""Keywords of small corpora whose counts are known."""

from collections import Counter
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lethe.data.keywords import find_keywords, neutral_keywords, z_scores
from lethe.errors import CorpusError, InvalidValueError
from lethe.model.loading import load_tokenizer
from lethe.suites import world
from lethe.suites.world import exam


def bytewise() -> PreTrainedTokenizerFast:
    """One token for each byte, so that a word of n letters has n + 1 tokens after a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_z_scores_by_hand() -> None:
    # venom: ln((4/5) / (2/7)) / sqrt(1/4 + 1/2); lamp: ln((4/5) / (5/4)) / sqrt(1/4 + 1/5)
    scores = z_scores(Counter(venom=2, lamp=1), Counter(lamp=2, bread=1))
    assert scores == {"venom": pytest.approx(1.188903, abs=1e-5), "lamp": pytest.approx(-0.665286, abs=1e-5)}


def test_a_word_as_common_in_both_corpora_scores_zero() -> None:
    scores = z_scores(Counter(lamp=3, venom=7), Counter(lamp=30, bread=70))
    assert scores["lamp"] == pytest.approx(0, abs=1e-12)
    assert scores["venom"] > 2
    assert z_scores(Counter(lamp=5), Counter(lamp=5)) == {"lamp": 0}


def test_topics_take_turns_and_a_word_is_taken_once() -> None:
    forget = {
        "many": ["venom venom venom venom toxin toxin toxin spore spore"],
        "few": ["venom venom venom exploit exploit lamp"],
    }
    retain = ["lamp bread lamp bread"]
    assert find_keywords(forget, retain, 4) == ("venom", "exploit", "toxin", "spore")
    assert find_keywords(forget, retain, 1) == ("venom",)


def test_a_word_of_both_corpora_needs_a_clear_surplus() -> None:
    rare, clear = "lamp " * 3 + "venom ", "lamp " * 60 + "venom "
    retain = ["lamp " + "bread " * 3]
    assert find_keywords({"a": [rare]}, retain, 1) == ("venom",)
    with pytest.raises(CorpusError):
        find_keywords({"a": [rare]}, retain, 2)
    assert find_keywords({"a": [clear]}, ["lamp " + "bread " * 60], 2) == ("lamp", "venom")


def test_words_are_counted_in_any_case_and_keep_the_commonest() -> None:
    texts = ["SARS-CoV-2 is a virus. Virus, VIRUS; ab 2024 sars-cov-2 SARS-CoV-2. VIRUS of VIRUS"]
    assert find_keywords({"a": texts}, ["nothing here"], 2) == ("VIRUS", "SARS-CoV-2")
    # Two letters, or no letter at all, make no keyword.
    with pytest.raises(CorpusError, match=r"^2 words .* 3 keywords"):
        find_keywords({"a": texts}, ["nothing here"], 3)


def test_errors_name_no_word_of_the_forget_corpus() -> None:
    with pytest.raises(CorpusError) as caught:
        find_keywords({"a": ["zyx wvu"]}, ["bread"], 3)
    assert "zyx" not in str(caught.value)
    assert "wvu" not in str(caught.value)
    with pytest.raises(InvalidValueError, match="Got 0"):
        find_keywords({"a": ["zyx wvu"]}, ["bread"], 0)


def test_neutral_words_have_the_length_and_the_capitals() -> None:
    keywords = ("Zorba", "venom", "abcdef")
    forget = {"a": ["Zorba venom abcdef", "a forgotten table, some sugar"]}
    retain = ["Paris bread Rome table Table Zorba sugar forest venom Paris"]
    # Of five letters and in no forget text: Paris, bread. Of six: forest.
    assert neutral_keywords(keywords, retain, forget, bytewise(), 0) == ("Paris", "bread", "forest")


def test_neutral_words_fall_back_on_other_capitals_and_never_repeat() -> None:
    drawn = neutral_keywords(("Zorba", "Yanni"), ["bread Paris"], {"a": ["Zorba Yanni"]}, bytewise(), 0)
    assert drawn == ("Paris", "bread")


def test_neutral_words_are_drawn_by_the_seed() -> None:
    retain = ["bread spoon table chair light water stone glass"]
    draws = [neutral_keywords(("venom",), retain, {"a": ["venom"]}, bytewise(), seed) for seed in range(12)]
    assert draws == [neutral_keywords(("venom",), retain, {"a": ["venom"]}, bytewise(), seed) for seed in range(12)]
    assert len(set(draws)) > 3


def test_a_keyword_without_a_neutral_word_is_named_by_its_place() -> None:
    with pytest.raises(CorpusError, match=r"keyword 2 of 2 has 9 tokens") as caught:
        neutral_keywords(("venom", "toxicity"), ["bread"], {"a": ["venom toxicity"]}, bytewise(), 0)
    assert "toxicity" not in str(caught.value)
    with pytest.raises(CorpusError, match=r"keyword 2 of 2 has 6 tokens"):
        neutral_keywords(("venom", "spore"), ["bread"], {"a": ["venom"]}, bytewise(), 0)


def words_of(texts: Sequence[str]) -> set[str]:
    return set(" ".join(texts).casefold().replace(".", " ").replace(",", " ").replace("?", " ").split())


def test_keywords_of_the_built_in_world() -> None:
    forget, retain = exam.forget_texts(), exam.retain_texts()
    keywords = find_keywords(forget, retain, 20)
    assert len(set(map(str.casefold, keywords))) == 20
    tokenizer = load_tokenizer(world.MODEL_FOLDER, None)
    neutral = neutral_keywords(keywords, retain, forget, tokenizer, 1)

    def lengths(words: Sequence[str]) -> list[int]:
        return [len(tokenizer(f"near {word}", add_special_tokens=False)["input_ids"]) for word in words]

    assert lengths(neutral) == lengths(keywords)
    assert len(set(neutral)) == 20
    kept, forgotten = words_of(retain), words_of([text for texts in forget.values() for text in texts])
    assert set(map(str.casefold, neutral)) <= kept - forgotten
    assert set(map(str.casefold, keywords)) <= forgotten
