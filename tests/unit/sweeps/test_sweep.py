"""Sweeps: cells equal runs made alone, survive being killed, and share what they say they share."""

import csv
import fcntl
import html
import json
import math
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_halving import EMPTY_REPORT

from lethe import RMU, AdaptiveRMU, Batch, LayerSlice, RunConfig, SteeringMethod, unlearn
from lethe.cli import main
from lethe.errors import InvalidLayerError, InvalidValueError, RunFolderError, UsageError
from lethe.inference.log_probs import measuring
from lethe.model.hidden_cache import HiddenCache
from lethe.model.layers import trainable_names
from lethe.model.patch import Patch
from lethe.model.recordings import Recordings, Store
from lethe.solvers import ridge
from lethe.sweeps import outcomes
from lethe.sweeps import sweep as sweeps
from lethe.sweeps.cells import Sharable, describe, run_group
from lethe.sweeps.grid import parse
from lethe.sweeps.outcomes import CellOutcome, Outcomes, Point, Score
from lethe.sweeps.page import table, write_page
from lethe.sweeps.spec import Sweep, about
from lethe.sweeps.sweep import sweep
from lethe.sweeps.sweep_folder import locked
from lethe.system.progress import Progress

METHOD = AdaptiveRMU(beta=2.0, alpha=1.0)
# Each process is a fork of one that has done the slow imports.
CONTEXT = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = [
    "pytest",
    "lethe.cli.main",
    "lethe.sweeps.sweep",
    "lethe.sweeps.page",
    "transformers.models.llama.modeling_llama",
]


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lethe.evaluation.eval_sets.TEXTS", 2)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    """A tiny model of four layers with corpora and questions."""
    root = tmp_path_factory.mktemp("place")
    shutil.copytree(foreign_model, root / "tiny")
    rows = ({"text": f"The red stone number {i} burns in water."} for i in range(24))
    (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "retain.txt").write_text("\n\n".join(f"A calm river of {i} boats." for i in range(24)))
    for name in ("forget", "retain"):
        asked = [{"question": f"Which {name} {i}?", "choices": ["red", "blue"], "answer": "red"} for i in range(6)]
        (root / f"{name}-questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return root


def settings(place: Path, out: Path, **changes: Any) -> RunConfig:
    config: dict[str, Any] = {
        "model": str(place / "tiny"),
        "forget": (str(place / "forget.jsonl"),),
        "retain": str(place / "retain.txt"),
        "forget_questions": place / "forget-questions.jsonl",
        "retain_questions": place / "retain-questions.jsonl",
        "layer": 2,
        "batch_size": 2,
        "max_length": (16,),
        "threads": 1,
        "out": out,
    }
    if changes.get("solver", "gradient") == "gradient":
        config |= {"steps": 4, "lr": 1e-2}
    return RunConfig.of(**config | changes)


def spec(place: Path, out: Path, *words: str, method: SteeringMethod = METHOD, **changes: Any) -> Sweep:
    own = {name: changes.pop(name) for name in list(changes) if name in Sweep.__dataclass_fields__}
    words = words or ("layer=1,3", "beta=2,5")
    config = settings(place, out, **changes)
    return Sweep(method=method, config=config, axes=parse(words, method, config), out=out, **own)


def same_run(a: Path, b: Path) -> None:
    for name in ("patch.safetensors", "per_example.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    mine, other = (json.loads((folder / "report.json").read_text()) for folder in (a, b))
    for part in ("before", "after", "patch", "warnings"):
        assert mine[part] == other[part]
    losses = [[(row["step"], row["forget_loss"], row["retain_loss"]) for row in x["history"]] for x in (mine, other)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def swept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Outcomes, list[Sharable]]:
    """Two layers, two coefficients, two seeds."""
    plans: list[Sharable] = []
    made = spec(place, tmp_path_factory.mktemp("sweeps") / "whole", seeds=(0, 1))
    return made, sweep(made, on_plan=plans.append), plans


@pytest.mark.parametrize("cell", [0, 3, 6], ids=["first", "last of a seed", "second seed"])
def test_a_cell_equals_the_same_run_made_alone(
    swept: tuple[Sweep, Outcomes, list[Sharable]], cell: int, tmp_path: Path
) -> None:
    made = swept[0].cells()[cell]
    alone = tmp_path / made.name
    unlearn(made.method, made.config.changed(out=alone))
    same_run(alone, made.config.out)


@pytest.mark.parametrize(
    ("method", "words", "changes"),
    [
        (RMU(steering_coeff=2.0), ("steering_coeff=2,8", "lam=0.1,none"), {"solver": "ridge", "evaluate": "none"}),
        (AdaptiveRMU(beta=2.0, norm="running", nu=0.1), ("layer=2,3", "beta=2,5"), {"cache": "disk", "disk_gb": 0.3}),
        (METHOD, ("layer=2,3", "train_layers=1,1+2"), {"cache": "none", "evaluate": "none"}),
    ],
    ids=["ridge", "disk", "none"],
)
def test_every_way_to_share_changes_nothing(
    method: SteeringMethod, words: tuple[str, ...], changes: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    made = spec(place, tmp_path / "sweep", *words, method=method, **changes)
    sweep(made)
    for cell in (made.cells()[0], made.cells()[-1]):
        unlearn(cell.method, cell.config.changed(out=tmp_path / cell.name))
        same_run(tmp_path / cell.name, cell.config.out)
    assert not (tmp_path / "sweep" / "cache").exists()


def test_cells_of_all_layers_share_one_pass(swept: tuple[Sweep, Outcomes, list[Sharable]]) -> None:
    _, found, (plan,) = swept
    assert (plan.cells, plan.done, plan.slices, plan.place, plan.together) == (8, 0, 2, "ram", True)
    # Four forget and four retain batches of each seed, whatever the number of layers and coefficients.
    assert found.passes == 2 * (4 + 4)
    assert found.served > 0


def test_ridge_cells_share_their_sums(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ridge._sums
    monkeypatch.setattr("lethe.solvers.ridge._sums", lambda *args, **more: calls.append(1) or original(*args, **more))
    method = RMU(steering_coeff=2.0)
    words = ("layer=1,2", "steering_coeff=2,8", "lam=0.1,1")
    sweep(spec(place, tmp_path / "s", *words, method=method, solver="ridge", evaluate="none"))
    assert len(calls) == 2  # One for each layer, for eight cells.


def test_the_folder_tells_what_was_found(swept: tuple[Sweep, Outcomes, list[Sharable]]) -> None:
    made, found, _ = swept
    written = json.loads((made.out / "sweep.json").read_text())
    assert written["chosen"] == found.ranked()[0].settings
    assert len(written["cells"]) == 8
    assert "97 %" in written["rule"]
    rows = list(csv.DictReader((made.out / "sweep.csv").read_text().splitlines()))
    assert [row["cell"] for row in rows] == [cell.name for cell in found.cells]
    for cell in found.cells:
        report = json.loads((made.out / cell.folder / "report.json").read_text())
        assert report["after"]["multiple_choice/forget"]["value"] == cell.after["forget"].value
    # Time is that of the runs, not of a call that found them complete.
    page = write_page(replace(found, seconds=0.0), made.out).read_text()
    assert f" {sum(cell.seconds for cell in found.cells):,.0f} s " in page
    assert found.rule in html.unescape(page)
    assert page.count("<svg") >= 2
    assert not re.search(r'(src|href)="(http|//)', page)
    assert {file.name for file in made.out.glob("*.svg")} == {"pareto.svg", "heatmap.svg"}
    assert len(table(found).rows) == 5  # Four settings and the untouched model.


def test_the_same_call_does_nothing_again(
    swept: tuple[Sweep, Outcomes, list[Sharable]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found, _ = swept
    monkeypatch.setattr("lethe.runs.unlearn.unlearn", lambda *_, **__: pytest.fail("a complete cell ran again"))
    assert sweep(made).points == found.points


# Choice


def outcome(*rows: tuple[float, float], floor: float = 0.97, metric: str = "multiple_choice") -> Outcomes:
    points = tuple(
        Point(
            settings={"beta": number},
            after={"forget": Score(value=f, stderr=0.0, n=1), "retain": Score(value=r, stderr=0.0, n=1)},
            kept=r / 0.8,
            seeds=(0,),
        )
        for number, (f, r) in enumerate(rows)
    )
    base = {name: Score(value=0.8, stderr=0.0, n=1) for name in ("forget", "retain")}
    return Outcomes(
        model="m", method="rmu", axes={"beta": tuple(range(len(rows)))}, metric=metric, base=base, chance=None,
        cells=(), points=points, floor=floor,
    )  # fmt: skip


def test_the_least_forget_among_those_that_keep_enough_is_chosen() -> None:
    assert [p.settings["beta"] for p in outcome((0.5, 0.8), (0.3, 0.79), (0.1, 0.5)).ranked()] == [1, 0, 2]
    assert outcome((0.5, 0.6), (0.3, 0.7)).ranked()[0].settings == {"beta": 1}
    assert outcome((0.5, 0.8), (0.3, 0.7), floor=0.8).ranked()[0].settings == {"beta": 1}
    assert outcome((50.0, 0.8), (30.0, 0.8), metric="perplexity").ranked()[0].settings == {"beta": 0}


def test_what_is_no_number_or_lost_a_seed_comes_last() -> None:
    found = outcome((math.nan, 0.8), (0.5, 0.8), (0.1, math.nan), (0.6, 0.8))
    assert [p.settings["beta"] for p in found.ranked()][:2] == [1, 3]
    assert found.merit(found.points[0]) == found.merit(found.points[2]) == math.inf
    assert "diverged" not in found.rule
    longer = replace(found, points=tuple(replace(p, seeds=(0, 1)[p.settings["beta"] == 1 :]) for p in found.points))
    assert longer.ranked()[0].settings["beta"] == 3
    assert longer.ranked()[-1].settings["beta"] == 1
    assert longer.rule.endswith("settings that diverged with a seed come after those that did not")


def test_a_cell_is_compared_with_its_own_base_and_means_need_numbers(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path, "batch_size=1,2", "lr=1e-3,1e-2", seeds=(0, 1))
    for cell in made.cells():
        before = 10.0 if cell.config.batching.batch_size == 1 else 40.0
        after = math.nan if cell.config.settings()["lr"] == 1e-2 and cell.config.seed else 20.0
        row = {"stderr": 0.1, "n": 9, "better": "lower"}
        scores = {
            when: {f"perplexity/{name}": {"value": value, **row} for name in ("forget", "retain")}
            for when, value in (("before", before), ("after", after))
        }
        cell.config.out.mkdir(parents=True)
        (cell.config.out / "report.json").write_text(json.dumps(EMPTY_REPORT | scores))
    found = outcomes.read(METHOD, made.cells(), floor=0.9, out=tmp_path)
    kept = {(p.settings["batch_size"], p.settings["lr"]): p.kept for p in found.points}
    assert (kept[1, 1e-3], kept[2, 1e-3]) == (0.5, 2.0)
    assert math.isnan(kept[1, 1e-2])
    assert found.ranked()[0].settings == {"batch_size": 2, "lr": 1e-3}
    assert "nan" in outcomes.as_csv(found)


def test_calibration_ranks_by_the_mixed_edit() -> None:
    found = outcome((0.5, 0.8), (0.1, 0.5))
    cells = tuple(
        CellOutcome(name=str(n), folder="", settings=p.settings, seed=0, after=p.after, seconds=0.0)
        for n, p in enumerate(found.points)
    )
    mixed = {"0": {"forget": 0.4, "forget_stderr": 0.0}, "1": {"forget": 0.2, "forget_stderr": 0.0}}
    ranked = outcomes.calibrated(Outcomes(**{**vars(found), "cells": cells}), mixed, 0.95)
    assert ranked.ranked()[0].settings == {"beta": 1}
    assert "95 %" in ranked.rule


def test_finalists_are_measured_on_all_questions_and_mixtures_keep_enough(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", proxy=2, finalists=1, calibrate=0.9)
    found = sweep(made)
    assert [point.is_final for point in found.ranked()] == [True, False, False, False]
    (final,) = (made.out / "finals").iterdir()
    for folder, count in ((final, 6), (made.out / "cells" / final.name, 2)):
        assert json.loads((folder / "report.json").read_text())["after"]["multiple_choice/retain"]["n"] == count
    # A mixture of a cell whose patch is gone cannot be found.
    (final / "patch.safetensors").rename(tmp_path / "patch")
    (made.out / "calibrated.json").unlink()
    with pytest.raises(RunFolderError, match=r"has lost its patch\.\nDelete that folder"):
        sweep(made)
    for cell in found.cells:
        assert cell.mixed is not None
        report = json.loads((made.out / cell.folder / "report.json").read_text())
        assert cell.mixed["retain"] >= 0.9 * report["before"]["multiple_choice/retain"]["value"]


def test_a_cell_that_diverged_leaves_nothing_to_the_next(place: Path, tmp_path: Path) -> None:
    found = sweep(spec(place, tmp_path / "s", "lr=1e30,1e-2", layer=1, evaluate="none"))
    assert set(found.failed) == {"lr-1e+30_seed-0"}
    (cell,) = (cell for cell in spec(place, tmp_path / "s", "lr=1e-2", layer=1, evaluate="none").cells())
    unlearn(cell.method, cell.config.changed(out=tmp_path / "alone"))
    same_run(tmp_path / "alone", cell.config.out)


# Interruptions


def twelve_cells(place: Path, out: Path, begins: Any = None) -> None:
    torch.set_num_threads(1)
    if begins is not None:
        begins.set()
    with pytest.MonkeyPatch.context() as patched:
        # Most of such a short run would be the drawing of its page.
        patched.setattr("lethe.report.pages.write_report", lambda *_: None)
        sweep(spec(place, out, "layer=1,2,3", "beta=2,3,5,8", steps=3, evaluate="none"))


def swept_until(place: Path, out: Path, more: int, seconds: float) -> tuple[int | None, float]:
    """Sweep in a process of its own, killed so many seconds after so many more cells; its exit code and seconds."""
    begins = CONTEXT.Event()
    process = CONTEXT.Process(target=twelve_cells, args=(place, out, begins))
    process.start()
    assert begins.wait(300)
    began, wanted = time.perf_counter(), len(finished(out)) + more
    while process.is_alive() and len(finished(out)) < wanted:
        time.sleep(0.005)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode, time.perf_counter() - began


def finished(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.glob("cells/*/report.json")}


def test_ten_kills_at_random_moments_lose_no_finished_cell(place: Path, tmp_path: Path) -> None:
    CONTEXT.set_forkserver_preload(SLOW_IMPORTS)
    out, rng = tmp_path / "killed", random.Random(0)
    code, whole = swept_until(place, tmp_path / "whole", 12, 300)
    assert code == 0
    done: dict[str, bytes] = {}
    amid = kills = 0
    while kills < 10:
        # Before the first cell, between cells and within one, however busy the machine is.
        code, _ = swept_until(place, out, (0, 1, 2)[kills % 3], rng.uniform(0, 0.2) * whole)
        assert code in (0, -signal.SIGKILL)
        now = finished(out)
        assert done.items() <= now.items()
        if code == 0:
            # It ended first: nothing was left to kill.
            shutil.rmtree(out)
            now = {}
        else:
            kills += 1
            amid += len(now) > len(done)
        done = now
    assert amid >= 2  # Kills between cells, not only before the first of them.
    twelve_cells(place, out)
    assert len(finished(out)) == 12
    assert done.items() <= finished(out).items()
    for whole_cell in (tmp_path / "whole" / "cells").iterdir():
        killed = out / "cells" / whole_cell.name
        assert (killed / "patch.safetensors").read_bytes() == (whole_cell / "patch.safetensors").read_bytes()
        # A cell killed right after its report was complete keeps its lock file, which locks nothing.
        assert {file.name for file in killed.iterdir()} - {"lock"} == {file.name for file in whole_cell.iterdir()}
    assert not (out / "cache").exists()


def test_the_checkpoint_of_a_cell_killed_at_its_end_goes(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", "beta=2", layer=1, evaluate="none")
    sweep(made)
    left = made.cells()[0].config.out / "checkpoint.safetensors"
    left.touch()
    sweep(made)
    assert not left.exists()


class Interrupting(Progress):
    def advance(self, note: str = "") -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_whole_cells(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", evaluate="none", cache="disk", disk_gb=0.3)
    with pytest.raises(KeyboardInterrupt):
        sweep(made, progress=Interrupting())
    assert len(finished(made.out)) == 1
    assert not (made.out / "cache").exists()
    plans: list[Sharable] = []
    sweep(made, on_plan=plans.append)
    assert (plans[0].done, len(finished(made.out))) == (1, 4)


# Halving and search


def test_halving_trains_the_best_to_the_end(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", "beta=2,3,5,8", halving=True, steps=6, limit=2)
    plans: list[Sharable] = []
    found = sweep(made, on_plan=plans.append)
    assert plans[0].cells == 4 + 3
    assert [(point.stopped, len(point.seeds)) for point in found.ranked()] == [(None, 1)] * 3 + [(2, 1)]
    full = [folder for folder in (made.out / "cells").iterdir() if folder.is_dir()]
    assert len(full) == 3
    short = [folder for folder in (made.out / "rungs" / "2").iterdir() if folder.is_dir()]
    assert len(short) == 4
    for folder, steps in (*((folder, 6) for folder in full), *((folder, 2) for folder in short)):
        assert len(json.loads((folder / "report.json").read_text())["history"]) == steps
    # A run that went to the end is the one that is made without halving.
    whole = full[0]
    alone = next(cell for cell in made.cells() if cell.name == whole.name)
    unlearn(alone.method, alone.config.changed(out=tmp_path / whole.name))
    same_run(tmp_path / whole.name, whole)
    with pytest.raises(RunFolderError, match="halving is True there and not set here"):
        sweep(spec(place, made.out, "beta=2,3,5,8", steps=6, limit=2))


def test_a_search_is_a_sweep_and_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("beta=1..10", "layer=1..3")
    found = sweep(spec(place, tmp_path / "s", *words, engine="optuna", trials=2, limit=2))
    assert len(found.points) == 2
    assert found.passes == 2 * 4  # One pass for all layers that the search may come to.
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert written["chosen"] == found.ranked()[0].settings
    assert "as Optuna proposed them" in written["how"]
    assert found.how in write_page(found, tmp_path / "s").read_text()
    monkeypatch.setattr("lethe.runs.unlearn.unlearn", lambda *_, **__: pytest.fail("a complete trial ran again"))
    assert sweep(spec(place, tmp_path / "s", *words, engine="optuna", trials=2, limit=2)).points == found.points


def test_ray_is_given_groups_of_a_layer_and_only_what_is_left(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec(place, tmp_path / "s", "layer=1,3", "beta=2,5", engine="ray", workers=2, evaluate="none")
    given: list[list[list[str]]] = []

    def run_here(groups: Any, spec: Sweep, command: str, progress: Progress, workers: int | None) -> dict[str, str]:
        given.append([[cell.name for cell in group] for group in groups])
        assert (command, workers) == ("lethe sweep", 2)
        failed: dict[str, str] = {}
        for group in groups:
            failed |= run_group(spec, group[:1], command=command, progress=progress, workers=workers or 1)
            failed |= {cell.name: "the loss became infinite" for cell in group[1:]}
        return failed

    monkeypatch.setattr("lethe.sweeps.on_ray.run_cells", run_here)
    plans: list[Sharable] = []
    first, found = (sweep(made, command="lethe sweep", on_plan=plans.append) for _ in range(2))
    names = [[f"layer-{layer}_beta-{beta}_seed-0" for beta in (2, 5)] for layer in (1, 3)]
    assert given == [names, [group[1:] for group in names]]
    assert set(first.failed) == {group[1] for group in names}
    assert not found.failed
    assert describe(plans[0]).startswith("4 cells; 2 groups of one layer each")
    assert (plans[1].done, plans[1].groups) == (2, 2)
    assert not (made.out / "cache").exists()
    # Another engine takes them as its own.
    assert sweep(replace(made, engine="local", workers=None)).cells == found.cells


# Refusals


def test_two_processes_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", evaluate="none")
    made.out.mkdir()
    with (made.out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process is working on the sweep"):
            sweep(made)
    assert not (made.out / "cells").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p, out: spec(p, out, "layer=1,2", evaluate="none"), "grid is"),
        (lambda p, out: spec(p, out, "layer=1", seeds=(0, 1), evaluate="none"), "seeds is"),
        (lambda p, out: spec(p, out, "layer=1", steps=5, evaluate="none"), "steps is 4 there and 5 here"),
        (lambda p, out: spec(p, out, "layer=1", method=RMU(), evaluate="none"), "adaptive-rmu there and rmu here"),
        (
            lambda p, out: spec(p, out, "layer=1,2", "beta=2,3", steps=30, halving=True),
            "halving is not set there and True here",
        ),
        (lambda p, out: spec(p, out, "layer=1..2", engine="optuna"), "engine is not set there and optuna here"),
    ],
    ids=["grid", "seeds", "steps", "method", "halving", "engine"],
)
def test_the_folder_of_another_sweep_is_refused(
    change: Callable[[Path, Path], Sweep], said: str, place: Path, tmp_path: Path
) -> None:
    first = spec(place, tmp_path / "s", "layer=1", evaluate="none")
    first.out.mkdir()
    (first.out / "sweep.yaml").write_text(yaml.safe_dump(about(first)))
    with pytest.raises(RunFolderError, match="holds another sweep") as error:
        sweep(change(place, first.out))
    assert said in str(error.value)


def test_a_folder_that_is_no_sweep_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"is no sweep: it holds thesis\.tex"):
        sweep(spec(place, tmp_path, evaluate="none"))


@pytest.mark.parametrize("content", ["1: 2", "when: 2020-13-45", "- 1", "", "{"])
def test_a_damaged_description_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(RunFolderError, match=r"sweep\.yaml cannot be read"), locked(tmp_path, {"format": 1}):
        pass


@pytest.mark.parametrize("content", ["", "[]", '{"0.9 cells/a": {"share": 1}}', '{"0.9 cells/a": 3}'])
def test_damaged_mixtures_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "calibrated.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"calibrated\.json cannot be read\.\nDelete it"):
        sweeps._mixtures(tmp_path / "calibrated.json")


def test_a_damaged_cell_says_what_to_delete(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", "beta=2,5", evaluate="none")
    sweep(made)
    first, second = (cell.config.out for cell in made.cells())
    shutil.rmtree(first)
    (second / "report.json").write_text('{"format": 1}')
    with pytest.raises(RunFolderError, match=r"report\.json is not as Lethe writes it.*\nDelete it and run the same"):
        sweep(made)
    (second / "report.json").unlink()
    (second / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"is no run folder\.\nDelete that folder and run the sweep again"):
        sweep(made)
    shutil.rmtree(second)
    assert len(sweep(made).cells) == 2


def test_a_grid_that_does_not_fit_the_disk_says_what_it_needs(place: Path, tmp_path: Path) -> None:
    made = spec(place, tmp_path / "s", cache="disk", disk_gb=1e-7, evaluate="none")
    with pytest.raises(UsageError, match=r"recordings of one slice need [\d.e-]+ GB .* may take 1e-07 GB of disk"):
        sweep(made)
    assert not made.out.exists()


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidLayerError, match=r"must be in \[0, 3\]"):
        sweep(spec(place, tmp_path / "s", "layer=1,4"))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"finalists": 2}, UsageError, "Pass --proxy N"),
        ({"proxy": 0}, InvalidValueError, "'proxy' must be at least 1. Got 0"),
        ({"proxy": 5, "limit": 5}, UsageError, "--proxy 5 is no fewer questions than --limit 5"),
        ({"disk_gb": math.inf}, InvalidValueError, "'disk_gb' must be a positive number. Got inf"),
        ({"disk_gb": math.nan}, InvalidValueError, "'disk_gb' must be a positive number. Got nan"),
        ({"workers": 2}, UsageError, "Pass --engine ray as well"),
        ({"finalists": -1}, InvalidValueError, "'finalists' must be 0 or more"),
        ({"calibrate": 1.5}, InvalidValueError, "'calibrate' must be in"),
        ({"floor": 0.0}, InvalidValueError, "'floor' must be in"),
        ({"calibrate": 0.9, "evaluate": "none"}, UsageError, "nothing is measured"),
        ({"on": Path("runs/a")}, UsageError, "starts from the untouched model"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], kind: type[Exception], said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        spec(place, tmp_path / "s", **changes)


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(place, tmp_path / "s")
    data = config.data
    flags = f"--model {config.base.model} --forget {data.forget[0]} --retain {data.retain} --steps 2 --batch-size 2"
    command = f"sweep rmu {flags} --max-length 16 --evaluate none --out {config.out} --grid"
    for words, code in (("layer=2 steering_coeff=1,2 --seeds 0 1 --json", 0), ("laier=1", 2), ("", 2)):
        with pytest.raises(SystemExit) as end:
            main.main(f"{command} {words}".split())
        assert end.value.code == code
    out, err = capsys.readouterr()
    assert len(json.loads(out)["cells"]) == 4
    assert "4 cells; recordings of 1 slices" in err
    assert "Did you mean 'layer'?" in err
    for words, said in (("lr=1e-5..1e-3", "--engine optuna"), ("layer=2,3 --engine optuna", "no range that Optuna")):
        with pytest.raises(SystemExit) as end:
            main.main(f"{command} {words}".replace("--evaluate none", "").split())
        assert end.value.code == 2
        assert said in capsys.readouterr().err


# Parts


def test_a_store_keeps_bits_up_to_its_limit(tmp_path: Path) -> None:
    store = Store(4 * 1000, tmp_path / "cache")
    first = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    kept = store.keep(first)
    assert kept is not None
    assert torch.equal(kept, first)
    assert kept.data_ptr() != first.data_ptr()
    again = store.keep(first.to(torch.bfloat16))
    assert again is not None
    assert again.data_ptr() % 64 == 0
    assert torch.equal(again, first.to(torch.bfloat16))
    assert torch.equal(kept, first)
    assert store.keep(first) is None
    assert list((tmp_path / "cache").iterdir())
    store.clear()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("limit", [10**9, 9000, 0])
def test_a_shared_recording_is_the_one_made_alone(limit: int, tiny_model: Any, tiny_batch: Any) -> None:
    model, batches = tiny_model(), [tiny_batch(seed=seed) for seed in range(3)]
    cuts = tuple((start, start + 2, trainable_names(model, start + 1)) for start in (0, 1, 2))
    shared = Recordings(Store(limit), cuts)
    for start, stop, names in cuts:
        alone = LayerSlice(tiny_model(), start, stop, names)
        layers = shared.cut(model, start, stop, names)
        with torch.no_grad():
            layers.trained[names[0]].add_(1)
        for batch in batches:
            mine, other = layers.record(batch), alone.record(batch)
            assert torch.equal(mine.hidden, other.hidden)
            assert torch.equal(mine.frozen.h, other.frozen.h)
            with torch.no_grad():
                alone.trained[names[0]].add_(1)
                assert torch.equal(layers(mine), alone(other))
            alone.restore()
        layers.restore()
    assert shared.store.used <= limit
    if limit == 10**9:
        assert shared.passes == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen2", "mixtral", "falcon"])
def test_a_forward_that_starts_at_the_slice_gives_the_same_logits(kind: str, tiny_model: Any, tiny_batch: Any) -> None:
    model, batch = tiny_model(kind), tiny_batch()
    asked = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "use_cache": False}
    starts = HiddenCache((1, 3), Store(10**9))
    with measuring(model):
        with starts.reading(model, None):
            model(**asked)
        assert starts.is_sound
        with torch.no_grad():
            for parameter in list(model.parameters())[-4:]:
                parameter.add_(0.1)
        expected = model(**asked).logits
        ran: list[int] = []
        for first, count in ((3, 1), (2, 2), (0, 2)):
            with starts.reading(model, first):
                assert torch.equal(model(**asked).logits, expected)
                ran.append(starts.served)
            assert ran[-1] == count
        assert "forward" not in model.__dict__


def test_a_model_that_hands_more_than_its_state_on_is_not_cut_short(tiny_model: Any, tiny_batch: Any) -> None:
    model, batch = tiny_model(), tiny_batch()
    starts = HiddenCache((2,), Store(10**9))
    memory: list[Batch] = []
    first, last = model.model.layers[0], model.model.layers[3]
    first.register_forward_hook(lambda _, args, output: memory.append(output))
    last.register_forward_hook(lambda _, args, output: output + memory.pop() if memory else output)
    with measuring(model), starts.reading(model, None):
        model(input_ids=batch.input_ids, use_cache=False)
    assert not starts.is_sound


def test_edited_patches_load(swept: tuple[Sweep, Outcomes, list[Sharable]]) -> None:
    made, found, _ = swept
    patches = [Patch.load(made.out / cell.folder / "patch.safetensors") for cell in found.cells]
    assert len({tuple(patch.tensors) for patch in patches}) == 2
