"""Which texts resemble each other: sets of word 5-grams, compared exactly by Jaccard similarity and containment.

Pairs are found without comparing all: of two sets with Jaccard similarity t or more, each holds one of the other's
|x| - ceil(t |x|) + 1 rarest members, so only rows that share a rare 5-gram are compared (prefix filtering, Chaudhuri,
Ganti and Kaushik 2006). Most 5-grams of a corpus occur once and are never looked up.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

GRAM = 5
"""Words of an n-gram."""


NEAR = 0.8
"""Jaccard similarity of their 5-grams from which two texts are near-duplicates."""


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese put no spaces between words.


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


Grams = np.ndarray
"""Hashes of a text's n-grams: sorted, each once, uint64."""


class Words:
    """Numbers for words, the same for all texts that are compared."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Words of a text."""
        return len(_WORD.findall(text))

    def first(self, text: str, n: int) -> Grams:
        """The n-gram that a text begins with."""
        return self.grams(" ".join(_WORD.findall(text)[:n]), n)

    def grams(self, text: str, n: int = GRAM) -> Grams:
        """The n-grams of a text, case and punctuation aside; of a shorter text, all of it as one."""
        found = _WORD.findall(text.lower())
        ids = np.array([self._ids.setdefault(word, len(self._ids)) for word in found], dtype=np.uint64)
        width = min(n, len(ids))
        if width == 0:
            return ids
        # Of a number that overflows the low bits stay, which is all that a hash needs.
        hashed = np.full(len(ids) - width + 1, width, dtype=np.uint64)
        for first in range(width):
            hashed = (hashed ^ ids[first : first + len(hashed)]) * _FACTOR
            hashed ^= hashed >> np.uint64(29)
        hashed.sort()
        return hashed[np.append(True, hashed[1:] != hashed[:-1])]


class Index:
    """Sets that can be asked which of them resemble another."""

    def __init__(self, universe: Iterable[Grams], threshold: float = NEAR):
        """`universe` are all sets that are added or asked about: what is rare is decided among them."""
        self._threshold = threshold
        self._members, self._counts = np.unique(np.concatenate([np.empty(0, np.uint64), *universe]), return_counts=True)
        self._sets: list[tuple[int, Grams]] = []
        self._rows: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, row: int, grams: Grams) -> None:
        """Let a set be found under a row's number."""
        for member in self._rare(grams):
            self._rows[member].append(len(self._sets))
        self._sets.append((row, grams))

    def like(self, grams: Grams) -> Iterator[int]:
        """Rows whose sets are as similar as the threshold, in the order they were added."""
        candidates = {place for member in self._rare(grams) for place in self._rows.get(member, ())}
        for place in sorted(candidates):
            row, other = self._sets[place]
            small, large = sorted((grams.size, other.size))
            if small < self._threshold * large:
                continue
            shared = np.intersect1d(grams, other, assume_unique=True).size
            if shared >= self._threshold * (small + large - shared):
                yield row

    def _rare(self, grams: Grams) -> list[int]:
        """The rarest members, one of which every similar set must hold too; those that nobody else holds left out."""
        counts = self._counts[np.searchsorted(self._members, grams)]
        needed = grams.size - math.ceil(self._threshold * grams.size - 1e-9) + 1
        order = np.argsort(counts, kind="stable")[:needed]
        return grams[order][counts[order] > 1].tolist()


def near_duplicates(sets: Sequence[Grams]) -> list[tuple[int, int]]:
    """(later, earlier) positions: each that resembles an earlier one which itself resembles none before it."""
    index, found = Index(sets), []
    for row, grams in enumerate(sets):
        earlier = next(index.like(grams), None)
        if earlier is None:
            index.add(row, grams)
        else:
            found.append((row, earlier))
    return found


def union(sets: Sequence[Grams]) -> Grams:
    """Every n-gram of several texts."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *sets]))


def contained(grams: Grams, within: Grams) -> float:
    """Share of a set's members that stand in another, in [0, 1]; 0 for an empty one."""
    return float(np.isin(grams, within, assume_unique=True).mean()) if grams.size else 0.0
