"""Grids: which runs words stand for, and what is refused."""

from pathlib import Path

import pytest

from lethe import LUNAR, RMU, AdaptiveRMU, RunConfig
from lethe.errors import InvalidLayerError, InvalidValueError, LetheError, UnknownNameError, UsageError
from lethe.sweeps.grid import Range, cells, parse

CONFIG = RunConfig.of(model="builtin")
RIDGE = CONFIG.changed(solver="ridge")


def test_values_take_the_type_of_their_setting() -> None:
    words = ["layer=3,7", "beta=2,1e1", "norm=token", "train-layers=1+2,3", "chunk=true"]
    common = {
        "layer": (3, 7),
        "beta": (2.0, 10.0),
        "norm": ("token",),
        "train_layers": ((1, 2), (3,)),
        "chunk": (True,),
    }
    assert parse([*words, "--lr=1e-3"], AdaptiveRMU(), CONFIG) == {**common, "lr": (1e-3,)}
    assert parse([*words, "lam=none,0.1"], AdaptiveRMU(), RIDGE) == {**common, "lam": (None, 0.1)}


def test_every_combination_is_a_cell_with_every_seed() -> None:
    axes = parse(["layer=3,7", "beta=2,3", "batch_size=2,4"], AdaptiveRMU(), CONFIG)
    found = cells(AdaptiveRMU(), CONFIG, axes, (0, 1), Path("s/cells"))
    assert len(found) == len({cell.name for cell in found}) == 16
    assert found[0].name == "layer-3_beta-2_batch_size-2_seed-0"
    assert found[0].config.out == Path("s/cells") / found[0].name
    for cell in found:
        assert (cell.method.beta, cell.config.layer) == (cell.settings["beta"], cell.settings["layer"])  # type: ignore[attr-defined]
        assert cell.config.batching.batch_size == cell.settings["batch_size"]
    # What changes all recordings changes least often, the coefficient most often.
    order = [(c.config.seed, c.config.batching.batch_size, c.config.layer) for c in found]
    assert order == sorted(order)


def test_equal_values_are_one() -> None:
    assert parse(["layer=3,3,7"], RMU(), CONFIG) == {"layer": (3, 7)}


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ([], UsageError, "the grid is empty"),
        (["layer="], UsageError, "'layer' has no value"),
        (["layer=,"], UsageError, "'layer' has no value"),
        (["layer"], UsageError, "'layer' is no setting with values"),
        (["layer=1", "layer=2"], UsageError, "stands in the grid twice"),
        (["laier=3"], UnknownNameError, "Did you mean 'layer'?"),
        (["betta=3"], UnknownNameError, "Did you mean 'beta'?"),
        (["layer=3.5"], InvalidValueError, "'layer' must be a whole number. Got 3.5"),
        (["beta=high"], InvalidValueError, "'beta' must be a number. Got high"),
        (["beta=nan"], InvalidValueError, "'beta' must be a finite number"),
        (["norm=tokens"], InvalidValueError, "Did you mean 'token'?"),
        (["chunk=yes"], InvalidValueError, "'chunk' must be true or false"),
        (["seed=0,1"], UsageError, "Pass --seeds 0 1 2"),
        (["model=a,b"], UsageError, "Make one sweep for each value"),
        (["on=runs/a"], UsageError, "starts from the untouched model"),
        (["beta=5..1"], InvalidValueError, "'beta' has an empty range. Got 5..1"),
        (["beta=2..2"], InvalidValueError, "'beta' has an empty range"),
        (["lr=0..1:log"], InvalidValueError, "'lr' has no logarithm at 0"),
        (["lr=1..2:lin"], UsageError, "'1..2:lin' is no range of 'lr'"),
        (["beta=1..2,5"], UsageError, "Write beta=LOW..HIGH"),
        (["beta=1.."], InvalidValueError, "'beta' must be a number. Got ."),
        (["layer=1..2.5"], InvalidValueError, "'layer' must be a whole number. Got 2.5"),
    ],
)
def test_what_is_no_grid_is_refused(words: list[str], kind: type[LetheError], said: str) -> None:
    with pytest.raises(kind) as error:
        parse(words, AdaptiveRMU(), CONFIG)
    assert said in str(error.value)


def test_ranges_stand_for_their_ends_and_for_every_layer() -> None:
    axes = parse(["layer=3..5", "beta=1..10", "lr=1e-5..1e-3:log", "retain=../a.txt"], AdaptiveRMU(), CONFIG)
    assert axes == {
        "layer": Range(low=3, high=5, is_whole=True),
        "beta": Range(low=1.0, high=10.0),
        "lr": Range(low=1e-5, high=1e-3, is_log=True),
        "retain": ("../a.txt",),
    }
    assert parse(["lam=0.1..1"], AdaptiveRMU(), RIDGE) == {"lam": Range(low=0.1, high=1.0)}
    assert [str(axes[name]) for name in ("layer", "lr")] == ["3..5", "1e-05..0.001:log"]
    found = cells(AdaptiveRMU(), CONFIG, {name: axes[name] for name in ("layer", "beta")}, (0,), Path("s"))
    assert {(cell.settings["layer"], cell.settings["beta"]) for cell in found} == {
        (layer, beta) for layer in (3, 4, 5) for beta in (1.0, 10.0)
    }


def test_a_setting_of_another_method_is_unknown() -> None:
    with pytest.raises(UnknownNameError, match="neither LUNAR nor a run has a setting 'beta'"):
        parse(["beta=2"], LUNAR(), CONFIG)


@pytest.mark.parametrize(("name", "config"), [("lam", CONFIG), ("lr", RIDGE), ("steps", RIDGE)])
def test_a_setting_of_another_solver_is_unknown(name: str, config: RunConfig) -> None:
    with pytest.raises(UnknownNameError, match=rf"neither RMU nor a run has a setting '{name}'"):
        parse([f"{name}=1,2"], RMU(), config)


def test_values_out_of_range_and_no_seed_are_refused() -> None:
    with pytest.raises(InvalidLayerError):
        cells(RMU(), CONFIG, {"layer": (-1,)}, (0,), Path("s"))
    with pytest.raises(InvalidValueError, match="alpha"):
        cells(RMU(), CONFIG, {"alpha": (-1.0,)}, (0,), Path("s"))
    with pytest.raises(UsageError, match="no seed"):
        cells(RMU(), CONFIG, {"layer": (1,)}, (), Path("s"))


def test_names_that_fall_together_are_refused() -> None:
    with pytest.raises(UsageError, match="same folder name"):
        cells(RMU(), CONFIG, {"retain": ("a/b", "a-b")}, (0,), Path("s"))


def test_names_that_no_file_system_takes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"longer than 255 bytes: retain--data-é.*\nName files by shorter paths"):
        cells(RMU(), CONFIG, {"retain": ("a", f"/data/{'é' * 125}")}, (0,), Path("s"))
    assert len(cells(RMU(), CONFIG, {"retain": ("a", f"/data/{'é' * 110}")}, (0,), Path("s"))) == 2


@pytest.mark.parametrize("name", ["retain_questions", "split", "data"])
def test_what_cells_are_measured_on_is_no_setting_to_compare(name: str) -> None:
    with pytest.raises(UsageError, match=rf"'{name}' cannot stand in a grid(.|\n)*same questions"):
        parse([f"{name}=a,b"], RMU(), CONFIG)
