"""Accuracy against the layer, for RMU with a fixed coefficient and for Adaptive RMU."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench, spread_layers
from lethe.inference.choices import chance
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.report.standalone_figures import drawing
from lethe.report.style import COLOURS, INK


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Multiple-choice accuracy on forget and retain questions after RMU and Adaptive RMU at several layers."""

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: accuracy against layer, RMU with c = 6.5, Adaptive RMU"

    multiple: float = 2.0
    """c of RMU, in units of the median forget norm at the first of the layers: it is chosen to suit that one."""
    layers: tuple[int, ...] = ()
    """Layers; by default five, evenly spread from the third to the last."""
    seeds: int = 1
    """Runs of each method at each layer."""
    questions: int = 150
    """Most questions of each set."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without a corpus or without multiple-choice questions, InvalidLayerError."""
        sets = {name: bench.asked(name, self.questions) for name in ("forget", "retain")}
        layers = self.layers or spread_layers(bench.depth, 5)
        (c,) = bench.coefficients((self.multiple,), layers[0])
        methods = {"RMU": bench.rmu(c), "Adaptive RMU": bench.method(AdaptiveRMU, {})}
        hits: dict[tuple[str, int], list[dict[str, list[float]]]] = {}
        for layer in layers:
            for seed in range(bench.config.seed, bench.config.seed + self.seeds):
                for name, method in methods.items():
                    edit = bench.train(method, layer=layer, seed=seed)
                    hits.setdefault((name, layer), []).append(
                        {part: bench.hits(edit.weights, asked) for part, asked in sets.items()}
                    )
        base = {name: summary(bench.hits({}, asked)) for name, asked in sets.items()}
        norms = bench.norms()
        rows: list[dict[str, Any]] = []
        for (name, layer), runs in hits.items():
            row: dict[str, Any] = {"method": name, "layer": layer, "norm": norms[layer]}
            for part in sets:
                # A question counts by the share of runs that answer it.
                row[part] = summary([sum(h) / len(h) for h in zip(*(run[part] for run in runs), strict=True)])
                row[f"{part}_by_seed"] = [sum(run[part]) / len(run[part]) for run in runs]
            rows.append(row)
        guess = chance([question for question in sets["forget"].questions if question.choices])
        adaptive = methods["Adaptive RMU"]
        data = {"c": c, "beta": adaptive.beta, "base": base, "chance": guess, "seeds": self.seeds, "rows": rows}
        with drawing(2, sharey=True) as (figure, pair):
            for axes, name in zip(pair, methods, strict=True):
                mine = [row for row in rows if row["method"] == name]
                for part in sets:
                    axes.errorbar(
                        [row["layer"] for row in mine],
                        [row[part]["mean"] for row in mine],
                        yerr=[row[part]["stderr"] for row in mine],
                        color=COLOURS[part],
                        marker="o",
                        label=part,
                    )
                axes.axhline(guess, color=INK, lw=1, ls=(0, (2, 2)), label="chance")
                setting = f"c = {c:g} at every layer" if name == "RMU" else f"beta = {adaptive.beta:g}"
                axes.set(xlabel="layer", title=f"{name}, {setting}", ylim=(0, 1.04))
                axes.set_xticks(layers)
            pair[0].set_ylabel("accuracy")
            pair[1].legend(loc="center right")
        return Finding(
            name="layers",
            title="Accuracy against layer",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _reading(data: dict[str, Any]) -> str:
    sentences = []
    for name in ("RMU", "Adaptive RMU"):
        rows = [row for row in data["rows"] if row["method"] == name]
        forgot = [row["layer"] for row in rows if row["forget"]["mean"] - data["chance"] <= 3 * row["forget"]["stderr"]]
        listed = ", ".join(
            f"{100 * row['forget']['mean']:.0f} ± {100 * row['forget']['stderr']:.0f} % at {row['layer']}"
            for row in rows
        )
        kept = min(row["retain"]["mean"] for row in rows)
        where = f"layers {', '.join(map(str, forgot))}" if forgot else "no layer"
        setting = f"c = {data['c']:g}" if name == "RMU" else f"beta = {data['beta']:g}"
        sentences.append(
            f"{name} with {setting} brings forget accuracy within three standard errors of chance at {where}: "
            f"{listed}; "
            f"retain accuracy is at least {100 * kept:.0f} %"
        )
    rmu, adaptive = (
        [row["forget"]["mean"] for row in data["rows"] if row["method"] == name] for name in ("RMU", "Adaptive RMU")
    )
    late = rmu[-1] - adaptive[-1]
    claim = (
        "As claimed, fixed c fails in the last layer where Adaptive RMU does not"
        if late > 0.15 and rmu[-1] > rmu[0] + 0.15
        else "The claim that fixed c fails in later layers where Adaptive RMU works does not show here"
    )
    return (
        f"{'. '.join(sentences)}. {claim} (base {100 * data['base']['forget']['mean']:.0f} %, chance "
        f"{100 * data['chance']:.0f} %, {data['seeds']} seed{'s' * (data['seeds'] > 1)})."
    )
