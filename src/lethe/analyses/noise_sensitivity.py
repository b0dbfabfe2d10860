"""How strongly each layer passes on noise that is put into its input."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench, Variant, walk
from lethe.errors import UsageError
from lethe.report.standalone_figures import drawing, shades
from lethe.types import Batch

Readings = dict[tuple[str, str, float, int], list[float]]


@dataclass(frozen=True, kw_only=True)
class NoiseSensitivity:
    """Phi = ||g(h + xi) - g(h)||^2 / ||g(h)||^2 of layers g, at forget activations h, by layer.

    Two definitions, which the paper's plot leaves open: `each` puts the noise into layer k and reads layer k's output;
    `onward` puts it into the output of one layer (the config's) and reads every later one. Both on real sequences,
    with one xi at each position, and on the single mean vector of the forget set. xi is Gaussian, scaled to r times
    the median norm of forget tokens where it is put in.
    """

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: noise sensitivity by layer; law of the noise ours"

    ratios: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Length r of the noise, as a part of the activation's."""
    texts: int = 16
    """Forget texts of each topic."""
    draws: int = 3
    """Draws of xi."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without a forget corpus, or if the layer is the model's last."""
        fixed = bench.config.layer
        if fixed + 1 >= bench.depth:
            raise UsageError(f"no layer comes after layer {fixed}.\nPass a lower --layer.")
        edits = [bench.base, *([bench.run] if bench.run else [])]
        models: list[dict[str, Any]] = []
        for edit in edits:
            rows = []
            for (kind, on, ratio, layer), values in self._measure(bench, edit, fixed).items():
                rows.append({"kind": kind, "on": on, "r": ratio, "layer": layer} | summary(values))
            models.append({"label": edit.label, "rows": rows})
        data = {"fixed": fixed, "depth": bench.depth, "draws": self.draws, "models": models}
        with drawing(2, 2) as (figure, axes):
            panels = [(kind, on) for on in ("sequences", "mean vector") for kind in ("each", "onward")]
            for panel, (kind, on) in zip(axes, panels, strict=True):
                for model, pale in zip(models, (len(models) > 1, False), strict=False):
                    for ratio, colour in zip(self.ratios, shades(len(self.ratios)), strict=True):
                        rows = [r for r in model["rows"] if (r["kind"], r["on"], r["r"]) == (kind, on, ratio)]
                        panel.errorbar(
                            [row["layer"] for row in rows],
                            [row["mean"] / ratio**2 for row in rows],
                            yerr=[row["stderr"] / ratio**2 for row in rows],
                            color=colour,
                            alpha=0.4 if pale else 1,
                            ls=(0, (4, 1.5)) if pale else "-",
                            marker="" if pale else "o",
                            label=f"r = {ratio:g}" + f", {model['label']}" * (len(models) > 1),
                        )
                where = "each layer's input" if kind == "each" else f"the output of layer {fixed}"
                panel.set(title=f"noise into {where}; {on}", xlabel="layer whose output is read", ylabel="Phi / r²")
                panel.set_ylim(bottom=0)
            axes[0].legend()
        return Finding(
            name="noise-sensitivity",
            title="Noise sensitivity by layer",
            reading=_reading(data, self.ratios),
            data=data,
            figure=figure,
        )

    def _measure(self, bench: Bench, edit: Variant, fixed: int) -> Readings:
        """Phi by definition, what it is read on, r and layer: one value per draw and, on sequences, per text."""
        found: Readings = defaultdict(list)
        norms = bench.norms()
        with bench.applied(edit.weights):
            layers = bench.layers()
            batches = [_first_rows(batch, self.texts) for part in bench.forget_batches().values() for batch in part[:1]]
            sequences = [(recording, walk(layers, recording)) for recording in map(layers.record, batches)]
            # One token: the mean vector has no neighbours to attend to.
            one = Batch(**{name: getattr(batches[0], name)[:1, :1] for name in ("input_ids", "attention_mask", "mask")})
            one = replace(one, mask=torch.ones_like(one.mask))
            means = _means([(recording.batch.mask, outputs) for recording, outputs in sequences])
            on = {"sequences": sequences, "mean vector": [(layers.record(one), means)]}
            for draw in range(self.draws):
                rng = torch.Generator().manual_seed(bench.config.seed + draw)
                units = torch.randn(bench.depth, layers.d_model, generator=rng)
                units = units / units.norm(dim=1, keepdim=True)
                for name, items in on.items():
                    for recording, outputs in items:
                        for k in range(1, bench.depth):
                            stop = bench.depth if k == fixed + 1 else k + 1
                            h = outputs[k - 1]
                            clean = walk(layers, recording, h, k, stop)
                            for ratio in self.ratios:
                                xi = (ratio * norms[k - 1] * units[k - 1]).to(h.device, h.dtype)
                                noisy = walk(layers, recording, h + xi, k, stop)
                                for place, pair in enumerate(zip(noisy, clean, strict=True)):
                                    values = _phi(*pair, recording.batch.mask)
                                    if place == 0:
                                        found["each", name, ratio, k] += values
                                    if k == fixed + 1:
                                        found["onward", name, ratio, k + place] += values
        return found


def _first_rows(batch: Batch, count: int) -> Batch:
    return Batch(
        input_ids=batch.input_ids[:count], attention_mask=batch.attention_mask[:count], mask=batch.mask[:count]
    )


def _means(
    parts: list[tuple[Bool[Tensor, "batch pos"], list[Float[Tensor, "batch pos d_model"]]]],
) -> list[Float[Tensor, "1 1 d_model"]]:
    """The mean counted token at each layer's output."""
    by_layer = [
        torch.cat([h[mask] for mask, outputs in parts for h in outputs[k : k + 1]]) for k in range(len(parts[0][1]))
    ]
    return [tokens.float().mean(0).to(tokens.dtype)[None, None] for tokens in by_layer]


def _phi(
    noisy: Float[Tensor, "batch pos d_model"],
    clean: Float[Tensor, "batch pos d_model"],
    mask: Bool[Tensor, "batch pos"],
) -> list[float]:
    """Phi of each row: the mean over its counted tokens."""
    clean = clean.float()
    ratio = (noisy.float() - clean).square().sum(-1) / clean.square().sum(-1)
    return (torch.where(mask, ratio, 0).sum(1) / mask.sum(1)).tolist()


def _reading(data: dict[str, Any], ratios: tuple[float, ...]) -> str:
    middle = sorted(ratios)[len(ratios) // 2]
    sentences = []
    for model in data["models"]:
        for kind, where in (("each", "each layer's own input"), ("onward", f"the output of layer {data['fixed']}")):
            parts = []
            for on in ("sequences", "mean vector"):
                rows = [row for row in model["rows"] if (row["kind"], row["on"], row["r"]) == (kind, on, middle)]
                parts.append(f"{'on real sequences' if on == 'sequences' else 'on the mean vector'} it {_trend(rows)}")
            sentences.append(f"{model['label']}, noise into {where}: {', '.join(parts)}")
    return (
        f"Phi is the squared relative change of a layer's output, here for noise of {middle:g} times the median norm "
        f"of forget tokens where it goes in ({data['draws']} draws). {'; '.join(sentences)}. On sequences, Phi near "
        f"r² = {middle**2:.2g} means that noise is passed on as it came; the mean vector is shorter than the tokens it "
        "is the mean of, so the same noise weighs more on it. The paper claims that sensitivity falls with depth."
    )


def _trend(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    least = min(rows, key=lambda row: row["mean"])
    noise = 2 * (first["stderr"] ** 2 + last["stderr"] ** 2) ** 0.5
    change = last["mean"] - first["mean"]
    verb = "stays level" if abs(change) <= noise else "falls" if change < 0 else "rises"
    return (
        f"{verb} from {first['mean']:.2g} at layer {first['layer']} to {last['mean']:.2g} at layer {last['layer']} "
        f"(least: {least['mean']:.2g} at layer {least['layer']})"
    )
