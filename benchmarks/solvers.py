"""One matrix in closed form against AdamW, on the built-in model: settings chosen on dev, scores on test, three seeds.

LUNAR by ridge and by the published recipe on pooled rows; RMU and Adaptive RMU by ridge on one matrix against the
gradient on three. Every finished cell is a line of OUT/cells.jsonl, and a repeated call goes on after the last one.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import tyro

from lethe import LUNAR, RMU, AdaptiveRMU, LoadedModel, SteeringMethod, unlearn
from lethe.inference.reading import Reading
from lethe.metrics.exact_match import ExactMatch
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.metrics.refusal import RefusalRate
from lethe.metrics.rouge import Rouge1Recall
from lethe.model.loading import load_model, load_tokenizer
from lethe.runs import inputs
from lethe.runs.config import GRADIENT
from lethe.runs.defaults import defaults
from lethe.suites.world import exam as world
from lethe.suites.world.generator import DECLINES
from lethe.types import ROLES, EvalSet, Question, Scores

METRICS = {"MC": MultipleChoice(), "EM": ExactMatch(), "R1": Rouge1Recall(), "refused": RefusalRate(refusals=DECLINES)}
COLUMNS = ("forget refused", "forget R1", "forget MC", "adjacent R1", "adjacent MC", "retain R1", "retain MC", "DS")
RETAIN_FLOOR = 0.97
"""On dev: candidates that keep less than this share of retain accuracy are out; of the rest, least forget wins."""

THREE = ((5, 8, 9), (6, 7, 8))
"""The three best of `lethe layers builtin --top 3`, and three neighbours."""
ONE = {"solver": "ridge", "lam": 1e-2}
ROWS: dict[str, list[tuple[SteeringMethod, dict[str, Any]]]] = {
    "LUNAR, ridge, three layers": [
        (LUNAR(steering_coeff=c, alpha=30.0), {**ONE, "layer": max(layers), "train_layers": layers})
        for layers in THREE
        for c in (2.0, 2.5)
    ],
    "LUNAR, ridge, layer 8": [
        (LUNAR(steering_coeff=c, alpha=a), {**ONE, "layer": 8}) for c in (2.0, 2.5) for a in (6.0, 10.0, 20.0)
    ],
    "LUNAR, published AdamW, three layers": [
        (LUNAR(steering_coeff=c), {"solver": "pooled", "layer": max(layers), "train_layers": layers})
        for layers in THREE
        for c in (2.0, 2.5)
    ],
    "LUNAR, published AdamW, layer 8": [
        (LUNAR(steering_coeff=c), {"solver": "pooled", "layer": 8}) for c in (2.0, 2.5)
    ],
    "RMU, gradient, 3 matrices": [(RMU(steering_coeff=c, alpha=10.0), {}) for c in (160.0, 320.0)],
    "RMU, ridge, 1 matrix": [
        (RMU(steering_coeff=c, alpha=a), ONE) for c in (160.0, 320.0, 640.0) for a in (0.3, 1.0, 3.0)
    ],
    "Adaptive RMU, gradient, 3 matrices": [(AdaptiveRMU(beta=b, alpha=10.0), {}) for b in (2.0, 3.0)],
    "Adaptive RMU, ridge, 1 matrix": [
        (AdaptiveRMU(beta=b, alpha=a), ONE) for b in (2.0, 3.0, 6.0) for a in (0.3, 1.0, 3.0)
    ],
}
"""Candidates of each row; which stands in the table is chosen on dev with seed 0."""


def sets(split: Any) -> list[EvalSet]:
    asked: Mapping[Any, tuple[Question, ...]] = world.questions(split)
    names = ("forget", "adjacent", "retain")
    return [EvalSet(name=name, role=ROLES[name], questions=asked[name], scoring="cloze") for name in names]


def cell(method: SteeringMethod | None, changes: dict[str, Any], seed: int, split: str) -> dict[str, float]:
    model = load_model(inputs.model_source("builtin"), dtype=torch.float32)
    seconds, originals = 0.0, {}
    if method is not None:
        with tempfile.TemporaryDirectory() as folder:
            _, start = defaults(type(method), "builtin", solver=changes.get("solver", GRADIENT))
            config = start.changed(**{**changes, "seed": seed, "evaluate": "none", "out": Path(folder) / "run"})
            started = time.perf_counter()
            result = unlearn(method, config)
            seconds = time.perf_counter() - started
        originals = result.patch.apply_in_memory(model)
    subject = LoadedModel(model=model, tokenizer=load_tokenizer(model.name_or_path), originals=originals)
    found: dict[str, float] = {"seconds": seconds}
    for data in sets(split):
        for name, metric in METRICS.items():
            scores = metric(Reading(subject, data))
            if isinstance(scores, Scores):
                found[f"{data.name} {name}"] = scores.value
    return found | {"DS": math.hypot(found["forget R1"], 1 - found["retain R1"])}


def main(out: Path = Path("runs/solvers"), seeds: tuple[int, ...] = (0, 1, 2), threads: int = 1) -> None:
    """Fill the table."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "cells.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    cells = {row["cell"]: row["scores"] for row in map(json.loads, lines)}

    def of(method: SteeringMethod | None, changes: dict[str, Any], seed: int, split: str) -> dict[str, float]:
        key = f"{method} {changes} {seed} {split}"
        if key not in cells:
            cells[key] = cell(method, changes, seed, split)
            with path.open("a") as file:
                file.write(json.dumps({"cell": key, "scores": cells[key]}) + "\n")
        return cells[key]

    base = of(None, {}, 0, "test")
    print("| method and solver | chosen on dev | " + " | ".join(COLUMNS) + " | seconds |")
    print("|" + "---|" * (len(COLUMNS) + 3))
    print("| untouched | | " + " | ".join(f"{100 * base[c]:.1f}" for c in COLUMNS) + " | |")
    for name, candidates in ROWS.items():
        method, changes = choose(candidates, of, base)
        found = [of(method, changes, seed, "test") for seed in seeds]
        columns = " | ".join(spread([100 * row[c] for row in found]) for c in COLUMNS)
        coefficient = getattr(method, method.coefficient)
        where = "".join(
            f", layers {' '.join(map(str, changes['train_layers']))}" for _ in changes.get("train_layers", ())[:1]
        )
        chosen = f"c {coefficient:g}{where}" + (
            "" if changes.get("solver") == "pooled" else f", alpha {method.alpha:g}"
        )
        print(f"| {name} | {chosen} | {columns} | {spread([row['seconds'] for row in found])} |", flush=True)


def choose(candidates: list[tuple[SteeringMethod, dict[str, Any]]], of: Any, base: dict[str, float]) -> Any:
    """The candidate that leaves least forget ROUGE (LUNAR) or accuracy on dev, of those that keep retain."""
    if len(candidates) == 1:
        return candidates[0]
    goal, kept = ("forget R1", "retain R1") if isinstance(candidates[0][0], LUNAR) else ("forget MC", "retain MC")
    on_dev = [(of(method, changes, 0, "dev"), (method, changes)) for method, changes in candidates]
    enough = [pair for pair in on_dev if pair[0][kept] >= RETAIN_FLOOR * base[kept]]
    return min(enough or on_dev, key=lambda pair: pair[0][goal])[1]


def spread(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {error:.1f}"


if __name__ == "__main__":
    tyro.cli(main)
