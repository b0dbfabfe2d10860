"""Tokenising many rows that share their parts, equal to tokenising each row whole."""

import itertools
import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import models
from transformers import PreTrainedTokenizerBase

from lethe.data.tokens import common_length, encode

CHARACTERS_PER_TOKEN = 4
"""Of the vocabulary: to look through it costs as much as to tokenise so many characters."""


SAMPLE = 4
"""Texts that are tokenised whole, too, to see that the pieces give the same."""


CLOSING = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;?!")
"""A text is cut only before a space that follows one of these."""


OPENING = CLOSING - frozenset(".,:;?!")
"""The space of a cut stands before one of these."""


SPACES = " Ġ▁"
"""A space in a vocabulary: as it is, as byte-level tokenizers write it, and as SentencePiece does."""


CROSSING = re.compile(rf"[{''.join(sorted(CLOSING))}][{SPACES}]")


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


_WHITE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)


SPLITS_WORDS = frozenset(
    {
        # GPT-2, as a pattern of its own
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, Qwen 2 and 3, Qwen 3.5, GPT-4o and gpt-oss
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITE}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITE}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_WHITE}",
        rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_WHITE}",
    }
)
"""Patterns none of whose alternatives goes past a cut, looks behind, or looks ahead from anything but white space."""


def encode_alike(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """What `encode` gives: what a text shares with its neighbours is tokenised once, where that changes no token."""
    numbers: dict[tuple[bool, str], int] = {}
    parts = [[numbers.setdefault(piece, len(numbers)) for piece in pieces] for pieces in _pieces(texts)]
    saved = sum(map(len, texts)) - sum(len(piece) for _, piece in numbers)
    if saved < CHARACTERS_PER_TOKEN * len(tokenizer) or not cuts_at_words(tokenizer):
        return encode(tokenizer, texts, special=special)
    # Behind a word of its own, a piece is tokenised as what it is: the middle of a text.
    lead = "a"
    (before,) = encode(tokenizer, [lead], special=special)
    found = encode(tokenizer, [lead * inner + piece for inner, piece in numbers], special=special)
    found = [row[inner * len(before) :] for (inner, _), row in zip(numbers, found, strict=True)]
    rows = [[*itertools.chain.from_iterable(found[number] for number in part)] for part in parts]
    sample = random.Random(0).sample(range(len(texts)), min(SAMPLE, len(texts)))
    if encode(tokenizer, [texts[index] for index in sample], special=special) != [rows[index] for index in sample]:
        return encode(tokenizer, texts, special=special)
    return rows


def cuts_at_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's tokens are those of its parts, wherever it is cut between `CLOSING` and a space and `OPENING`.

    Proven for byte pairs: no token of the vocabulary goes past such a cut, so no merge does, and merges on one side do
    not know of the other. What stands before the merges must keep to its side as well: added tokens, the normalizer,
    the split into words. False wherever one of these is of an unknown kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None or not isinstance(backend.model, models.BPE):
        return False
    model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=False)
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    # Unknown characters in a row are fused, also with what stands before a cut.
    bytewise = {chr(byte) for byte in range(128) if f"<0x{byte:02X}>" in vocabulary} if model.byte_fallback else set()
    if model.fuse_unk and not vocabulary.keys() | bytewise >= CLOSING:
        return False
    normalizers, splits = _parts(backend.normalizer, "normalizers"), _parts(backend.pre_tokenizer, "pretokenizers")
    # Whole words are looked up before they are merged, so that a cut has to be the end of a word.
    if model.ignore_merges and not any(_splits_words(part) or part.get("use_regex") for part in splits):
        return False
    # An added token is cut out first, and changes how what follows it is begun.
    added = [*(token.content for token in backend.get_added_tokens_decoder().values()), tokenizer.eos_token or " "]
    return (
        _keeps_to_its_side(normalizers, splits)
        and not any(token[-1:] in CLOSING or CROSSING.search(token) for token in added)
        and not any(map(CROSSING.search, vocabulary))
        and _nothing_behind(tokenizer)
    )


def _pieces(texts: Sequence[str]) -> Iterator[list[tuple[bool, str]]]:
    """Each text in pieces, cut where it departs from its neighbours; and whether a piece is an inner one."""
    cuts, before = [0], 0
    for text, following in itertools.zip_longest(texts, texts[1:], fillvalue=""):
        after = _last_cut(text, common_length(text, following))
        while cuts[-1] > before:
            cuts.pop()
        for place in (before, after):
            if place > cuts[-1]:
                cuts.append(place)
        yield [(start > 0, text[start:end]) for start, end in itertools.pairwise([*cuts, len(text)])]
        before = after


def _last_cut(text: str, end: int) -> int:
    """The last place where the text may be cut with the letters on both sides before `end`; 0 if there is none."""
    place = text.rfind(" ", 1, max(0, end - 1))
    while place > 0 and not (text[place - 1] in CLOSING and text[place + 1] in OPENING):
        place = text.rfind(" ", 1, place)
    return max(0, place)


def _parts(component: Any, inner: str) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, or of those that it is a sequence of."""

    def flat(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [one for each in part[inner] for one in flat(each)] if part["type"] == "Sequence" else [part]

    return flat(json.loads(component.__getstate__())) if component is not None else []


def _keeps_to_its_side(normalizers: Sequence[dict[str, Any]], splits: Sequence[dict[str, Any]]) -> bool:
    """Whether a text is written and split as its parts are, its beginning and the words that touch the cut aside."""
    if splits and splits[-1]["type"] == "ByteLevel":
        # Patterns must see spaces as spaces: bytes are written as letters last.
        known = all(part["type"] == "Digits" or _splits_words(part) for part in splits[:-1])
        return known and all(part["type"] == "NFC" for part in normalizers)
    return all(map(_marks_spaces, normalizers)) and all(map(_splits_at_marks, splits))


def _splits_words(part: dict[str, Any]) -> bool:
    known = part["type"] == "Split" and part["pattern"].get("Regex") in SPLITS_WORDS
    return known and part["behavior"] == "Isolated" and not part["invert"]


def _marks_spaces(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return part["pattern"] == {"String": " "} and part["content"] == "▁"
    return part["type"] == "NFC" or (part["type"] == "Prepend" and part["prepend"] == "▁")


def _splits_at_marks(part: dict[str, Any]) -> bool:
    if part["type"] == "Split":
        return part["pattern"] == {"String": " "} and part["behavior"] == "MergedWithPrevious"
    return part["type"] == "Digits" or (part["type"] == "Metaspace" and part["replacement"] == "▁")


def _nothing_behind(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens stand before a text only."""
    short, longer = encode(tokenizer, ["a", "a b"])
    return longer[: len(short)] == short
