"""Accuracy against the coefficient and against the training step."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lethe.analyses.protocol import Finding, summary
from lethe.analyses.workbench import Bench
from lethe.inference.choices import chance
from lethe.report.standalone_figures import drawing, shades
from lethe.report.style import COLOURS, INK


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Multiple-choice accuracy on forget and retain questions for RMU with several c, on the way and at the end."""

    source: ClassVar[str] = "Dang et al. 2025, arXiv 2408.06223: accuracy against c; c is relative to the forget norm"

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """c, in units of the median norm of forget tokens at the layer."""
    snapshots: int = 4
    """Points on the way, evenly spread over the steps; the last one is the end."""
    seeds: int = 3
    """Runs of each c; the curves over steps are of the first one."""
    questions: int = 100
    """Most questions of each set."""

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError without a corpus or without multiple-choice questions."""
        sets = {name: bench.asked(name, self.questions) for name in ("forget", "retain")}
        steps = bench.solver.steps
        at = sorted({max(1, round(steps * part / self.snapshots)) for part in range(1, self.snapshots + 1)})
        base = {name: bench.hits({}, data) for name, data in sets.items()}
        guess = chance([question for question in sets["forget"].questions if question.choices])
        rows: list[dict[str, Any]] = []
        for seed in range(bench.config.seed, bench.config.seed + self.seeds):
            for c in bench.coefficients(self.multiples):
                first = seed == bench.config.seed
                edit = bench.train(bench.rmu(c), seed=seed, at=at if first else ())
                row: dict[str, Any] = {"c": c, "seed": seed}
                row |= {name: bench.hits(edit.weights, data) for name, data in sets.items()}
                if first:
                    row["by_step"] = [
                        {"step": step}
                        | {name: summary(bench.hits(edit.snapshots[step], data)) for name, data in sets.items()}
                        for step in at
                    ]
                rows.append(row)
        by_c = []
        for c in dict.fromkeys(row["c"] for row in rows):
            mine = [row for row in rows if row["c"] == c]
            # The same questions in each run: a question counts by the share of runs that answer it.
            means = {
                name: summary([sum(h) / len(h) for h in zip(*(row[name] for row in mine), strict=True)])
                for name in sets
            }
            each = {f"{name}_by_seed": [sum(row[name]) / len(row[name]) for row in mine] for name in sets}
            by_c.append({"c": c} | means | each)
        before = {name: summary(hits) for name, hits in base.items()}
        paths = [{"c": row["c"], "path": row["by_step"]} for row in rows if "by_step" in row]
        data = {
            "layer": bench.config.layer, "base": before, "chance": guess, "by_c": by_c, "by_step": paths,
            "seeds": self.seeds, "steps": steps,
        }  # fmt: skip
        with drawing(2, sharey=True) as (figure, (left, right)):
            for name in sets:
                points = [before[name], *(row[name] for row in by_c)]
                left.errorbar(
                    range(len(points)),
                    [p["mean"] for p in points],
                    yerr=[p["stderr"] for p in points],
                    color=COLOURS[name],
                    marker="o",
                    label=name,
                )
            left.set_xticks(range(len(by_c) + 1), ["base", *(f"{row['c']:g}" for row in by_c)])
            left.set(xlabel="coefficient c", ylabel="accuracy", ylim=(0, 1.04), title="at the end")
            for line, colour in zip(paths, shades(len(paths)), strict=True):
                points = [(0, before["forget"]), *((point["step"], point["forget"]) for point in line["path"])]
                right.plot(
                    [step for step, _ in points],
                    [p["mean"] for _, p in points],
                    color=colour,
                    marker="o",
                    label=f"c = {line['c']:g}",
                )
            right.set(xlabel="training step", title="forget questions on the way")
            for axes in (left, right):
                axes.axhline(guess, color=INK, lw=1, ls=(0, (2, 2)), label="chance")
                axes.legend()
        return Finding(
            name="accuracy",
            title="Accuracy against coefficient and step",
            reading=_reading(data),
            data=data,
            figure=figure,
        )


def _reading(data: dict[str, Any]) -> str:
    base, by_c, guess = data["base"], data["by_c"], data["chance"]
    lowest, highest = by_c[0], by_c[-1]
    change = highest["forget"]["mean"] - lowest["forget"]["mean"]
    noise = 2 * (highest["forget"]["stderr"] ** 2 + lowest["forget"]["stderr"] ** 2) ** 0.5
    trend = "does not change beyond noise" if abs(change) <= noise else "falls" if change < 0 else "rises"
    best = min(by_c, key=lambda row: row["forget"]["mean"])
    loss = base["retain"]["mean"] - highest["retain"]["mean"]
    cost = (
        f"costs {100 * loss:.0f} points of retain accuracy"
        if loss > 2 * (highest["retain"]["stderr"] ** 2 + base["retain"]["stderr"] ** 2) ** 0.5
        else "costs no retain accuracy that can be told from noise"
    )
    paths = data["by_step"]
    way = "; ".join(
        f"c = {line['c']:g}: " + ", ".join(f"{100 * p['forget']['mean']:.0f} % at {p['step']}" for p in line["path"])
        for line in (paths[0], paths[-1])
    )
    return (
        f"At layer {data['layer']}, forget accuracy {trend} as c grows: "
        f"{100 * lowest['forget']['mean']:.0f} ± {100 * lowest['forget']['stderr']:.0f} % at c = {lowest['c']:g}, "
        f"{100 * highest['forget']['mean']:.0f} ± {100 * highest['forget']['stderr']:.0f} % at c = {highest['c']:g} "
        f"(base {100 * base['forget']['mean']:.0f} %, chance {100 * guess:.0f} %; lowest at c = {best['c']:g}; "
        f"{data['seeds']} seed{'s' * (data['seeds'] > 1)}). The largest c {cost}. By step, {way}."
    )
