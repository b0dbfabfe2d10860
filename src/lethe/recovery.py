"""How much of the accuracy that an edit loses under triggers another edit keeps."""

import torch

from lethe.types import InvalidValueError, Scores

DRAWS = 1000
NOTHING = 1e-9
"""A difference of accuracies below this is rounding."""


def recovery(edited_rna: Scores, edited: Scores, base: Scores, *, seed: int = 0) -> Scores | None:
    """(p_RNA - p_edited) / (p_base - p_edited) for one score on the same questions; 1 is all that was lost.

    The three are, say, `trigger/retain` of the run with RNA, of the same run without, and of the base. The standard
    error is half the width of the middle 68 % of a bootstrap over questions, because a ratio need have no variance;
    draws whose denominator is 0 do not count. None if the edit lost nothing, so that there is nothing to recover.

    Raises: InvalidValueError unless all three hold one value for each of the same number of questions.
    """
    rna, plain, best = (torch.tensor(scores.per_example, dtype=torch.float64) for scores in (edited_rna, edited, base))
    if not len(rna) == len(plain) == len(best) > 0:
        raise InvalidValueError(
            "recovery compares three runs question by question, so each needs a value for each of the same questions. "
            f"Got {len(rna)}, {len(plain)} and {len(best)} values."
        )
    kept, lost = rna - plain, best - plain
    if lost.mean() < NOTHING:
        return None
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(lost), (len(lost),), generator=rng) for _ in range(DRAWS)]
    over = torch.stack([kept[row].mean() for row in rows])
    under = torch.stack([lost[row].mean() for row in rows])
    counted = under.abs() >= NOTHING
    low, high = torch.quantile(over[counted] / under[counted], torch.tensor([0.16, 0.84], dtype=torch.float64))
    return Scores(value=float(kept.mean() / lost.mean()), stderr=float(high - low) / 2, n=len(lost), better="higher")
