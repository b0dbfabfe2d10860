"""Tokenising texts in pieces changes no token, whatever the tokenizer; where that is not proven it is not done."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lethe import load_tokenizer
from lethe.data import shared_tokens, tokens
from lethe.data.shared_tokens import CLOSING, OPENING, SPLITS_WORDS, cuts_at_words, encode_alike
from lethe.data.tokens import common_length, encode
from lethe.suites.world import MODEL_FOLDER

STORIES = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260K"
SPECIAL = ["<unk>", "<s>", "</s>"]
SAID = (
    "The which of following is are known about Answer: A. B, it's Don't 1984 12 3 end: naïve e\u0301te\u0301 中文字 "
    "🙂🙂 x=y (a) foo.bar ▁ Ġ <s> </s> virus viruses viral cell; cells! why? ... -- C3PO 0.5 über\u00a0uns"
)
WORDS = SAID.split(" ")
GAPS = (" ",) * 12 + ("  ", "\n", "\n\n", " \n", "\t", "   ")


def texts(seed: int, count: int = 60) -> list[str]:
    """Prompts that share beginnings, each followed by answers, as exams have them."""
    rng = random.Random(seed)

    def said(count: int) -> str:
        return "".join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(count))

    found: list[str] = []
    shots = said(40)
    for number in range(count // 6):
        shots = shots if number % 4 else said(40)
        prompt = (shots + said(rng.randrange(3, 12)) + rng.choice(("Answer:", "end", "中文字"))) * (number % 7 != 3)
        found += [prompt, *(prompt + rng.choice((" ", "", "\n")) + rng.choice((*"ABCD", said(3))) for _ in range(5))]
    return found


def fast(backend: Tokenizer, *, bos: bool = True, closing: str = "") -> PreTrainedTokenizerFast:
    ids = [(name, backend.token_to_id(name)) for name in SPECIAL]
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"<s> $A{closing}", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def trained(
    normalizer: normalizers.Normalizer | None = None,
    split: pre_tokenizers.PreTokenizer | None = None,
    *,
    model: models.Model | None = None,
    trainer: trainers.Trainer | None = None,
) -> Tokenizer:
    backend = Tokenizer(model or models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if split is not None:
        backend.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet() + sorted(CLOSING)
    trainer = trainer or trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([one for seed in range(100, 104) for one in texts(seed)], trainer)
    return backend


def split_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def marked(*first: normalizers.Normalizer) -> normalizers.Normalizer:
    return normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])


def words_of_space(backend: Tokenizer) -> Tokenizer:
    """The same without its pre-tokenizer, which was only there so that no token crosses words."""
    bare = Tokenizer(backend.model)
    bare.normalizer = backend.normalizer
    bare.add_special_tokens([AddedToken(name) for name in SPECIAL])
    return bare


def ignoring_merges(backend: Tokenizer) -> Tokenizer:
    backend.model.ignore_merges = True
    return backend


BY_SPACE = pre_tokenizers.Split("▁", behavior="merged_with_next")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PATTERNS = sorted(SPLITS_WORDS)

PROVEN: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "built-in": lambda: load_tokenizer(MODEL_FOLDER),
    "gpt-2": lambda: fast(trained(split=BYTES), bos=False),
    "byte-level, a space before": lambda: fast(trained(split=pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "gpt-neox": lambda: fast(trained(normalizers.NFC(), BYTES)),
    "starcoder": lambda: fast(
        trained(split=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]))
    ),
    "merges passed over": lambda: fast(ignoring_merges(trained(split=BYTES))),
    "llama 2": lambda: fast(words_of_space(trained(marked(normalizers.Prepend("▁")), BY_SPACE))),
    "metaspace": lambda: fast(trained(split=pre_tokenizers.Metaspace(prepend_scheme="first", split=True))),
    "gemma": lambda: fast(gemma()),
    "closing eos": lambda: fast(trained(split=BYTES), closing=" </s>"),
    **{
        f"pattern {number}": lambda pattern=pattern: fast(
            ignoring_merges(trained(normalizers.NFC(), split_bytes(pattern)))
        )
        for number, pattern in enumerate(PATTERNS)
    },
}


def gemma() -> Tokenizer:
    backend = trained(marked(), BY_SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "\t", "<table>")])
    return backend


def adding(content: str, **settings: bool) -> PreTrainedTokenizerBase:
    backend = trained(split=BYTES)
    backend.add_tokens([AddedToken(content, **settings)])
    return fast(backend)


def whole_words() -> Tokenizer:
    return trained(
        split=pre_tokenizers.Whitespace(),
        model=models.WordPiece(unk_token="<unk>"),
        trainer=trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False),
    )


def pieces() -> Tokenizer:
    return trained(
        split=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        model=models.Unigram(),
        trainer=trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", max_piece_length=12, show_progress=False
        ),
    )


def unknown_ones_fused() -> Tokenizer:
    """Knows neither dots nor colons."""
    backend = trained(
        marked(),
        BY_SPACE,
        model=models.BPE(unk_token="<unk>", fuse_unk=True),
        trainer=trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, limit_alphabet=20, show_progress=False),
    )
    return words_of_space(backend)


UNPROVEN: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "unigram": lambda: fast(pieces()),
    "whole words": lambda: fast(whole_words()),
    "merges across words": lambda: fast(trained(marked())),
    "unknown pattern": lambda: fast(trained(split=split_bytes(r"[a-z ]+|[^a-z ]+"))),
    "spaces marked before they are split at": lambda: fast(trained(marked(), split_bytes(PATTERNS[0]))),
    "bytes before the pattern": lambda: fast(
        trained(
            split=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    pre_tokenizers.Split(Regex(PATTERNS[0]), behavior="isolated"),
                ]
            )
        )
    ),
    "merges passed over for a whole text": lambda: fast(ignoring_merges(words_of_space(trained(marked(), BY_SPACE)))),
    "unknown ones fused": lambda: fast(unknown_ones_fused()),
    "lower case": lambda: fast(trained(normalizers.Lowercase(), BYTES)),
    "an added word": lambda: adding("Answer:"),
    "an added word that eats spaces": lambda: adding("virus", rstrip=True),
    "added words with a space": lambda: adding("is are"),
    "a token behind": lambda: fast(trained(split=BYTES), closing=" <unk>"),
    "slow": ByT5Tokenizer,
}


@pytest.fixture
def always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_tokens, "CHARACTERS_PER_TOKEN", 0)


def same(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(3):
        asked = texts(seed)
        for special in (True, False):
            assert encode_alike(tokenizer, asked, special=special) == encode(tokenizer, asked, special=special)


@pytest.mark.usefixtures("always_worth_it")
@pytest.mark.parametrize("name", PROVEN)
def test_pieces_have_the_tokens_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PROVEN[name]()
    assert cuts_at_words(tokenizer)
    monkeypatch.setattr(shared_tokens, "SAMPLE", 0)
    same(tokenizer)
    (lead,) = encode(tokenizer, ["a"])
    for text in texts(7, 12):
        cuts = [at for at in range(1, len(text) - 1) if _may_be_cut(text, at)]
        left, right = encode(tokenizer, [text[:at] for at in cuts]), encode(tokenizer, ["a" + text[at:] for at in cuts])
        whole = encode(tokenizer, [text])[0]
        for at, before, after in zip(cuts, left, right, strict=True):
            assert before + after[len(lead) :] == whole, f"cut at {at}"


def _may_be_cut(text: str, at: int) -> bool:
    return text[at] == " " and text[at - 1] in CLOSING and text[at + 1] in OPENING


@pytest.mark.usefixtures("always_worth_it")
@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_is_tokenised_whole(name: str) -> None:
    tokenizer = UNPROVEN[name]()
    assert not cuts_at_words(tokenizer)
    same(tokenizer)


@pytest.mark.skipif(not STORIES.exists(), reason="needs stories260K in ../shared/data/models")
@pytest.mark.usefixtures("always_worth_it")
def test_a_published_tokenizer_without_a_split_into_words() -> None:
    tokenizer = load_tokenizer(STORIES)
    assert cuts_at_words(tokenizer)
    same(tokenizer)


@pytest.mark.usefixtures("always_worth_it")
def test_a_proof_that_fails_is_seen_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = UNPROVEN["merges across words"](), texts(0)
    monkeypatch.setattr(shared_tokens, "cuts_at_words", lambda _: True)
    assert encode_alike(tokenizer, asked) == encode(tokenizer, asked)
    monkeypatch.setattr(shared_tokens, "SAMPLE", 0)
    assert encode_alike(tokenizer, asked) != encode(tokenizer, asked)


def characters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the number of characters of each call of the tokenizer from now on."""
    seen: list[int] = []
    plain = shared_tokens.encode

    def counting(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        seen.append(sum(map(len, texts)))
        return plain(tokenizer, texts, special=special)

    monkeypatch.setattr(shared_tokens, "encode", counting)
    return seen


def test_what_texts_share_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, shots = load_tokenizer(MODEL_FOLDER), "Which of these is it? Answer: B\n\n" * 50
    prompts = [f"{shots}What is the {number}th of them? Answer:" for number in range(40)]
    asked = [prompt + answer for prompt in prompts for answer in ("", " A", " B", " C", " D")]
    seen = characters(monkeypatch)
    encode_alike(tokenizer, asked)
    own = sum(len(prompt) - len(shots) + 4 * len("a Answer: A") for prompt in prompts)
    assert sum(seen) < shared_tokens.SAMPLE * len(asked[1]) + len(shots) + 2 * own
    few = asked[:2]
    seen.clear()
    assert encode_alike(tokenizer, few) == encode(tokenizer, few)
    assert seen == [sum(map(len, few))], "to prove it would cost more than it saves"


def test_common_length() -> None:
    assert [common_length(*pair) for pair in (("", "a"), ("abc", "abd"), ("ab", "abc"), ((1, 2), (1, 2)))] == [
        0,
        2,
        2,
        2,
    ]
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.randrange(2) for _ in range(rng.randrange(9))] for _ in range(2))
        equal = [x == y for x, y in zip(a, b, strict=False)]
        assert common_length(a, b) == (equal.index(False) if False in equal else len(equal))


def test_many_texts_are_tokenised_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = load_tokenizer(MODEL_FOLDER), texts(0)
    whole = encode(tokenizer, asked)
    monkeypatch.setattr(tokens, "TEXTS_PER_CALL", 7)
    assert encode(tokenizer, asked) == whole
    assert encode(tokenizer, []) == []
