"""Words of an answer, and runs of them."""

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; every other mark is a word of its own."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def has_rouge_words(text: str) -> bool:
    """Whether there is a word for ROUGE, to which only Latin letters and digits make one."""
    return re.search(r"[a-z0-9]", text.lower()) is not None


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n words, in their order."""
    return list(zip(*(text[start:] for start in range(n)), strict=False))
