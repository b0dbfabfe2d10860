"""RMU and Adaptive RMU at every layer of the built-in model: settings chosen on dev, scores on test, three seeds.

Every finished cell is a line of OUT/cells.jsonl, and a repeated call goes on after the last one. The table goes to
stdout, the figure to OUT/layers.svg.
"""

import json
import statistics
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe import RMU, AdaptiveRMU, Gradient, LayerSlice, LoadedModel, RunConfig, SteeringMethod
from lethe.inference.reading import Reading
from lethe.metrics.exact_match import ExactMatch
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model, load_tokenizer
from lethe.runs import inputs
from lethe.suites.builtin import Builtin
from lethe.suites.world.exam import questions
from lethe.types import ROLES, EvalSet, HistoryRow

LAYERS = range(2, 12)
CANDIDATES: tuple[SteeringMethod, ...] = (
    *(RMU(steering_coeff=c, alpha=10.0) for c in (80.0, 160.0, 320.0)),
    *(AdaptiveRMU(beta=b, alpha=10.0) for b in (2.0, 3.0, 5.0)),
)
TUNED_AT = 3
RETAIN_FLOOR = 0.97
"""On dev: candidates that keep less than this share of retain accuracy are out; of the rest, least forget wins."""
COLUMNS = ("forget MC", "forget MC cc", "forget EM", "adjacent MC", "adjacent EM", "retain MC", "retain EM")


def label(method: SteeringMethod) -> str:
    return f"RMU c={method.steering_coeff:g}" if isinstance(method, RMU) else f"Adaptive RMU beta={method.beta:g}"


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str) -> dict[str, float]:
    subject = LoadedModel(model=model, tokenizer=tokenizer)
    found = {}
    for name, asked in questions(split).items():
        data = EvalSet(name=name, role=ROLES[name], questions=asked, scoring="cloze")
        for column, metric in (("MC", MultipleChoice()), ("EM", ExactMatch())):
            scores = metric(Reading(subject, data))
            if scores is not None:
                found[f"{name} {column}"] = scores.value
    # Corrected for chance: 0 is guessing, 1 is knowing.
    return found | {"forget MC cc": (found["forget MC"] - 0.25) / 0.75}


def cell(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    method: SteeringMethod,
    layer: int,
    seed: int,
    split: str,
) -> dict[str, float]:
    config = RunConfig.of(model="builtin", seed=seed, **{**Builtin.suits, "layer": layer})
    assert isinstance(config.solver, Gradient)
    corpora = inputs.read(config.data, "texts", "builtin", tokenizer)
    plan = corpora.schedule(config.batching, torch.Generator().manual_seed(seed), steps=config.solver.steps)
    names = [trainable_names(model, trained) for trained in config.trained_layers]
    layers = LayerSlice(model, config.trained_layers[0], layer + 1, sum(names, ()))
    history: list[HistoryRow] = []
    try:
        rng = torch.Generator().manual_seed(seed)
        config.solver.train(layers, method, plan, rng, on_row=history.append)
        last = history[-1].measures
        return measured(model, tokenizer, split) | {"cos": last["cos_direction"], "norm": last["forget_norm_mean"]}
    finally:
        for name, parameter in layers.trained.items():
            parameter.data.copy_(layers.originals[name])


def main(out: Path = Path("runs/layers"), seeds: tuple[int, ...] = (0, 1, 2), threads: int = 2) -> None:
    """Fill the table."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {tuple(row["cell"]): row["scores"] for row in map(json.loads, lines)}
    model = load_model(inputs.model_source("builtin"), dtype=torch.float32)
    tokenizer = load_tokenizer(model.name_or_path)

    def of(method: SteeringMethod | None, layer: int, seed: int, split: str) -> dict[str, float]:
        key = (label(method) if method else "base", layer, seed, split)
        if key not in cells:
            found = cell(model, tokenizer, method, layer, seed, split) if method else measured(model, tokenizer, split)
            cells[key] = found
            with path.open("a") as file:
                file.write(json.dumps({"cell": key, "scores": found}) + "\n")
        return cells[key]

    floor = RETAIN_FLOOR * of(None, 0, 0, "dev")["retain MC"]
    chosen = []
    for kind in (RMU, AdaptiveRMU):
        candidates = [m for m in CANDIDATES if isinstance(m, kind)]
        kept = [m for m in candidates if of(m, TUNED_AT, 0, "dev")["retain MC"] >= floor]
        chosen.append(min(kept or candidates, key=lambda m: of(m, TUNED_AT, 0, "dev")["forget MC"]))
    print(f"chosen on dev at layer {TUNED_AT}, seed 0: {', '.join(map(label, chosen))}\n")
    base = of(None, 0, 0, "test")
    print("| method | layer | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 2))
    print("| untouched | | " + " | ".join(f"{100 * base[c]:.1f}" for c in COLUMNS) + " |")
    curves = {label(m): [[of(m, layer, s, "test") for s in seeds] for layer in LAYERS] for m in chosen}
    for name, rows in curves.items():
        for layer, found in zip(LAYERS, rows, strict=True):
            print(f"| {name} | {layer} | " + " | ".join(spread([100 * f[c] for f in found]) for c in COLUMNS) + " |")
    draw(curves).savefig(out / "layers.svg", metadata={"Date": None})


def spread(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


def draw(curves: dict[str, list[list[dict[str, float]]]]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (name, rows), colour in zip(curves.items(), ("#D55E00", "#0072B2"), strict=True):
        for axis, data in zip(axes, ("forget", "retain"), strict=True):
            for metric, style in (("MC", "-"), ("EM", ":")):
                values = [[100 * f[f"{data} {metric}"] for f in found] for found in rows]
                errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
                means = [statistics.mean(v) for v in values]
                axis.errorbar(LAYERS, means, errors, ls=style, color=colour, label=f"{name}, {metric}", capsize=2)
    for axis, data in zip(axes, ("forget", "retain"), strict=True):
        axis.axhline(25, color="#888888", lw=1, ls="--")
        axis.set(xlabel="layer", title=f"{data} questions", ylim=(-3, 103))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("per cent correct")
    axes[1].legend(frameon=False, fontsize=8, loc="center")
    return figure


if __name__ == "__main__":
    tyro.cli(main)
