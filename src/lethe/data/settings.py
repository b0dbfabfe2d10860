"""Settings of the corpora: how their rows become batches."""

from typing import Literal

Counted = Literal["no-bos", "real-tokens", "all-tokens"]
"""Which tokens count: all but BOS and padding, all but padding, or all, padding included (the published code)."""


Positions = Literal["last", "differing", "all"]
"""Tokens of a forget prompt that are steered: its last one; those from the first that sets it apart from every
retain prompt; or all of them, BOS included (published)."""
