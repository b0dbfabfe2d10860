"""Words of an answer, and runs of them."""

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; every other mark is a word of its own."""
    return re.findall(r"\w+|[^\w\s]", text.casefold())


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every run of n words, in their order."""
    return list(zip(*(text[start:] for start in range(n)), strict=False))
