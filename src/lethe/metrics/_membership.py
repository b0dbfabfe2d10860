"""Whether a text was trained on: scores of one text, and how well they tell two groups of texts apart.

A higher score says that the text is less likely to have been trained on.
"""

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.errors import InvalidValueError
from lethe.types import Scores

SHARE = 0.4
"""Share of a text's tokens that Min-K looks at, as in MUSE and TOFU's evaluations; its paper has 0.2."""


LEAST_VARIANCE = 1e-6
"""Min-K++ divides by the root of no less than this: a certain prediction has no variance."""


def loss(log_probs: Float[Tensor, " token"]) -> float:
    """Mean negative log-likelihood of a text's tokens, in nats (Yeom et al. 2018, arXiv 1709.01604)."""
    return -float(log_probs.double().mean())


def zlib_ratio(log_probs: Float[Tensor, " token"], text: str) -> float:
    """Loss in nats over the text's length in bytes once compressed (Carlini et al. 2021, arXiv 2012.07805)."""
    return loss(log_probs) / len(zlib.compress(text.encode("utf-8")))


def min_k(log_probs: Float[Tensor, " token"], share: float = SHARE) -> float:
    """Minus the mean of the lowest log-probabilities: of the whole part of that share of them, at least one.

    Source: Shi et al. 2024, arXiv 2310.16789. Raises: InvalidValueError for a share outside (0, 1] or without a token.
    """
    if not 0 < share <= 1:
        raise InvalidValueError(f"the share of tokens that Min-K looks at must be in (0, 1]. Got {share}.")
    if not len(log_probs):
        raise InvalidValueError("Min-K needs a token whose probability is known. Got none: pass a longer text.")
    return -float(log_probs.double().sort().values[: max(1, int(share * len(log_probs)))].mean())


def min_k_plus_plus(
    log_probs: Float[Tensor, " token"],
    means: Float[Tensor, " token"],
    variances: Float[Tensor, " token"],
    share: float = SHARE,
) -> float:
    """`min_k` of log-probabilities in standard deviations from their mean under the prediction itself.

    Source: Zhang et al. 2025, arXiv 2404.02936.
    """
    return min_k((log_probs - means).double() / variances.double().clamp_min(LEAST_VARIANCE).sqrt(), share)


def auc(members: Sequence[float], holdout: Sequence[float]) -> Scores:
    """Chance that a text held out scores above a member, ties counting half: 1 tells all apart, 0.5 none.

    `per_example` is for each member the share of held-out texts that score above it. The standard error is DeLong's
    (1988), over both groups; like it, it is 0 where the groups come apart entirely.

    Raises: InvalidValueError if a group is empty.
    """
    if not (members and holdout):
        raise InvalidValueError(
            f"membership needs texts of both groups. Got {len(members)} members and {len(holdout)} held-out texts."
        )
    of_members = torch.tensor(members, dtype=torch.float64)[:, None]
    of_holdout = torch.tensor(holdout, dtype=torch.float64)[None]
    above = (of_holdout > of_members).double() + 0.5 * (of_holdout == of_members).double()
    placements = above.mean(1)
    error = _variance_of_mean(placements) + _variance_of_mean(above.mean(0))
    return Scores(
        value=float(placements.mean()),
        stderr=error**0.5,
        n=len(members),
        better="higher",
        per_example=tuple(placements.tolist()),
        chance=0.5,
    )


def _variance_of_mean(values: Float[Tensor, " text"]) -> float:
    return float(values.var()) / len(values) if len(values) > 1 else 0.0
