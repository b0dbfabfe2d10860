"""What RNA's noise wins back: runs with noise beside the same runs without."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lethe.recovery import recovery
from lethe.report.folder import Run, read_examples
from lethe.report.words import with_error
from lethe.types import Scores

KEY = "trigger/retain"
"""Retain accuracy with a forget word in the question or among its options."""


def won_back(folders: Sequence[Path], runs: Sequence[Run]) -> list[dict[str, str]]:
    """For each run with noise that has a twin without: the trigger accuracies and the recovery, as text.

    Runs without values by question, or whose twin lost nothing under triggers, are left out.

    Raises: RunFolderError if the values by question of a run that is needed are damaged.
    """
    rows = []
    for folder, run in zip(folders, runs, strict=True):
        if not run.method["fields"].get("nu"):
            continue
        twin = next((place for place, other in enumerate(runs) if _twins(run, other)), None)
        if twin is None or KEY not in run.after or KEY not in runs[twin].after:
            continue
        scores = [_by_question(folder, run, "after"), _by_question(folders[twin], runs[twin], "after")]
        scores.append(_by_question(folders[twin], runs[twin], "before"))
        if len({len(score.per_example) for score in scores}) != 1 or not scores[0].per_example:
            continue
        found = recovery(*scores)
        if found is not None:
            rows.append(
                {
                    "run": run.name,
                    "twin": runs[twin].name,
                    "without": with_error(scores[1], share=True),
                    "with": with_error(scores[0], share=True),
                    "recovery": with_error(found, share=False),
                }
            )
    return rows


def _twins(run: Run, other: Run) -> bool:
    """Equal but for the noise."""
    free = {"nu", "noise"}

    def rest(values: dict[str, Any], left_out: set[str]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in left_out}

    return (
        not other.method["fields"].get("nu")
        and (run.model, run.method["name"]) == (other.model, other.method["name"])
        and rest(run.method["fields"], free) == rest(other.method["fields"], free)
        and rest(run.config, {"out"}) == rest(other.config, {"out"})
    )


def _by_question(folder: Path, run: Run, when: str) -> Scores:
    """The run's score with its values by question; none where these are not kept."""
    return replace(getattr(run, when)[KEY], per_example=read_examples(folder)[when].get(KEY, ()))
