"""Search with Optuna: proposals within ranges, a journal that survives being killed, the sweep's own rule."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_halving import EMPTY_REPORT

from lethe import AdaptiveRMU, Gradient, RunConfig
from lethe.errors import InvalidValueError, RunFolderError, UsageError
from lethe.sweeps.grid import Cell, parse
from lethe.sweeps.optuna_search import JOURNAL, search
from lethe.sweeps.spec import Sweep


def spec(out: Path, *words: str, **changes: Any) -> Sweep:
    own: dict[str, Any] = {"trials": 12, "engine": "optuna", "config": RunConfig.of(model="builtin")} | changes
    words = words or ("beta=1..10", "lr=1e-5..1e-3:log", "layer=3..7", "train_modules=a,b+c")
    axes = parse(words, AdaptiveRMU(), own["config"])
    return Sweep(method=AdaptiveRMU(), axes=axes, out=out, **own)


def scored(cell: Cell) -> tuple[float, float]:
    """A world in which a stronger edit forgets more, and beyond beta 6 too little of the retain set is kept."""
    beta = cell.settings["beta"]
    return 1 - beta / 10, 1.0 if beta <= 6 else 0.5


def rigged(
    score: Callable[[Cell], tuple[float, float]] = scored, *, dies_at: int = -1, calls: list[str] | None = None
) -> Callable[[Sequence[Cell]], dict[str, str]]:
    """Writes the reports of runs that were never made; is interrupted after so many cells."""
    heard = calls if calls is not None else []

    def run(cells: Sequence[Cell]) -> dict[str, str]:
        for cell in cells:
            if len(heard) == dies_at:
                raise KeyboardInterrupt
            heard.append(cell.name)
            row = {"stderr": 0.0, "n": 9, "better": "higher"}
            after = dict(zip(("forget", "retain"), score(cell), strict=True))
            report = EMPTY_REPORT | {
                "before": {f"multiple_choice/{name}": {"value": 1.0, **row} for name in after},
                "after": {f"multiple_choice/{name}": {"value": value, **row} for name, value in after.items()},
            }
            cell.config.out.mkdir(parents=True, exist_ok=True)
            (cell.config.out / "report.json").write_text(json.dumps(report))
        return {}

    return run


def test_proposals_keep_to_their_ranges_and_choices(tmp_path: Path) -> None:
    cells, failed = search(spec(tmp_path, seeds=(0, 1)), rigged())
    assert not failed
    assert len(cells) == 24
    for cell in cells:
        method, config = cell.method, cell.config
        assert 1 <= method.beta <= 10  # type: ignore[attr-defined]
        assert isinstance(config.solver, Gradient)
        assert 1e-5 <= config.solver.lr <= 1e-3
        assert 3 <= config.layer <= 7
        assert config.train_modules in (("a",), ("b", "c"))
        assert float(f"{config.solver.lr:.4g}") == config.solver.lr
    assert len({cell.config.train_modules for cell in cells}) == 2
    assert {cell.config.seed for cell in cells} == {0, 1}


def test_the_best_keeps_enough_and_comes_near_the_edge(tmp_path: Path) -> None:
    made = spec(tmp_path, "beta=1..10", trials=40)
    cells, _ = search(made, rigged())
    kept = [cell.settings["beta"] for cell in cells if scored(cell)[1] == 1]
    assert 5.7 < max(kept) <= 6
    # Later proposals learned where to look: more of them lie below the edge and near it than chance would have.
    late = [cell.settings["beta"] for cell in cells[20:]]
    assert sum(4.5 <= beta <= 7.5 for beta in late) > len(late) / 2


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, _ = search(spec(tmp_path / "whole", seeds=(0, 1)), _made(tmp_path / "whole"))
    made, run = spec(tmp_path / "killed", seeds=(0, 1)), _made(tmp_path / "killed")
    calls: list[str] = []
    passed: list[Cell] = []
    for dies_at in (3, 8, 19):
        with pytest.raises(KeyboardInterrupt):
            search(made, rigged(dies_at=dies_at, calls=calls))
    found, _ = search(made, run, on_done=passed.append)
    assert [cell.settings for cell in found] == [cell.settings for cell in whole]
    assert len(passed) == 2 * 8  # Eight trials were told; of each that was cut off, one cell ran twice.
    assert search(made, lambda cells: pytest.fail("a finished trial ran again"))[0] == found


def _made(out: Path) -> Callable[[Sequence[Cell]], dict[str, str]]:
    out.mkdir()
    return rigged()


def test_more_trials_go_on_with_the_same_search(tmp_path: Path) -> None:
    first, _ = search(spec(tmp_path, trials=4), rigged())
    calls: list[str] = []
    more, _ = search(spec(tmp_path, trials=7), rigged(calls=calls))
    assert more[:4] == first
    assert calls == [cell.name for cell in more[4:]]
    assert search(spec(tmp_path, trials=2), rigged())[0] == more


def test_another_seed_is_another_search(tmp_path: Path) -> None:
    one, other = (
        {cell.settings["beta"] for cell in search(spec(out, seeds=(seed,), trials=3), _made(out))[0]}
        for seed, out in enumerate((tmp_path / "a", tmp_path / "b"))
    )
    assert not one & other


def test_folders_that_were_deleted_are_made_again(tmp_path: Path) -> None:
    made = spec(tmp_path, trials=3)
    first, _ = search(made, rigged())
    shutil.rmtree(first[1].config.out)
    calls: list[str] = []
    assert search(made, rigged(calls=calls))[0] == first
    assert calls == [first[1].name]


def test_what_a_killed_process_left_in_the_journal_is_mended(tmp_path: Path) -> None:
    first, _ = search(spec(tmp_path, trials=3), rigged())
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    journal.with_name(f"{JOURNAL}.lock").symlink_to(JOURNAL)
    assert search(spec(tmp_path, trials=5), rigged())[0][:3] == first


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text("thesis\n{}\n")
    with pytest.raises(RunFolderError, match=r"optuna\.journal cannot be read"):
        search(spec(tmp_path), rigged())


def test_a_diverged_trial_is_told_and_not_run_again(tmp_path: Path) -> None:
    def run(cells: Sequence[Cell]) -> dict[str, str]:
        if cells[0].settings["beta"] > 5:
            return {cells[0].name: "the loss became infinite"}
        return rigged()(cells)

    cells, failed = search(spec(tmp_path), run)
    assert failed
    assert {cell.name for cell in cells if cell.settings["beta"] > 5} == set(failed)
    assert search(spec(tmp_path), lambda cells: pytest.fail("ran again"))[1] == failed


def test_without_optuna_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r'pip install "lethe-unlearn\[search\]"'):
        search(spec(tmp_path), rigged())


@pytest.mark.parametrize(
    ("words", "changes", "kind", "said"),
    [
        (("beta=1..10",), {"engine": "local"}, UsageError, "'beta' is a range.*--engine optuna"),
        (("beta=1..10",), {"engine": "ray"}, UsageError, "'beta' is a range"),
        (("beta=1,10",), {}, UsageError, "no range that Optuna could search"),
        (("beta=1..10",), {"trials": 0}, InvalidValueError, "'trials' must be at least 1. Got 0"),
        (("beta=1..10",), {"workers": 0}, InvalidValueError, "'workers' must be at least 1"),
        (("beta=1..10",), {"halving": True}, UsageError, "not both"),
        (("beta=1..10",), {"calibrate": 0.9}, UsageError, "Leave --calibrate out"),
        (
            ("beta=1..10",),
            {"config": RunConfig.of(model="builtin", evaluate="none")},
            UsageError,
            "nothing is measured",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    words: tuple[str, ...], changes: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=f"(?s){said}"):
        spec(tmp_path, *words, **changes)
