"""How well forget activations align with the steering direction, for several coefficients."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench, Variant
from lethe.errors import UsageError
from lethe.model.losses import cosine
from lethe.report.standalone_figures import drawing
from lethe.report.style import COLOURS, INK
from lethe.types import Batch


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Cosine between forget activations at the layer and their topic's direction u, against c.

    By text, of the mean over its tokens (the paper's), and by token, without BOS and padding.
    """

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: histograms of cos(u, h) for several c"

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """c, in units of the median norm of forget tokens at the layer."""
    seeds: int = 3
    """Runs of each c, each with directions of its own."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without a corpus."""
        parts = bench.forget_batches()
        rows: list[dict[str, Any]] = []
        for c in [0.0, *bench.coefficients(self.multiples)]:
            samples: list[float] = []
            tokens: list[Tensor] = []
            for seed in range(bench.config.seed, bench.config.seed + self.seeds):
                # The directions depend on the seed alone, so the base is compared with those of any c.
                edit = bench.train(bench.rmu(c or bench.coefficients(self.multiples[:1])[0]), seed=seed)
                for by_text, by_token in _cosines(bench, edit, parts, edited=c > 0):
                    samples += by_text.tolist()
                    tokens.append(by_token)
            pooled = torch.cat(tokens)
            rows.append(
                {
                    "c": c,
                    "by_text": summary(samples) | {"quantiles": _quantiles(torch.tensor(samples))},
                    "by_token": {"mean": float(pooled.mean()), "n": len(pooled), "quantiles": _quantiles(pooled)},
                }
            )
        data = {"layer": bench.config.layer, "seeds": self.seeds, "rows": rows}
        with drawing(2, sharey=True) as (figure, pair):
            for axes, (name, title) in zip(
                pair, {"by_text": "mean over the tokens of a text", "by_token": "each token"}.items(), strict=True
            ):
                places = range(len(rows))
                low, middle, high = ([row[name]["quantiles"][k] for row in rows] for k in ("5", "50", "95"))
                axes.fill_between(places, low, high, color=COLOURS["forget"], alpha=0.18, lw=0, label="5 to 95 %")
                axes.plot(places, middle, color=COLOURS["forget"], marker="o", label="median")
                axes.plot(places, [row[name]["mean"] for row in rows], color=INK, lw=1, ls=(0, (2, 2)), label="mean")
                axes.set_xticks(places, ["base", *(f"{row['c']:g}" for row in rows[1:])])
                axes.set(xlabel="coefficient c", title=title, ylim=(min(0, *low) - 0.02, 1.02))
            pair[0].set_ylabel("cosine of forget activation and u")
            pair[0].legend(loc="lower right")
        return Finding(
            name="alignment",
            title="Alignment with the steering direction",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _cosines(
    bench: Bench, edit: Variant, parts: dict[str, list[Batch]], *, edited: bool
) -> list[tuple[Float[Tensor, " text"], Float[Tensor, " token"]]]:
    """Per batch: the cosine of each text's mean activation, and of each counted token."""
    found = []
    with bench.applied(edit.weights if edited else {}):
        layers = bench.layers(bench.config.layer, bench.config.layer + 1)
        for topic, batches in parts.items():
            if topic not in edit.directions:
                raise UsageError(f"topic {topic} was never trained on in {bench.solver.steps} steps.\nRaise --steps.")
            for batch in batches:
                h = layers.record(batch).frozen.h.float().cpu()
                mask = batch.mask.cpu()
                u = edit.directions[topic].cpu()
                mean = torch.where(mask[..., None], h, 0).sum(1) / mask.sum(1)[:, None]
                found.append((cosine(mean, u.expand_as(mean)), cosine(h, u.expand_as(h))[mask]))
    return found


def _quantiles(values: Float[Tensor, " n"]) -> dict[str, float]:
    ordered = values.sort().values
    return {str(part): float(ordered[round(part / 100 * (len(ordered) - 1))]) for part in (5, 25, 50, 75, 95)}


def _reading(data: dict[str, Any]) -> str:
    rows = data["rows"]
    means = [row["by_text"]["mean"] for row in rows]
    rising = all(a < b for a, b in pairwise(means))
    trend = "grows with every increase of c" if rising else "does not grow with every increase of c"
    listed = ", ".join(
        f"{row['by_text']['mean']:.2f} ({'base' if row['c'] == 0 else format(row['c'], 'g')})" for row in rows
    )
    last = rows[-1]
    return (
        f"At layer {data['layer']} the cosine between a forget text's mean activation and u {trend}: {listed}. "
        f"Taken token by token it reaches a median of {last['by_token']['quantiles']['50']:.2f} at c = {last['c']:g}, "
        f"with 5 % of tokens below {last['by_token']['quantiles']['5']:.2f}: averaging over a text "
        f"{'hides' if last['by_token']['mean'] < last['by_text']['mean'] else 'does not hide'} tokens that are aligned "
        f"less. Directions and order of {data['seeds']} seed{'s' * (data['seeds'] > 1)}."
    )
