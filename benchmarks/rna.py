"""RNA on and off for RMU, Adaptive RMU and RSV on the built-in model: forgetting, retention, triggers; three seeds.

Every finished cell is a line of OUT/cells.jsonl, and a repeated call goes on after the last one. The table goes to
stdout. Accuracies are of the test half of the questions.
"""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro

from lethe import RMU, RSV, AdaptiveRMU, Gradient, LoadedModel, RunConfig, SteeringMethod
from lethe.inference.reading import Reading
from lethe.metrics.exact_match import ExactMatch
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.metrics.protocol import Metric
from lethe.model.swap import restore
from lethe.report.noise_recovery import recovery
from lethe.runs.config_file import method_name
from lethe.runs.workspace import Workspace
from lethe.suites.builtin import Builtin
from lethe.types import Scores

METHODS = (
    RMU(steering_coeff=320.0, alpha=10.0),
    AdaptiveRMU(beta=3.0, alpha=10.0),
    RSV(steering_coeff=480.0, alpha=10.0),
)
"""Strong enough that a forget word in a retain question does harm: at the defaults it hardly does."""
NOISE: tuple[dict[str, Any], ...] = (
    {"nu": 0.0},
    {"nu": 4.0, "noise": "target"},
    {"nu": 16.0, "noise": "target"},
    {"nu": 4.0, "noise": "input"},
)
"""A coordinate of a layer-5 activation has a root mean square of about 11."""
COLUMNS = {
    "forget MC": "multiple_choice/forget",
    "forget EM": "exact_match/forget",
    "retain MC": "multiple_choice/retain",
    "retain EM": "exact_match/retain",
    "trigger": "trigger_question/retain",
    "control": "trigger_question_control/retain",
    "as option": "trigger_option/retain",
    "drop": "trigger_drop/retain",
}


def measured(subject: LoadedModel, sets: dict[str, Any], trigger: Metric) -> dict[str, list[float]]:
    """Values by question of each column."""
    found: dict[str, Scores] = {}
    for name in ("forget", "retain"):
        for metric, score in (("multiple_choice", MultipleChoice()), ("exact_match", ExactMatch())):
            if (scores := score(Reading(subject, sets[name]))) is not None:
                found[f"{metric}/{name}"] = scores
    triggered = trigger(Reading(subject, sets["retain"])) or {}
    found |= {f"trigger{part}/retain": scores for part, scores in triggered.items()}
    return {name: list(scores.per_example) for name, scores in found.items()}


def cell(method: SteeringMethod | None, seed: int) -> dict[str, list[float]]:
    config = RunConfig.of(model="builtin", device="cpu", dtype="float32", seed=seed, **Builtin.suits)
    assert isinstance(config.solver, Gradient)
    workspace = Workspace(config.base)
    model, tokenizer = workspace.model(), workspace.tokenizer
    corpora = workspace.corpora(config.data, "texts")
    found = workspace.sets(config, corpora)
    sets = {data.name: data for data in found}
    trigger = workspace.metrics(config, corpora, found)["trigger"]
    if method is None:
        return measured(LoadedModel(model=model, tokenizer=tokenizer), sets, trigger)
    plan = workspace.schedule(config, corpora, config.solver.steps, config.solver.accumulate)
    layers = workspace.slice(config)
    config.solver.train(layers, method, plan, torch.Generator().manual_seed(seed))
    restore(model, layers.delta())
    return measured(LoadedModel(model=model, tokenizer=tokenizer, originals=layers.originals), sets, trigger)


def main(out: Path = Path("runs/rna"), seeds: tuple[int, ...] = (0, 1, 2), threads: int = 1) -> None:
    """Fill the table."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {row["cell"]: row["scores"] for row in map(json.loads, lines)}

    def of(method: SteeringMethod | None, seed: int) -> dict[str, list[float]]:
        key = f"{method} {seed}"
        if key not in cells:
            cells[key] = cell(method, seed)
            with path.open("a") as file:
                file.write(json.dumps({"cell": key, "scores": cells[key]}) + "\n")
        return cells[key]

    base = of(None, 0)
    print("| method | noise | " + " | ".join(COLUMNS) + " | recovery |\n|" + "---|" * (len(COLUMNS) + 3))
    print(
        "| untouched | | " + " | ".join(f"{100 * statistics.mean(base[key]):.1f}" for key in COLUMNS.values()) + " | |"
    )
    for method in METHODS:
        for noise in NOISE:
            found = [of(replace(method, **noise), seed) for seed in seeds]
            columns = [spread([100 * statistics.mean(row[key]) for row in found]) for key in COLUMNS.values()]
            recovered = "" if noise["nu"] == 0 else spread_of_recovery(method, noise, seeds, base, of)
            said = "none" if noise["nu"] == 0 else f"{noise['noise']}, nu {noise['nu']:g}"
            print(f"| {method_name(method)} | {said} | " + " | ".join(columns) + f" | {recovered} |", flush=True)


def spread_of_recovery(
    method: SteeringMethod, noise: dict[str, Any], seeds: tuple[int, ...], base: Any, of: Any
) -> str:
    """Share of what the trigger cost that the noise wins back, over seeds."""
    key = "trigger_question/retain"
    values = []
    for seed in seeds:
        three = [of(replace(method, **noise), seed), of(replace(method, nu=0.0), seed), base]
        found = recovery(*(as_scores(row[key]) for row in three))
        if found is not None:
            values.append(found.value)
    return spread(values, 2) if values else "not measured"


def as_scores(values: list[float]) -> Scores:
    return Scores(value=statistics.mean(values), stderr=0.0, n=len(values), better="higher", per_example=tuple(values))


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


if __name__ == "__main__":
    tyro.cli(main)
