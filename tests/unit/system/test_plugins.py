"""Shelves of plug-ins: what their files say is what importing them gives, and a file of one's own is a shelf, too."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import pytest
from typing_extensions import Doc

from lethe import analyses, methods, metrics, solvers, suites
from lethe.errors import InvalidValueError, UnknownNameError, UsageError
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.solvers import optimizers
from lethe.system.plugins import catalogue, discover, load, look_up, name_of, real, summary

SHELVES = (methods, metrics, analyses, suites, solvers, optimizers)
PLUG_INS = [(shelf, name, kind) for shelf in SHELVES for name, kind in discover(shelf).items()]
SHRINK = '''
from dataclasses import dataclass
from typing import ClassVar

import lethe

@dataclass(frozen=True, kw_only=True)
class Shrink(lethe.SteeringMethod):
    """Steer forget activations towards zero."""

    source: ClassVar[str] = "a test"

    keep: float = 0.1
    """Share that stays."""

    def forget_target(self, frozen, state):
        return self.keep * frozen.h

@dataclass(frozen=True, kw_only=True)
class NoSource(lethe.SteeringMethod):
    """Says not where it comes from."""

@dataclass(frozen=True, kw_only=True)
class Stranger:
    """Is of no family."""

    source: ClassVar[str] = "a test"

@dataclass(frozen=True, kw_only=True)
class Demanding(lethe.SteeringMethod):
    """Has to be told."""

    source: ClassVar[str] = "a test"
    length: float

class Plain:
    """Has no settings."""
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a file of one's own; what is run there is forgotten again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SHRINK)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.endswith(".py"):
            del sys.modules[name]


def facts(kind: type) -> dict[str, Any]:
    """Class-level values of a plug-in that are no settings and no behaviour."""
    settings = {field.name for field in dataclasses.fields(kind)}
    named = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    return {name: getattr(kind, name) for name in named - settings if hasattr(kind, name)}


@pytest.mark.parametrize("shelf", SHELVES, ids=lambda shelf: shelf.__name__)
def test_the_catalogue_has_the_names_that_importing_finds(shelf: ModuleType) -> None:
    assert list(catalogue(shelf)) == list(discover(shelf))


@pytest.mark.parametrize(("shelf", "name", "kind"), PLUG_INS, ids=[name for _, name, _ in PLUG_INS])
def test_a_stand_in_says_what_the_plug_in_says(shelf: ModuleType, name: str, kind: type) -> None:
    stand_in = catalogue(shelf)[name]
    assert (stand_in.__name__, stand_in.__module__) == (kind.__name__, kind.__module__)
    assert (summary(stand_in), name_of(stand_in)) == (summary(kind), name)
    assert facts(kind).items() <= vars(stand_in).items()
    assert real(stand_in) is kind
    stated, settings = dataclasses.fields(stand_in), dataclasses.fields(kind)
    assert [field.name for field in stated] == [field.name for field in settings]
    for ours, theirs in zip(stated, settings, strict=True):
        is_told = get_origin(ours.type) is Annotated
        assert (get_args(ours.type)[0] if is_told else ours.type) == theirs.type, ours.name
        assert (ours.default, ours.default_factory) == (theirs.default, theirs.default_factory), ours.name
        assert not is_told or isinstance(get_args(ours.type)[1], Doc)
    assert vars(stand_in()) == vars(kind())


def test_what_a_setting_means_is_told() -> None:
    told = {
        field.name: get_args(field.type)[1].documentation for field in dataclasses.fields(catalogue(methods)["rmu"])
    }
    assert told["steering_coeff"].startswith("Length c of the forget target, in the units of the activation;")
    assert told["nu"].startswith("RNA (random noise augmentation, arXiv 2501.19202): standard deviation")


@pytest.mark.parametrize("name", ["rmu", "RMU", "adaptive_rmu", "Adaptive-RMU"])
def test_a_name_may_be_spelt_either_way(name: str) -> None:
    assert load(name, methods) is discover(methods)[name.lower().replace("_", "-")]
    assert not issubclass(look_up(name, methods), SteeringMethod)


@pytest.mark.parametrize(
    ("name", "shelf", "text"),
    [
        (
            "rnu",
            methods,
            "there is no method 'rnu'. Did you mean 'rmu'?\n"
            "Methods: adaptive-rmu, finetune, grad-diff, lunar, rmu, rsv. See `lethe ls methods`.",
        ),
        ("alingment", analyses, "there is no analysis 'alingment'. Did you mean 'alignment'?\nAnalyses: accuracy, al"),
        (
            "tofo",
            suites,
            "there is no suite 'tofo'. Did you mean 'tofu'?\nSuites: builtin, muse, tofu. See `lethe ls suites`.",
        ),
        (
            "adamv",
            optimizers,
            "there is no optimizer 'adamv'. Did you mean 'adamw'?\n"
            "Optimizers: adamw, muon, sgd. See `lethe ls optimizers`.",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name: str, shelf: ModuleType, text: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        load(name, shelf)
    assert str(error.value).startswith(text)


def test_words_beside_names_are_offered_too() -> None:
    with pytest.raises(UnknownNameError, match=r"(?s)Did you mean 'all'\?.*token-gradient, all\."):
        look_up("alll", analyses, also=["all"])


# A file of one's own


def test_a_class_of_a_file_is_a_plug_in(here: Path) -> None:
    kind = load("own.py:Shrink", methods)
    assert kind(keep=0.5).keep == 0.5
    assert issubclass(kind, SteeringMethod)
    assert name_of(kind) == "own.py:Shrink"
    assert load("own.py:Shrink", methods) is kind, "a file is run once"
    assert real(kind) is kind
    with pytest.raises(InvalidValueError):
        kind(alpha=-1.0)


def test_a_file_alone_will_do_if_it_holds_one(here: Path) -> None:
    (here / "one.py").write_text(
        "from lethe.methods.rmu import RMU\n" + SHRINK.partition("@dataclass(frozen=True, kw_only=True)\nclass NoS")[0]
    )
    assert load("one.py", methods).__name__ == "Shrink"
    (here / "two.py").write_text((here / "one.py").read_text() + "\n\nclass Other(Shrink):\n    pass\n")
    with pytest.raises(UsageError, match=r"^two.py does not hold exactly one method, but 2 \(Shrink, Other\)\."):
        load("two.py", methods)
    (here / "none.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match=r"^none.py does not hold exactly one method, but 0 \(no class\)\."):
        load("none.py", methods)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "owm.py:Shrink",
            "there is no file owm.py. Did you mean 'own.py'?\nName one that is there, relative to the cur",
        ),
        ("own.py:Shrimk", "own.py defines no class 'Shrimk'. Did you mean 'Shrink'?\nIt defines Shrink, NoSource, Str"),
        ("own.py:RMU", "own.py defines no class 'RMU'."),
        ("own.py:NoSource", "own.py:NoSource is no method: it has no `source`, the paper or code that it comes from."),
        ("own.py:Stranger", "own.py:Stranger is no method: it does not derive from Method."),
        ("own.py:Demanding", "own.py:Demanding is no method: its setting 'length' has no default."),
        ("own.py:Plain", "own.py:Plain is no method: it is no dataclass."),
        ("bad.py:Shrink", "bad.py cannot be run: ZeroDivisionError: division by zero.\nMend the file."),
        ("cut.py:Shrink", "cut.py cannot be run: SyntaxError: "),
    ],
)
def test_what_is_no_plug_in_is_told(name: str, text: str, here: Path) -> None:
    (here / "bad.py").write_text("1 / 0\n")
    (here / "cut.py").write_text("class\n")
    for _ in range(2):
        with pytest.raises(UsageError) as error:
            load(name, methods)
        assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("shelf", "lacks"),
    [
        (
            metrics,
            "it lacks needs, higher_means, unit, chance, label, hint, __call__; "
            "or it lacks needs, higher_means, unit, chance, label, hint, combine",
        ),
        (suites, "it lacks data, split, sets"),
        (analyses, "it lacks __call__"),
    ],
)
def test_what_a_class_lacks_is_named(shelf: ModuleType, lacks: str, here: Path) -> None:
    with pytest.raises(UsageError) as error:
        load("own.py:Stranger", shelf)
    assert f": {lacks}.\nSee docs/adding.md." in str(error.value)


@pytest.mark.parametrize("shelf", [methods, metrics, analyses, suites], ids=lambda shelf: shelf.__name__)
def test_everything_on_a_shelf_would_pass_as_a_file_of_ones_own(shelf: ModuleType, monkeypatch: Any) -> None:
    for kind in discover(shelf).values():
        path = str(sys.modules[kind.__module__].__file__)
        assert load(f"{path}:{kind.__name__}", shelf).__name__ == kind.__name__
        del sys.modules[path]


def test_another_file_of_the_same_name_is_another(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("own.py:Shrink", methods)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "own.py").write_text(SHRINK)
    monkeypatch.chdir(tmp_path / "else")
    assert load("own.py:Shrink", methods) is not first


def test_a_class_of_the_shelf_is_its_own(here: Path) -> None:
    assert real(RMU) is RMU
