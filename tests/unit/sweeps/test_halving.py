"""Successive halving: which settings go on, for how many steps, and what is said of those that stop."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lethe import AdaptiveRMU, RunConfig
from lethe.errors import UsageError
from lethe.sweeps import outcomes
from lethe.sweeps.grid import Cell, parse
from lethe.sweeps.halving import Rung, halve, ladder
from lethe.sweeps.page import table, write_page
from lethe.sweeps.spec import Sweep

CONFIG = RunConfig.of(model="builtin", forget=("builtin:exploits",), steps=100)
EMPTY_REPORT = {
    "format": 1, "command": "", "model": "builtin", "method": {"name": "adaptive-rmu", "source": "", "fields": {}},
    "config": {}, "history": [], "environment": {}, "timing": {"train": {"seconds": 0.5, "peak_mb": 1.0}},
    "patch": {"file": "", "sha256": "", "tensors": [], "bytes": 0, "share_of_model": 0.0},
    "samples": [], "warnings": [],
}  # fmt: skip


def spec(out: Path, *words: str, **changes: Any) -> Sweep:
    own = {"config": CONFIG, "halving": True} | changes
    axes = parse(words or ("beta=1,2,3,4,5,6,7,8,9",), AdaptiveRMU(), own["config"])
    return Sweep(method=AdaptiveRMU(), axes=axes, out=out, **own)


def rigged(
    score: Callable[[Cell], tuple[float, float]], heard: list[tuple[str, list[Cell]]], diverging: Sequence[float] = ()
) -> Callable[[Sequence[Cell], str], dict[str, str]]:
    """Writes the reports of runs that were never made."""

    def run(cells: Sequence[Cell], phase: str) -> dict[str, str]:
        heard.append((phase, list(cells)))
        for cell in cells:
            after = dict(zip(("forget", "retain"), score(cell), strict=True))
            row = {"stderr": 0.0, "n": 9, "better": "higher"}
            report = EMPTY_REPORT | {
                "before": {f"multiple_choice/{name}": {"value": 1.0, **row} for name in after},
                "after": {f"multiple_choice/{name}": {"value": value, **row} for name, value in after.items()},
            }
            cell.config.out.mkdir(parents=True, exist_ok=True)
            (cell.config.out / "report.json").write_text(json.dumps(report))
        return {cell.name: "the loss became infinite" for cell in cells if cell.settings["beta"] in diverging}

    return run


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        (4, [(33, 4), (100, 3)]),
        (9, [(33, 9), (100, 3)]),
        (20, [(11, 20), (33, 6), (100, 3)]),
        (40, [(3, 40), (11, 13), (33, 4), (100, 3)]),
    ],
)
def test_a_third_goes_on_for_three_times_the_steps(settings: int, rungs: list[tuple[int, int]], tmp_path: Path) -> None:
    made = spec(tmp_path, f"beta={','.join(map(str, range(settings)))}", seeds=(0, 1))
    assert list(ladder(made)) == [Rung(steps=steps, settings=count) for steps, count in rungs]


def test_the_best_by_the_mean_over_seeds_go_on(tmp_path: Path) -> None:
    def score(cell: Cell) -> tuple[float, float]:
        beta, wild = cell.settings["beta"], 0.05 if cell.config.seed else -0.05
        # From 8 on too little is kept, so 7 is the best.
        return 1 - beta / 10 + wild, 1.0 if beta < 8 else 0.5

    heard: list[tuple[str, list[Cell]]] = []
    made = spec(tmp_path, seeds=(0, 1))
    found, failed = halve(made, rigged(score, heard))
    assert not failed
    assert [phase for phase, _ in heard] == ["rung 1, 33 steps", "cells"]
    assert [{cell.settings["beta"] for cell in cells} for _, cells in heard] == [set(range(1, 10)), {5, 6, 7}]
    assert [{(cell.config.settings()["steps"], cell.config.out.parent) for cell in cells} for _, cells in heard] == [
        {(33, tmp_path / "rungs" / "33")},
        {(100, tmp_path / "cells")},
    ]
    # The last rung's cells are those of the same sweep without halving.
    assert heard[-1][1] == [cell for cell in replace(made, halving=False).cells() if cell.settings["beta"] in (5, 6, 7)]
    assert [(point.settings["beta"], point.stopped) for point in found.ranked()] == [
        (7, None), (6, None), (5, None), (4, 33), (3, 33), (2, 33), (1, 33), (8, 33), (9, 33),
    ]  # fmt: skip
    assert all(point.seeds == (0, 1) for point in found.points)
    assert found.how == "Successive halving: all 9 settings for 33 steps, the best 3 for 100."


def test_equal_settings_at_the_cut_are_told(tmp_path: Path) -> None:
    found, _ = halve(
        spec(tmp_path), rigged(lambda cell: (1.0, 0.5 if cell.config.settings()["steps"] == 100 else 1.0), [])
    )
    assert "After 33 steps settings that went on and others that stopped were equal" in found.how
    assert "if none does (here none does), the one that keeps most" in str(table(found).caption)


def test_the_result_says_where_settings_stopped(tmp_path: Path) -> None:
    made = spec(tmp_path)
    found, _ = halve(made, rigged(lambda cell: (1 - cell.settings["beta"] / 10, 1.0), []))
    shown = table(found)
    kept = list(shown.columns[-1].cells)
    assert kept[:4] == ["100 %", "100 %", "100 %", "100 % (after 33 steps)"]
    assert found.how in str(shown.caption)
    page = write_page(found, tmp_path).read_text()
    assert page.count("after 33 steps") == 6
    assert found.how in page
    assert "stopped earlier" in page
    header, *lines = outcomes.as_csv(found).splitlines()
    assert header.startswith("cell,beta,seed,stopped_at,")
    assert sum(",9.0,0,," in line for line in lines) == 1
    assert sum(",1.0,0,33," in line for line in lines) == 1
    assert outcomes.as_dict(found)["points"][3]["stopped"] == 33
    assert {cell.folder.split("/")[0] for cell in found.cells} == {"cells", "rungs"}


def test_what_diverged_on_a_rung_does_not_go_on(tmp_path: Path) -> None:
    heard: list[tuple[str, list[Cell]]] = []
    _, failed = halve(spec(tmp_path), rigged(lambda cell: (1 - cell.settings["beta"] / 10, 1.0), heard, (9.0, 8.0)))
    assert [cell.settings["beta"] for cell in heard[1][1]] == [5, 6, 7]
    assert failed == {f"beta-{beta}_seed-0 (33 steps)": "the loss became infinite" for beta in (8, 9)}


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        (("beta=1,2,3",), CONFIG, "the grid has no more than 3"),
        (("beta=1,2,3,4", "steps=10,20"), CONFIG, "'steps' cannot stand in the grid"),
        (("beta=1,2,3,4",), CONFIG.changed(solver="ridge"), "--solver ridge takes no steps"),
        (("beta=1,2,3,4", "solver=gradient,ridge"), CONFIG, "--solver ridge takes no steps"),
        (("beta=1,2,3,4",), CONFIG.changed(steps=5), r"has 1 of 5 steps, and needs 2\.\nPass --steps 6 or more"),
        (
            (),
            # The built-in corpus is two topics.
            CONFIG.changed(steps=10, forget=("builtin",)),
            r"9 settings has 3 of 10 steps, and needs 4\.\nPass --steps 12",
        ),
    ],
)
def test_grids_that_halving_can_do_nothing_with_are_refused(
    words: tuple[str, ...], config: RunConfig, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        ladder(spec(tmp_path, *words, config=config))


def test_nothing_measured_is_nothing_to_choose_by(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is measured"):
        spec(tmp_path, config=CONFIG.changed(evaluate="none"))
