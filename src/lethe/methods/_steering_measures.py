"""What is written down about a step of steering, and what a history of such steps warns of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lethe.model.losses import cosine
from lethe.types import Activation, HistoryRow

STALLED_AFTER = 50
"""Steps after which a forget norm that has not moved towards its target is worth a warning."""


@torch.no_grad()
def of_forget(now: Activation, frozen: Activation, target: Tensor, direction: Tensor | None) -> dict[str, Tensor]:
    """Norms of forget tokens, of their target, and cosines to where they were and where they should go."""
    found = {
        **_norms("forget", now),
        "target_norm": _mean(target.float().norm(dim=-1).expand(now.mask.shape), now.mask),
        "forget_cos_frozen": _mean(cosine(now.h, frozen.h), now.mask),
    }
    if direction is not None:
        found["cos_direction"] = _mean(cosine(now.h, direction.expand_as(now.h)), now.mask)
    return found


@torch.no_grad()
def of_retain(now: Activation, frozen: Activation) -> dict[str, Tensor]:
    """Norms of retain tokens, and how far they drifted."""
    drift = (now.h.float() - frozen.h.float()).norm(dim=-1) / frozen.norms()
    return {
        **_norms("retain", now),
        "retain_cos_frozen": _mean(cosine(now.h, frozen.h), now.mask),
        "retain_error": _mean(drift, now.mask),
    }


def stalled(rows: Sequence[HistoryRow]) -> tuple[str, ...]:
    """A warning for each topic whose forget norm has not moved towards its target after 50 steps of the run.

    Moved means: a tenth of the way from the first norm to the target, or a cosine to the direction higher by 0.1.
    """
    warnings = []
    for topic in dict.fromkeys(row.topic for row in rows):
        mine = [row for row in rows if row.topic == topic]
        steps, first, last = mine[-1].step - mine[0].step, mine[0].measures, mine[-1].measures
        if steps < STALLED_AFTER - 1:
            continue
        way = abs(first["target_norm"] - first["forget_norm_mean"])
        moved = way - abs(last["target_norm"] - last["forget_norm_mean"])
        turned = last.get("cos_direction", 0.0) - first.get("cos_direction", 0.0)
        if moved >= 0.1 * way or turned >= 0.1:
            continue
        norms = f"{first['forget_norm_mean']:.3g} -> {last['forget_norm_mean']:.3g}, target {last['target_norm']:.3g}"
        if last["target_norm"] < first["forget_norm_mean"]:
            why = "the target is shorter than the activations already are. Raise --steering-coeff (or --beta)"
        else:
            why = "the target is out of reach. Lower --steering-coeff (or --beta), raise --lr, or lower --alpha"
        warnings.append(f"topic {topic}: the forget norm has not moved towards its target ({norms}): {why}.")
    return tuple(warnings)


def _norms(side: str, activation: Activation) -> dict[str, Tensor]:
    norms = activation.norms()
    hidden = norms.masked_fill(~activation.mask, torch.nan)
    return {
        f"{side}_norm_mean": _mean(norms, activation.mask),
        f"{side}_norm_median": hidden.nanmedian(),
        f"{side}_norm_max": norms.masked_fill(~activation.mask, 0).amax(),
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    # Not a product with the mask: padding may hold NaN, and NaN times 0 is NaN.
    return torch.where(mask, values, 0).sum() / mask.sum()
