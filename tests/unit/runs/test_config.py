"""Settings of a run: what is refused and how, and the way to config.yaml and back."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import yaml

from lethe.data.settings import Batching, DataSettings
from lethe.errors import InvalidLayerError, InvalidValueError, RunFolderError, UnknownNameError
from lethe.evaluation.settings import EvalSettings
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.lunar import LUNAR
from lethe.methods.rmu import RMU
from lethe.model.settings import ModelSettings
from lethe.runs.config import RunConfig
from lethe.runs.config_file import method_class, method_name, plain, read_config
from lethe.solvers.gradient import Gradient
from lethe.solvers.pooled import Pooled
from lethe.solvers.ridge import Ridge
from lethe.suites.builtin import Builtin

METHODS = "Methods: adaptive-rmu, finetune, grad-diff, lunar, rmu, rsv. See `lethe ls methods`."

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
        RunConfig.of(model="builtin", **settings)
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
        RunConfig.of(model="builtin").changed(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(("settings", "message"), REFUSED_LAYERS.values(), ids=REFUSED_LAYERS)
def test_a_layer_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidLayerError) as caught:
        RunConfig.of(model="builtin", **settings)
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
    assert RunConfig.of(model="builtin", layer=layer, train_layers=given).trained_layers == trained


def test_one_length_serves_all_corpora() -> None:
    assert RunConfig.of(model="m", max_length=(99,)).batching.lengths(2) == (99, 99, 99)
    assert RunConfig.of(model="m", max_length=(9, 8, 7)).batching.lengths(2) == (9, 8, 7)


def test_three_lengths_are_for_the_first_topic_every_other_and_the_retain_corpus() -> None:
    batching = RunConfig.of(model="m", max_length=(9, 8, 7)).batching
    assert [batching.lengths(topics) for topics in (1, 2, 4)] == [(9, 7), (9, 8, 7), (9, 8, 8, 8, 7)]


def test_a_wrong_number_of_lengths_is_refused() -> None:
    with pytest.raises(InvalidValueError) as caught:
        RunConfig.of(model="m", max_length=(9, 8)).batching.lengths(2)
    assert str(caught.value) == ("'max_length' needs one number, or 3 for 2 topics and the retain corpus. Got 2.")


@pytest.mark.parametrize(("topics", "lengths"), [(1, (512, 512)), (2, (512, 768, 512)), (3, (512, 768, 768, 512))])
def test_as_published_counts_padding_and_has_the_published_lengths(topics: int, lengths: tuple[int, ...]) -> None:
    config = RunConfig.of(model="m", as_published=True, max_length=(64,))
    assert (config.batching.lengths(topics), config.batching.count) == (lengths, "all-tokens")


def test_as_published_is_resolved_when_the_config_is_made() -> None:
    plainly = RunConfig.of(model="m", steps=9, batch_size=3, text_field="body", seed=5)
    published = plainly.changed(as_published=True)
    assert published == RunConfig.of(model="m", as_published=True, steps=9, batch_size=3, text_field="body", seed=5)
    before, after = plainly.settings(), published.settings()
    assert {name: after[name] for name in after if after[name] != before[name]} == {
        "as_published": True,
        "raw_lines": True,
        "max_length": (512, 768, 512),
        "count": "all-tokens",
        "padding_side": "left",
        "shuffle": False,
        "positions": "all",
        "fp32_masters": False,
    }
    assert published.changed(solver="ridge").changed(solver="gradient").solver.fp32_masters is False


# Settings by name


def test_settings_of_all_sections_go_by_their_names() -> None:
    config = RunConfig.of(model="m", dtype="bfloat16", forget=("a",), batch_size=2, limit=3, lr=1e-3, layer=4)
    assert config == RunConfig(
        base=ModelSettings(model="m", dtype="bfloat16"),
        data=DataSettings(forget=("a",)),
        batching=Batching(batch_size=2),
        evaluation=EvalSettings(limit=3),
        solver=Gradient(lr=1e-3),
        layer=4,
    )
    assert RunConfig.of(**config.settings()) == config
    assert (config.settings()["solver"], config.settings()["lr"]) == ("gradient", 1e-3)


def test_a_solver_goes_by_its_name_or_is_an_object() -> None:
    assert RunConfig.of(model="m", solver="ridge", lam=0.5).solver == Ridge(lam=0.5)
    assert RunConfig.of(model="m", solver=Ridge(keep_sums=False), lam=0.5).solver == Ridge(lam=0.5, keep_sums=False)
    assert RunConfig.of(model="m", solver="pooled").solver == Pooled()
    assert RunConfig.of(model="m").solver == Gradient()


def test_one_setting_is_changed_and_the_others_stay() -> None:
    config = RunConfig.of(model="m", lr=1e-3, steps=7, batch_size=2, limit=3, layer=4, forget=("a",))
    assert config.changed() == config
    for name, value in {"revision": "x", "retain": "r", "epochs": 2, "samples": 5, "steps": 8, "seed": 9}.items():
        assert config.changed(**{name: value}).settings() == config.settings() | {name: value}
    assert config.settings()["steps"] == 7


def test_another_solver_starts_from_its_own_defaults() -> None:
    config = RunConfig.of(model="m", lr=1e-3, batch_size=2)
    assert config.changed(solver="ridge", lam=0.5) == RunConfig.of(model="m", solver="ridge", lam=0.5, batch_size=2)
    assert config.changed(solver=Ridge(keep_sums=False), lam=0.5).solver == Ridge(keep_sums=False, lam=0.5)
    assert config.changed(solver="ridge").changed(solver="gradient").solver == Gradient()
    assert config.changed(solver="gradient", steps=3).solver == Gradient(lr=1e-3, steps=3)


HAS = {
    "gradient": "It has steps, accumulate, optimizer, lr, warm_up, decay, fp32_masters. See `lethe ls solvers`.",
    "ridge": "It has lam, keep_sums. See `lethe ls solvers`.",
    "pooled": "It has none. See `lethe ls solvers`.",
}
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "a typing error": ({"lrr": 1.0}, "the solver 'gradient' has no setting 'lrr'. Did you mean 'lr'?"),
    "far from any": ({"zzz": 1.0}, "the solver 'gradient' has no setting 'zzz'."),
    "of 0.1": ({"layers_from": Path("layers.json")}, "the solver 'gradient' has no setting 'layers_from'."),
    "lam with gradient": ({"lam": 1.0}, "the solver 'gradient' has no setting 'lam'."),
    "lr with ridge": ({"solver": "ridge", "lr": 1.0}, "the solver 'ridge' has no setting 'lr'."),
    "lr with an object": ({"solver": Ridge(), "lr": 1.0}, "the solver 'ridge' has no setting 'lr'."),
    "lam with pooled": ({"solver": "pooled", "lam": 1.0}, "the solver 'pooled' has no setting 'lam'."),
}


@pytest.mark.parametrize(("settings", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_setting_that_there_is_not_is_refused(settings: dict[str, Any], message: str) -> None:
    solver = message.split("'")[1]
    for call in (lambda: RunConfig.of(model="m", **settings), lambda: RunConfig.of(model="m").changed(**settings)):
        with pytest.raises(UnknownNameError) as caught:
            call()
        assert str(caught.value) == f"{message}\n{HAS[solver]}"


def test_a_solver_that_there_is_not_is_refused() -> None:
    for call in (
        lambda: RunConfig.of(model="m", solver="rigde"),
        lambda: RunConfig.of(model="m").changed(solver="rigde"),
    ):
        with pytest.raises(UnknownNameError) as caught:
            call()
        assert str(caught.value) == (
            "there is no solver 'rigde'. Did you mean 'ridge'?\n"
            "Solvers: gradient, pooled, ridge. See `lethe ls solvers`."
        )


def test_a_run_needs_a_model() -> None:
    with pytest.raises(TypeError, match="'model'"):
        RunConfig.of(layer=3)


@pytest.mark.parametrize("settings", [{}, {"solver": "ridge"}, {"on": Path("runs/one")}])
def test_only_a_solver_that_keeps_requests_takes_one_back(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"^'withdraw' needs --on RUN and --solver ridge: "):
        RunConfig.of(model="m", withdraw="one", **settings)
    assert RunConfig.of(model="m", withdraw="one", solver="ridge", on=Path("runs/one")).withdraw == "one"


@pytest.mark.parametrize("solver", ["ridge", "pooled"])
def test_a_solver_of_one_matrix_trains_the_layer_alone_unless_layers_are_given(solver: str) -> None:
    assert RunConfig.of(model="m", solver=solver, layer=7).trained_layers == (7,)
    assert RunConfig.of(model="m", solver=solver, layer=7, train_layers=(6, 2)).trained_layers == (2, 6)


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
    return plain(RMU(), RunConfig.of(model="builtin")) | changes


def refusal(path: Path) -> str:
    with pytest.raises(RunFolderError) as caught:
        read_config(path)
    return str(caught.value)


def test_a_config_comes_back_as_it_was(tmp_path: Path) -> None:
    method = AdaptiveRMU(beta=2.5, norm="running")
    config = RunConfig.of(
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


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ridge", "lam": 0.5, "keep_sums": False},
        {"solver": "ridge", "on": Path("runs/one"), "withdraw": "two"},
        {"solver": "pooled"},
        {"as_published": True, "lr": 1e-3},
        {"fp32_masters": False, "padding_side": "left", "shuffle": False, "raw_lines": True},
    ],
)
def test_a_config_of_any_solver_comes_back_as_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.of(model="m", **settings)
    written = plain(RMU(), config)
    assert read_config(write(tmp_path, written)) == (RMU(), config)
    assert plain(*read_config(tmp_path / "config.yaml")) == written


def test_config_yaml_has_a_mapping_for_each_section() -> None:
    written = plain(RMU(), RunConfig.of(model="m", solver="ridge", lam=0.5))
    assert list(written) == [
        "format", "lethe", "method", "solver", "base", "data", "batching", "evaluation", "run",
    ]  # fmt: skip
    assert written["format"] == 2
    assert written["method"]["name"] == "rmu"
    assert written["solver"] == {"name": "ridge", "lam": 0.5, "keep_sums": True}
    assert written["base"]["model"] == "m"


def test_config_yaml_holds_plain_values_only(tmp_path: Path) -> None:
    """A tuple would read back as a list, and a resumed run would take itself for another one."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(RMU):
        scales: tuple[float, ...] = (1.0, 2.0)
        table: Path = Path("a/b")

    found = plain(Mine(), RunConfig.of(model="builtin", train_layers=(1, 2)))
    assert yaml.safe_load(yaml.safe_dump(found)) == found
    assert found["method"]["scales"] == [1.0, 2.0]


def test_numbers_and_single_values_as_people_write_them(tmp_path: Path) -> None:
    rest = {
        key: value for key, value in content(base={"model": "m"}).items() if key not in ("solver", "data", "batching")
    }
    written = yaml.safe_dump(rest) + (
        "solver: {name: gradient, lr: 5e-5}\ndata: {forget: a.jsonl}\nbatching: {max_length: 64}\n"
    )
    _, config = read_config(write(tmp_path, written))
    assert config == RunConfig.of(model="m", lr=5e-5, forget=("a.jsonl",), max_length=(64,))


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
        {"format": 3, "lethe": "9.1", "stages": []},
        "{path} was written by a newer Lethe (9.1; format 3, this one reads 2).\n"
        "Upgrade: pip install --upgrade lethe-unlearn",
    ),
    "no run": (
        {"format": 2, "method": {"name": "rmu"}},
        "{path} is not the config.yaml of a run: it needs 'method' with a 'name', and 'run'.",
    ),
    "method without a name": (
        content(method={"alpha": 1.0}),
        "{path} is not the config.yaml of a run: it needs 'method' with a 'name', and 'run'.",
    ),
    "solver without a name": (
        content(solver={"lr": 1.0}),
        "{path} is not the config.yaml of a run: it needs 'solver' with a 'name'.",
    ),
    "no solver": (
        content(solver=None),
        "{path} is not the config.yaml of a run: it needs 'solver' with a 'name'.",
    ),
    "a section without settings": (
        content(batching=None),
        "{path}: batching holds no settings.\nName the config.yaml of a run folder.",
    ),
    "unknown setting of the run": (
        content(run={"layr": 3}),
        "{path}: run: RunSettings has no setting 'layr'. Did you mean 'layer'?",
    ),
    "unknown setting of the solver": (
        content(solver={"name": "gradient", "stepps": 3}),
        "{path}: solver: Gradient has no setting 'stepps'. Did you mean 'steps'?",
    ),
    "setting of another solver": (
        content(solver={"name": "ridge", "lr": 1e-3}),
        "{path}: solver: Ridge has no setting 'lr'.",
    ),
    "setting of another section": (
        content(data={"batch_size": 3}),
        "{path}: data: DataSettings has no setting 'batch_size'.",
    ),
    "unknown setting of the method": (
        content(method={"name": "rmu", "stering_coeff": 3.0}),
        "{path}: RMU has no setting 'stering_coeff'. Did you mean 'steering_coeff'?",
    ),
    "far from any setting": (
        content(run={"zzz": 3}),
        "{path}: run: RunSettings has no setting 'zzz'.",
    ),
    "lr of words": (
        content(solver={"name": "gradient", "lr": "fast"}),
        "{path}: could not convert string to float: 'fast'.",
    ),
    "unknown setting of format 1": (
        {"format": 1, "method": {"name": "rmu"}, "run": {"model": "builtin", "stepps": 3}},
        "{path}: RunConfig has no setting 'stepps'. Did you mean 'steps'?",
    ),
    "far from any setting of format 1": (
        {"format": 1, "method": {"name": "rmu"}, "run": {"model": "builtin", "zzz": 3}},
        "{path}: RunConfig has no setting 'zzz'.",
    ),
    "lr of words of format 1": (
        {"format": 1, "method": {"name": "rmu"}, "run": {"model": "builtin", "lr": "fast"}},
        "{path}: could not convert string to float: 'fast'.",
    ),
}


@pytest.mark.parametrize(("written", "message"), BROKEN.values(), ids=BROKEN)
def test_a_config_that_cannot_be_used(written: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, written)
    assert refusal(path) == message.format(path=path)


def test_a_config_without_a_model(tmp_path: Path) -> None:
    path = write(tmp_path, content(base={}))
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
    path = write(tmp_path, content(solver={"name": "gradient", "steps": 0}))
    with pytest.raises(InvalidValueError, match=r"^'steps' must be at least 1\. Got 0\.$"):
        read_config(path)


def test_a_config_with_a_value_of_another_kind(tmp_path: Path, untyped: None) -> None:
    path = write(tmp_path, content(solver={"name": "gradient", "steps": "many"}))
    assert refusal(path) == f"{path}: '<' not supported between instances of 'str' and 'int'."


# config.yaml of Lethe 0.1

GRADIENT_OF_0_1 = """\
format: 1
lethe: 0.1.0
method:
  name: adaptive-rmu
  alpha: 300.0
  nu: 0.0
  noise: target
  beta: 3.0
  norm: token
  direction: uniform
run:
  model: org/model-7b
  revision: main
  forget:
  - bio.jsonl
  - cyber.jsonl
  retain: wiki.txt
  data: null
  reference: builtin
  positions: last
  'on': null
  withdraw: null
  text_field: text
  layer: 7
  train_layers:
  - 5
  - 7
  layers_from: layers.json
  train_modules: []
  solver: gradient
  lam: null
  keep_sums: true
  steps: 80
  batch_size: 4
  accumulate: 2
  epochs: 1
  max_length:
  - 512
  - 768
  - 256
  chunk: false
  count: no-bos
  lr: 0.0001
  seed: 3
  device: auto
  dtype: auto
  threads: null
  as_published: false
  allow_overlap: false
  evaluate: all
  forget_questions: questions.csv
  adjacent_questions: null
  retain_questions: null
  scoring: letter
  split: test
  limit: null
  refusals: null
  encoder: null
  samples: 0
  free_running: false
  keywords: []
  holdout: null
  nli: null
  show_forget: false
  out: runs/one
"""

RIDGE_OF_0_1 = """\
format: 1
lethe: 0.1.0
method:
  name: lunar
  alpha: 1.0
  nu: 0.0
  noise: target
  steering_coeff: 2.0
run:
  model: builtin
  revision: null
  forget:
  - builtin
  retain: builtin
  data: null
  reference: builtin
  positions: differing
  'on': runs/one
  withdraw: null
  text_field: text
  layer: 8
  train_layers: []
  layers_from: null
  train_modules: []
  solver: ridge
  lam: 0.01
  keep_sums: true
  steps: 150
  batch_size: 8
  accumulate: 1
  epochs: 1
  max_length:
  - 128
  chunk: false
  count: no-bos
  lr: 5.0e-05
  seed: 0
  device: auto
  dtype: auto
  threads: 1
  as_published: false
  allow_overlap: false
  evaluate: all
  forget_questions: null
  adjacent_questions: null
  retain_questions: null
  scoring: letter
  split: test
  limit: 40
  refusals: null
  encoder: null
  samples: 0
  free_running: false
  keywords:
  - Skarn
  holdout: null
  nli: null
  show_forget: false
  out: runs/two
"""

OF_0_1 = {
    "gradient": (
        GRADIENT_OF_0_1,
        AdaptiveRMU(alpha=300.0, beta=3.0, norm="token"),
        RunConfig.of(
            model="org/model-7b",
            revision="main",
            forget=("bio.jsonl", "cyber.jsonl"),
            retain="wiki.txt",
            layer=7,
            train_layers=(5, 7),
            steps=80,
            accumulate=2,
            max_length=(512, 768, 256),
            lr=1e-4,
            seed=3,
            forget_questions=Path("questions.csv"),
            out=Path("runs/one"),
        ),
    ),
    "ridge": (
        RIDGE_OF_0_1,
        LUNAR(),
        RunConfig.of(
            model="builtin",
            threads=1,
            positions="differing",
            on=Path("runs/one"),
            layer=8,
            solver="ridge",
            lam=0.01,
            batch_size=8,
            max_length=(128,),
            limit=40,
            keywords=("Skarn",),
            out=Path("runs/two"),
        ),
    ),
}


@pytest.mark.parametrize(("written", "method", "config"), OF_0_1.values(), ids=OF_0_1)
def test_a_config_of_lethe_0_1_is_read(written: str, method: Any, config: RunConfig, tmp_path: Path) -> None:
    found = read_config(write(tmp_path, written))
    assert found == (method, config)
    assert read_config(write(tmp_path, plain(*found))) == found


@pytest.mark.parametrize(("written", "method", "config"), OF_0_1.values(), ids=OF_0_1)
def test_a_config_of_lethe_0_1_as_published_is_read_as_it_was_run(
    written: str, method: Any, config: RunConfig, tmp_path: Path
) -> None:
    """It has the settings that were given, and those that overrode them were set in the code."""
    published = written.replace("as_published: false", "as_published: true")
    found, settings = read_config(write(tmp_path, published))
    assert (found, settings) == (method, config.changed(as_published=True))
    assert settings.data.raw_lines
    assert settings.batching.lengths(2) == (512, 768, 512)
    assert (settings.batching.count, settings.batching.positions) == ("all-tokens", "all")
    assert (settings.batching.padding_side, settings.batching.shuffle) == ("left", False)
    assert (settings.batching.batch_size, settings.seed) == (config.batching.batch_size, config.seed)
    if isinstance(settings.solver, Gradient):
        assert settings.solver == Gradient(steps=80, accumulate=2, lr=1e-4, fp32_masters=False)
    else:
        assert settings.solver == Ridge(lam=0.01)


def test_a_config_of_lethe_0_1_by_hand_has_the_defaults(tmp_path: Path) -> None:
    written = "format: 1\nmethod: {name: rmu}\nrun: {model: m, lr: 5e-5, forget: a.jsonl, max_length: 64}\n"
    assert read_config(write(tmp_path, written)) == (
        RMU(),
        RunConfig.of(model="m", lr=5e-5, forget=("a.jsonl",), max_length=(64,)),
    )


def test_a_config_of_lethe_0_1_without_a_model(tmp_path: Path) -> None:
    path = write(tmp_path, "format: 1\nmethod: {name: rmu}\nrun: {steps: 3}\n")
    assert refusal(path).startswith(f"{path}: ")
    assert "'model'" in refusal(path)


def test_what_suits_the_built_in_model_are_settings_of_a_run() -> None:
    assert RunConfig.of(model="builtin", **Builtin.suits).layer == 5


def test_as_published_is_written_as_it_is_run() -> None:
    method = AdaptiveRMU(norm="token", direction="gaussian", beta=3.0)
    published = plain(method, RunConfig.of(model="m", as_published=True))["method"]
    assert (published["norm"], published["direction"], published["beta"]) == ("first-batch", "uniform", 3.0)
    assert plain(method, RunConfig.of(model="m"))["method"]["norm"] == "token"
