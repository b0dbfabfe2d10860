"""What is written down about each training step, and what a history warns of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lethe.model.losses import cosine
from lethe.types import Activation, HistoryRow, Norms

Measures = dict[str, float]


STALLED_AFTER = 50
"""Steps after which a forget norm that has not moved towards its target is worth a warning."""


def measure(
    forget: Activation, retain: Activation, frozen_forget: Activation, frozen_retain: Activation, target: Tensor,
    direction: Tensor | None, *, forget_loss: Tensor, retain_loss: Tensor, gradients: Sequence[Tensor],
) -> Measures:  # fmt: skip
    """All numbers of one step, in one transfer from the device."""
    drift = (retain.h.float() - frozen_retain.h.float()).norm(dim=-1) / frozen_retain.norms()
    named = {
        "forget_loss": forget_loss,
        "retain_loss": retain_loss,
        "gradient": torch.stack([g.norm(dtype=torch.float32) for g in gradients]).norm(),
        "target_norm": _mean(target.float().norm(dim=-1).expand(forget.mask.shape), forget.mask),
        "forget_cos_frozen": _mean(cosine(forget.h, frozen_forget.h), forget.mask),
        "retain_cos_frozen": _mean(cosine(retain.h, frozen_retain.h), retain.mask),
        "retain_error": _mean(drift, retain.mask),
    }
    for side, activation in (("forget", forget), ("retain", retain)):
        norms = activation.norms()
        hidden = norms.masked_fill(~activation.mask, torch.nan)
        named[f"{side}_mean"] = _mean(norms, activation.mask)
        named[f"{side}_median"] = hidden.nanmedian()
        named[f"{side}_max"] = norms.masked_fill(~activation.mask, 0).amax()
    if direction is not None:
        named["cos_direction"] = _mean(cosine(forget.h, direction.expand_as(forget.h)), forget.mask)
    values = torch.stack([value.detach().float() for value in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def row(measures: Measures, *, step: int, topic: str, seconds: float, peak_mb: float) -> HistoryRow:
    """The measures of one step as a line of the history."""

    def norms(side: str) -> Norms:
        return Norms(mean=measures[f"{side}_mean"], median=measures[f"{side}_median"], max=measures[f"{side}_max"])

    return HistoryRow(
        step=step,
        topic=topic,
        forget_loss=measures["forget_loss"],
        retain_loss=measures["retain_loss"],
        forget_norm=norms("forget"),
        retain_norm=norms("retain"),
        target_norm=measures["target_norm"],
        cos_direction=measures.get("cos_direction"),
        forget_cos_frozen=measures["forget_cos_frozen"],
        retain_cos_frozen=measures["retain_cos_frozen"],
        retain_error=measures["retain_error"],
        seconds=seconds,
        peak_mb=peak_mb,
    )


def stalled(rows: Sequence[HistoryRow]) -> tuple[str, ...]:
    """A warning for each topic whose forget norm has not moved towards its target after 50 steps of the run.

    Moved means: a tenth of the way from the first norm to the target, or a cosine to the direction higher by 0.1.
    """
    warnings = []
    for topic in dict.fromkeys(row.topic for row in rows):
        mine = [row for row in rows if row.topic == topic]
        first, last = mine[0], mine[-1]
        if last.step - first.step < STALLED_AFTER - 1:
            continue
        way = abs(first.target_norm - first.forget_norm.mean)
        moved = way - abs(last.target_norm - last.forget_norm.mean)
        turned = (last.cos_direction or 0.0) - (first.cos_direction or 0.0)
        if moved >= 0.1 * way or turned >= 0.1:
            continue
        norms = f"{first.forget_norm.mean:.3g} -> {last.forget_norm.mean:.3g}, target {last.target_norm:.3g}"
        if last.target_norm < first.forget_norm.mean:
            why = "the target is shorter than the activations already are. Raise --steering-coeff (or --beta)"
        else:
            why = "the target is out of reach. Lower --steering-coeff (or --beta), raise --lr, or lower --alpha"
        warnings.append(f"topic {topic}: the forget norm has not moved towards its target ({norms}): {why}.")
    return tuple(warnings)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    # Not a product with the mask: padding may hold NaN, and NaN times 0 is NaN.
    return torch.where(mask, values, 0).sum() / mask.sum()
