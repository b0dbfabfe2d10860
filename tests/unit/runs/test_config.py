"""Settings of a run: what is refused and how, and the way to config.yaml and back."""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import yaml

from lethe.errors import InvalidLayerError, InvalidValueError, RunFolderError, UnknownNameError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.rmu import RMU
from lethe.runs.config import RunConfig
from lethe.runs.config_file import method_class, method_name, plain, read_config
from lethe.suites.world import settings as configs

METHODS = "Methods: adaptive-rmu, lunar, rmu, rsv. See `lethe ls methods`."

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no step": ({"steps": 0}, "'steps' must be at least 1. Got 0."),
    "no row": ({"batch_size": 0}, "'batch_size' must be at least 1. Got 0."),
    "no batch": ({"accumulate": -1}, "'accumulate' must be at least 1. Got -1."),
    "no epoch": ({"epochs": 0}, "'epochs' must be at least 1. Got 0."),
    "no question": ({"limit": 0}, "'limit' must be at least 1. Got 0."),
    "no thread": ({"threads": 0}, "'threads' must be at least 1. Got 0."),
    "lr of zero": ({"lr": 0.0}, "'lr' must be a positive number. Got 0.0."),
    "lr that is no number": ({"lr": float("nan")}, "'lr' must be a positive number. Got nan."),
    "endless lr": ({"lr": float("inf")}, "'lr' must be a positive number. Got inf."),
    "negative seed": ({"seed": -1}, "'seed' must be in [0, 2^63). Got -1."),
    "huge seed": ({"seed": 2**63}, "'seed' must be in [0, 2^63). Got 9223372036854775808."),
    "nothing to forget": ({"forget": ()}, "'forget' must name at least one corpus."),
    "rows of one token": ({"max_length": (512, 1)}, "'max_length' must be 2 or more. Got 512 1."),
    "no length": ({"max_length": ()}, "'max_length' must be 2 or more. Got ."),
}

REFUSED_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "negative layer": ({"layer": -1}, "'layer' must be 0 or more. Got -1."),
    "trained after the target": (
        {"layer": 3, "train_layers": (2, 4, 5)},
        "'train_layers' must lie in [0, 3]: a layer after --layer 3 cannot change its output. Got 4, 5.",
    ),
    "negative trained layer": (
        {"layer": 3, "train_layers": (-1,)},
        "'train_layers' must lie in [0, 3]: a layer after --layer 3 cannot change its output. Got -1.",
    ),
}


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the type checks that tests alone have, as users meet the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_value_outside_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        RunConfig(model="builtin", **settings)
    assert str(caught.value) == message


CHOICES = {
    "dtype": ("int4", "'dtype' must be one of auto, float32, bfloat16, float16. Got int4."),
    "split": ("train", "'split' must be one of dev, test, all. Got train."),
    "count": ("bos", "'count' must be one of no-bos, real-tokens, all-tokens. Got bos."),
    "scoring": ("words", "'scoring' must be one of letter, cloze. Got words."),
    "evaluate": ("never", "'evaluate' must be one of all, none. Got never."),
}


@pytest.mark.parametrize(("name", "value", "message"), [(name, *row) for name, row in CHOICES.items()], ids=CHOICES)
def test_a_choice_that_is_not_offered_is_refused(name: str, value: str, message: str, untyped: None) -> None:
    with pytest.raises(InvalidValueError) as caught:
        replace(RunConfig(model="builtin"), **{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(("settings", "message"), REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_a_layer_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidLayerError) as caught:
        RunConfig(model="builtin", **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("layer", "given", "trained"),
    [
        (0, (), (0,)),
        (1, (), (0, 1)),
        (2, (), (0, 1, 2)),
        (7, (), (5, 6, 7)),
        (7, (7,), (7,)),
        (7, (6, 2, 6), (2, 6)),
    ],
)
def test_trained_layers_are_the_three_up_to_the_layer_unless_given(
    layer: int, given: tuple[int, ...], trained: tuple[int, ...]
) -> None:
    assert RunConfig(model="builtin", layer=layer, train_layers=given).trained_layers == trained


def test_one_length_serves_all_corpora() -> None:
    assert RunConfig(model="m", max_length=(99,)).resolved(2).max_length == (99, 99, 99)
    assert RunConfig(model="m", max_length=(9, 8, 7)).resolved(2).max_length == (9, 8, 7)


def test_a_wrong_number_of_lengths_is_refused() -> None:
    with pytest.raises(InvalidValueError) as caught:
        RunConfig(model="m", max_length=(9, 8)).resolved(2)
    assert str(caught.value) == ("'max_length' needs one number, or 3 for 2 topics and the retain corpus. Got 2.")


@pytest.mark.parametrize(("topics", "lengths"), [(1, (512, 512)), (2, (512, 768, 512)), (3, (512, 768, 768, 512))])
def test_as_published_counts_padding_and_has_the_published_lengths(topics: int, lengths: tuple[int, ...]) -> None:
    config = RunConfig(model="m", as_published=True, max_length=(64,)).resolved(topics)
    assert (config.max_length, config.count) == (lengths, "all-tokens")


# Names of methods


@pytest.mark.parametrize(
    ("name", "kind"), [("rmu", RMU), ("RMU", RMU), ("adaptive-rmu", AdaptiveRMU), ("Adaptive_RMU", AdaptiveRMU)]
)
def test_a_method_is_found_by_name(name: str, kind: type[Any]) -> None:
    assert method_class(name) is kind
    assert method_class(method_name(kind())) is kind


@pytest.mark.parametrize(
    ("name", "hint"),
    [("adaptve_rmu", " Did you mean 'adaptive-rmu'?"), ("rmuu", " Did you mean 'rmu'?"), ("gradient-ascent", "")],
)
def test_an_unknown_method_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        method_class(name)
    assert str(caught.value) == f"there is no method '{name.replace('_', '-')}'.{hint}\n{METHODS}"


# config.yaml


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def content(**changes: Any) -> dict[str, Any]:
    return plain(RMU(), RunConfig(model="builtin")) | changes


def refusal(path: Path) -> str:
    with pytest.raises(RunFolderError) as caught:
        read_config(path)
    return str(caught.value)


def test_a_config_comes_back_as_it_was(tmp_path: Path) -> None:
    method = AdaptiveRMU(beta=2.5, norm="running")
    config = RunConfig(
        model="some/model",
        revision="main",
        forget=("a.jsonl", "ü b.txt"),
        retain="c.txt",
        train_layers=(3, 5),
        train_modules=("mlp.down_proj",),
        max_length=(9, 8, 7),
        lr=5e-5,
        seed=2**62,
        forget_questions=Path("q.csv"),
        out=tmp_path / "run",
    )
    assert read_config(write(tmp_path, plain(method, config))) == (method, config)


def test_config_yaml_holds_plain_values_only(tmp_path: Path) -> None:
    """A tuple would read back as a list, and a resumed run would take itself for another one."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(RMU):
        scales: tuple[float, ...] = (1.0, 2.0)
        table: Path = Path("a/b")

    found = plain(Mine(), RunConfig(model="builtin", train_layers=(1, 2)))
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["method"]["scales"] == [1.0, 2.0]


def test_numbers_and_single_values_as_people_write_them(tmp_path: Path) -> None:
    written = yaml.safe_dump(content(run={"model": "m"})) + "  lr: 5e-5\n  forget: a.jsonl\n  max_length: 64\n"
    _, config = read_config(write(tmp_path, written))
    assert (config.lr, config.forget, config.max_length) == (5e-5, ("a.jsonl",), (64,))


def test_a_missing_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert refusal(path) == (f"cannot read {path}: No such file or directory.\nName the config.yaml of a run folder.")


BROKEN = {
    "broken yaml": ("format: [1", "{path} is not YAML: while parsing a flow sequence."),
    "a text": ("only words", "{path} is not the config.yaml of a run: it has no 'format' number."),
    "nothing": ("", "{path} is not the config.yaml of a run: it has no 'format' number."),
    "format of words": (
        content(format="one"),
        "{path} is not the config.yaml of a run: it has no 'format' number.",
    ),
    "newer version": (
        {"format": 2, "lethe": "9.1", "stages": []},
        "{path} was written by a newer Lethe (9.1; format 2, this one reads 1).\n"
        "Upgrade: pip install --upgrade lethe-unlearn",
    ),
    "no run": (
        {"format": 1, "method": {"name": "rmu"}},
        "{path} is not the config.yaml of a run: it needs 'method' with a 'name', and 'run'.",
    ),
    "method without a name": (
        content(method={"alpha": 1.0}),
        "{path} is not the config.yaml of a run: it needs 'method' with a 'name', and 'run'.",
    ),
    "unknown setting of the run": (
        content(run={"model": "builtin", "stepps": 3}),
        "{path}: RunConfig has no setting 'stepps'. Did you mean 'steps'?",
    ),
    "unknown setting of the method": (
        content(method={"name": "rmu", "stering_coeff": 3.0}),
        "{path}: RMU has no setting 'stering_coeff'. Did you mean 'steering_coeff'?",
    ),
    "far from any setting": (
        content(run={"model": "builtin", "zzz": 3}),
        "{path}: RunConfig has no setting 'zzz'.",
    ),
    "lr of words": (
        content(run={"model": "builtin", "lr": "fast"}),
        "{path}: could not convert string to float: 'fast'.",
    ),
}


@pytest.mark.parametrize(("written", "message"), BROKEN.values(), ids=BROKEN)
def test_a_config_that_cannot_be_used(written: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, written)
    assert refusal(path) == message.format(path=path)


def test_a_config_without_a_model(tmp_path: Path) -> None:
    path = write(tmp_path, content(run={"steps": 3}))
    assert refusal(path).startswith(f"{path}: ")
    assert "'model'" in refusal(path)


def test_a_config_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"format: 1\xff")
    assert refusal(path).startswith(f"{path} is not YAML: 'utf-8' codec can't decode byte 0xff in position 9")


def test_a_config_with_the_name_of_no_method(tmp_path: Path) -> None:
    path = write(tmp_path, content(method={"name": "rnu"}))
    with pytest.raises(UnknownNameError) as caught:
        read_config(path)
    assert str(caught.value) == f"there is no method 'rnu'. Did you mean 'rmu'?\n{METHODS}"


def test_a_config_with_a_value_outside_its_range(tmp_path: Path) -> None:
    path = write(tmp_path, content(run={"model": "builtin", "steps": 0}))
    with pytest.raises(InvalidValueError, match=r"^'steps' must be at least 1\. Got 0\.$"):
        read_config(path)


def test_a_config_with_a_value_of_another_kind(tmp_path: Path, untyped: None) -> None:
    path = write(tmp_path, content(run={"model": "builtin", "steps": "many"}))
    assert refusal(path) == f"{path}: '<' not supported between instances of 'str' and 'int'."


def test_what_suits_the_built_in_model_are_settings_of_a_run() -> None:
    assert RunConfig(model="builtin", **configs.ON_BUILTIN).layer == 5


def test_as_published_is_written_as_it_is_run() -> None:
    method = AdaptiveRMU(norm="token", direction="gaussian", beta=3.0)
    published = plain(method, RunConfig(model="m", as_published=True))["method"]
    assert (published["norm"], published["direction"], published["beta"]) == ("first-batch", "uniform", 3.0)
    assert plain(method, RunConfig(model="m"))["method"]["norm"] == "token"
