"""Processor time of measuring the demo's sets before and after its edit, here and at another commit; equal scores.

    python benchmarks/reading.py
    python benchmarks/reading.py f7482d3 --repeats 5

Both sides measure the same edit, in processes of their own with one thread, in turn; medians are compared. Processor
time, so that other work on the machine counts little. Scores that differ by more than `SAME` of their size fail.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]

SAME = 1e-4
"""Largest difference of equal scores, as a share of the larger: batches add up in another order."""

CHILD = """
import dataclasses, json, sys, time
import torch
torch.set_num_threads(1)
try:
    from lethe.evaluation.measure import measure
    from lethe.runs.model_or_run import Target
except ModuleNotFoundError:
    from lethe.evaluate import measure
    from lethe.target import Target
found, seconds = {}, 0.0
for name in ("builtin", sys.argv[1]):
    target = Target(name, {})
    sets, subject = target.sets(), target.subject
    metrics = [target.metrics(sets)] if hasattr(target, "metrics") else []
    started = time.process_time()
    scores = measure(subject, sets, *metrics)
    seconds += time.process_time() - started
    found[name == "builtin"] = {key: (s.value, s.stderr, s.n, s.per_example, s.by_layer) for key, s in scores.items()}
print(json.dumps({"seconds": seconds, "before": found[True], "after": found[False]}))
"""


def measured(checkout: Path, run: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def numbers(value: Any) -> list[float]:
    return [one for part in value for one in numbers(part)] if isinstance(value, list) else [float(value)]


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int, float]:
    """Numbers that are equal to the bit, all of them, and the largest difference as a share of the larger."""
    equal = count = 0
    worst = 0.0
    for when in ("before", "after"):
        if one[when].keys() != other[when].keys():
            raise SystemExit(f"other scores: {sorted(one[when].keys() ^ other[when].keys())}")
        for name, values in one[when].items():
            for a, b in zip(numbers(values), numbers(other[when][name]), strict=True):
                equal += a == b
                count += 1
                worst = max(worst, abs(a - b) / max(abs(a), abs(b), 1e-3))
    return equal, count, worst


def main() -> None:
    """Print the ratio and what differs, and exit with 1 if a score is not the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="f7482d3")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        old, run = Path(temporary) / "old", Path(temporary) / "run"
        subprocess.run(["git", "worktree", "add", "--detach", old, settings.commit], cwd=HERE, check=True)
        try:
            # By the old code, which both sides can read.
            code = "from lethe.cli import main; (main if callable(main) else main.main)()"
            arguments = ["unlearn", "adaptive-rmu", "--model", "builtin", "--evaluate", "none", "--out", str(run)]
            environment = {**os.environ, "PYTHONPATH": str(old / "src"), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True)
            rounds = [(measured(old, run), measured(HERE, run)) for _ in range(settings.repeats)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=HERE, check=True)
    theirs, ours = (statistics.median(side["seconds"] for side in sides) for sides in zip(*rounds, strict=True))
    equal, count, worst = compare(*rounds[0])
    print(f"{settings.commit}: {theirs:.2f} s, here: {ours:.2f} s, {ours / theirs:.2f} times")
    print(f"{equal} of {count} numbers equal to the bit; largest difference {worst:.1e} of the larger")
    if worst > SAME:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
