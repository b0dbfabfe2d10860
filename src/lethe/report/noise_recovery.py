"""What RNA's noise wins back: runs with noise beside the same runs without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lethe.errors import InvalidValueError
from lethe.report.record import RunRecord, with_examples
from lethe.report.words import with_error
from lethe.types import Scores

DRAWS = 1000


NOTHING = 1e-9
"""A difference of accuracies below this is rounding."""


def recovery(edited_rna: Scores, edited: Scores, base: Scores, *, seed: int = 0) -> Scores | None:
    """(p_RNA - p_edited) / (p_base - p_edited) for one score on the same questions; 1 is all that was lost.

    The three are, say, `trigger/retain` of the run with RNA, of the same run without, and of the base. The standard
    error is half the width of the middle 68 % of a bootstrap over questions, because a ratio need have no variance;
    draws whose denominator is 0 do not count. None if the edit lost nothing, so that there is nothing to recover.

    Raises: InvalidValueError unless all three hold one value for each of the same number of questions.
    """
    rna, plain, best = (torch.tensor(scores.per_example, dtype=torch.float64) for scores in (edited_rna, edited, base))
    if not len(rna) == len(plain) == len(best) > 0:
        raise InvalidValueError(
            "recovery compares three runs question by question, so each needs a value for each of the same questions. "
            f"Got {len(rna)}, {len(plain)} and {len(best)} values."
        )
    kept, lost = rna - plain, best - plain
    if lost.mean() < NOTHING:
        return None
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(lost), (len(lost),), generator=rng) for _ in range(DRAWS)]
    over = torch.stack([kept[row].mean() for row in rows])
    under = torch.stack([lost[row].mean() for row in rows])
    counted = under.abs() >= NOTHING
    low, high = torch.quantile(over[counted] / under[counted], torch.tensor([0.16, 0.84], dtype=torch.float64))
    return Scores(value=float(kept.mean() / lost.mean()), stderr=float(high - low) / 2, n=len(lost), better="higher")


KEY = "trigger/retain"
"""Retain accuracy with a forget word in the question or among its options."""


def won_back(folders: Sequence[Path], runs: Sequence[RunRecord]) -> list[dict[str, str]]:
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
        noisy, plain = with_examples(run, folder), with_examples(runs[twin], folders[twin])
        scores = [noisy.after[KEY], plain.after[KEY], plain.before[KEY]]
        if len({len(score.per_example) for score in scores}) != 1 or not scores[0].per_example:
            continue
        found = recovery(*scores)
        if found is not None:
            rows.append(
                {
                    "run": run.name,
                    "twin": runs[twin].name,
                    "without": with_error(scores[1]),
                    "with": with_error(scores[0]),
                    "recovery": with_error(found),
                }
            )
    return rows


def _twins(run: RunRecord, other: RunRecord) -> bool:
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
