"""Words that mark a forget corpus, and for each a neutral word of equal length from the retain corpus."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from lethe.errors import CorpusError, InvalidValueError

LEAST_Z = 1.96
"""A word that stands in the retain corpus, too, needs at least this z-score."""


LEAST_LETTERS = 3


_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def find_keywords(forget: Mapping[str, Sequence[str]], retain: Sequence[str], n: int) -> tuple[str, ...]:
    """The `n` words that set the forget corpora apart from the retain corpus, the topics taking turns.

    A word is letters and digits, with hyphens inside, of three characters or more and at least one letter; it counts
    in any case and is given in the one most often seen. Each topic ranks its words by their z-score against the retain
    corpus (`z_scores`). A word of the retain corpus needs one of `LEAST_Z`, any other word one above 0.

    Raises: CorpusError if fewer words qualify; InvalidValueError for n below 1.
    """
    if n < 1:
        raise InvalidValueError(f"the number of keywords must be at least 1. Got {n}.")
    seen = {topic: _surfaces(texts) for topic, texts in forget.items()}
    seen_retain = _surfaces(retain)
    kept = _totals(seen_retain)
    ranked = []
    for found in seen.values():
        z = z_scores(_totals(found), kept)
        fit = [word for word in found if z[word] > 0 and (word not in kept or z[word] >= LEAST_Z)]
        ranked.append(sorted(fit, key=lambda word, z=z: (-z[word], word)))
    surfaces: dict[str, Counter[str]] = defaultdict(Counter)
    for found in (*seen.values(), seen_retain):
        for word, forms in found.items():
            surfaces[word].update(forms)
    words = _in_turn(ranked)
    if len(words) < n:
        raise CorpusError(
            f"{len(words)} words set the forget corpora apart from the retain corpus, where {n} keywords are wanted.\n"
            "Ask for fewer keywords, or name them."
        )
    return tuple(_commonest(surfaces[word]) for word in words[:n])


def z_scores(forget: Counter[str], retain: Counter[str]) -> dict[str, float]:
    """How far each word counted in `forget` is above its share in `retain`, in standard deviations; below 0, less.

    The z-score of the log-odds ratio under an informative Dirichlet prior: each word's count in both corpora together.
    A lighter prior would put words that only one corpus has behind commoner words that both have.

    Source: Monroe, Colaresi and Quinn, "Fightin' Words", Political Analysis 16 (2008), section 3.5.
    """
    pooled = forget + retain
    total, total_forget, total_retain = pooled.total(), forget.total(), retain.total()
    scores = {}
    for word in forget:
        ours, theirs = forget[word] + pooled[word], retain[word] + pooled[word]
        # A corpus of one single word has no other word to be odds against.
        other_ours, other_theirs = max(total_forget + total - ours, 1e-9), max(total_retain + total - theirs, 1e-9)
        log_odds = math.log(ours / other_ours) - math.log(theirs / other_theirs)
        scores[word] = log_odds / math.sqrt(1 / ours + 1 / theirs)
    return scores


def neutral_keywords(
    keywords: Sequence[str],
    retain: Sequence[str],
    forget: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> tuple[str, ...]:
    """For each keyword another word of the retain corpus, of as many tokens, that stands in no forget corpus.

    Tokens are counted as inside a sentence, after a space. Words capitalised alike are drawn first; no word twice.

    Raises: CorpusError if the retain corpus has no such word left for a keyword.
    """
    banned = {keyword.casefold() for keyword in keywords}
    banned.update(word for texts in forget.values() for word in _surfaces(texts))
    words = sorted(_commonest(forms) for word, forms in _surfaces(retain).items() if word not in banned)
    pools: dict[int, list[str]] = defaultdict(list)
    for word, length in zip(words, _token_counts(tokenizer, words), strict=True):
        pools[length].append(word)
    rng = random.Random(seed)
    drawn = []
    for place, (keyword, length) in enumerate(zip(keywords, _token_counts(tokenizer, keywords), strict=True), 1):
        pool = pools[length]
        if not pool:
            raise CorpusError(
                f"keyword {place} of {len(keywords)} has {length} token{'s' * (length != 1)}, and the retain corpus "
                "has no word of that length left that stands in no forget corpus.\n"
                "Choose another keyword, name the neutral words, or give a larger retain corpus."
            )
        alike = [word for word in pool if _capitals(word) == _capitals(keyword)]
        word = rng.choice(alike or pool)
        pool.remove(word)
        drawn.append(word)
    return tuple(drawn)


def _surfaces(texts: Iterable[str]) -> dict[str, Counter[str]]:
    """How often each form of each word stands in the texts, by the word in lower case."""
    forms = Counter(word for text in texts for word in _WORD.findall(text))
    surfaces: dict[str, Counter[str]] = defaultdict(Counter)
    for form, count in forms.items():
        if len(form) >= LEAST_LETTERS and any(map(str.isalpha, form)):
            surfaces[form.casefold()][form] = count
    return dict(surfaces)


def _totals(surfaces: Mapping[str, Counter[str]]) -> Counter[str]:
    return Counter({word: forms.total() for word, forms in surfaces.items()})


def _commonest(forms: Counter[str]) -> str:
    return min(forms, key=lambda form: (-forms[form], form))


def _in_turn(ranked: Sequence[Sequence[str]]) -> list[str]:
    """The best word of each list, then the next best of each; a word that several lists hold is taken once."""
    taken: dict[str, None] = {}
    queues = [iter(words) for words in ranked]
    while queues:
        for queue in list(queues):
            word = next((word for word in queue if word not in taken), None)
            if word is None:
                queues.remove(queue)
            else:
                taken[word] = None
    return list(taken)


def _token_counts(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Tokens that each word adds to a text which it follows after a space."""
    before = "a"
    rows = tokenizer([before, *(f"{before} {word}" for word in words)], add_special_tokens=False)["input_ids"]
    return [len(row) - len(rows[0]) for row in rows[1:]]


def _capitals(word: str) -> str:
    """`lower`, `Capital` or `miXed`, by the letters of the word."""
    if word == word.lower():
        return "lower"
    return "capital" if word == word[0].upper() + word[1:].lower() else "mixed"
