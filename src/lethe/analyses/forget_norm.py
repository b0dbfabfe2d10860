"""The norm of forget activations during training at a fixed coefficient, by layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lethe.analyses.protocol import Finding
from lethe.analyses.workbench import Bench, Variant, spread_layers
from lethe.report.standalone_figures import drawing, shades
from lethe.report.style import INK


@dataclass(frozen=True, kw_only=True)
class ForgetNorm:
    """Mean norm of forget tokens at each step of RMU with one c at several layers.

    Over a layer's curve BOS and padding do not count, whatever the run counts in its losses; the norms before and
    after training are given with BOS as well.
    """

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: forget norm during training by layer, c = 6.5"

    multiple: float = 2.0
    """c, in units of the median forget norm at the first of the layers, above it there and not in the last."""
    layers: tuple[int, ...] = ()
    """Layers; by default five, evenly spread from the third to the last."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without a corpus, InvalidLayerError."""
        layers = self.layers or spread_layers(bench.depth, 5)
        (c,) = bench.coefficients((self.multiple,), layers[0])
        rows: list[dict[str, Any]] = []
        for layer in layers:
            edit = bench.train(bench.rmu(c), layer=layer)
            rows.append(
                {
                    "layer": layer,
                    "step": [row.step for row in edit.history],
                    "norm": [row.measures["forget_norm_mean"] for row in edit.history],
                    "before": _norms(bench, bench.base, layer),
                    "after": _norms(bench, edit, layer),
                }
            )
        data = {"c": c, "rows": rows, "counted_in_training": bench.config.batching.count}
        with drawing() as (figure, (axes,)):
            figure.set_size_inches(6.4, 3.8)
            for row, colour in zip(rows, shades(len(rows)), strict=True):
                axes.plot(row["step"], row["norm"], color=colour, label=f"layer {row['layer']}")
            axes.axhline(c, color=INK, lw=1, ls=(0, (2, 2)), label=f"c = {c:g}")
            axes.set(xlabel="training step", ylabel="mean norm of forget tokens")
            axes.set_ylim(bottom=0)
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return Finding(
            name="forget-norm",
            title="Forget norm during training, by layer",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _norms(bench: Bench, edit: Variant, layer: int) -> dict[str, float]:
    """Mean norm of forget tokens at the layer, without and with BOS."""
    without: list[Tensor] = []
    with_bos: list[Tensor] = []
    with bench.applied(edit.weights):
        layers = bench.layers(layer, layer + 1)
        for batch in (batch for part in bench.forget_batches().values() for batch in part):
            norms = layers.record(batch).frozen.norms()
            without.append(norms[batch.mask])
            with_bos.append(norms[batch.attention_mask])
    return {"without_bos": float(torch.cat(without).mean()), "with_bos": float(torch.cat(with_bos).mean())}


def _reading(data: dict[str, Any]) -> str:
    c = data["c"]
    parts = []
    for row in data["rows"]:
        before, after = row["before"]["without_bos"], row["after"]["without_bos"]
        way = abs(before - c)
        side = "below" if before < c else "above"
        moved = 1 - abs(after - c) / way if way > 0 else 1.0
        parts.append(
            f"layer {row['layer']} starts {side} c at {before:.0f} and ends at {after:.0f} "
            f"({'moved ' + format(100 * moved, '.0f') + ' % of the way to c' if moved >= 0.1 else 'no nearer to c'})"
        )
    reached = [row["layer"] for row in data["rows"] if abs(row["after"]["without_bos"] - c) < 0.15 * c]
    verdict = (
        f"The norm ends within 15 % of c at layer{'s' * (len(reached) > 1)} {', '.join(map(str, reached))}"
        if reached
        else "At no layer does the norm end within 15 % of c"
    )
    return f"RMU with c = {c:g} at every layer: {'; '.join(parts)}. {verdict}. BOS and padding are left out; one seed."
