"""Imports point down: the rooms of the package stand on the floors that docs/architecture.md draws."""

import ast
import graphlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lethe

ROOT = Path(lethe.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
DRAWN = {int(number): names.split() for number, names in re.findall(r"^    (\d)  (.+)$", PAGE, re.MULTILINE)}
FLOOR = {name.strip("*"): number for number, names in DRAWN.items() for name in names}
SHELVES = {name.strip("*") for names in DRAWN.values() for name in names if name.endswith("*")}
FACE = "__init__"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(f".{FACE}"): path for path in ROOT.rglob("*.py")
}
OWED = {
    ("evaluation.eval_sets", "runs.config"),
    ("evaluation.measure", "runs.sharing"),
    ("evaluation.measure_target", "runs.model_or_run"),
    ("runs.unlearn", "advice.layer_search"),
    ("solvers.ridge", "runs.config"),
    ("solvers.ridge", "runs.sharing"),
}
"""Imports that still run up."""
SHARED = {"protocol", "directions", "workbench"}
"""Files of a shelf that the others stand on."""


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, wherever it does so: `model.slice`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("lethe.") for name in node.names if name.name.startswith("lethe."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            if f"{node.module}.".startswith("lethe."):
                module = str(node.module).removeprefix("lethe").removeprefix(".")
                for name in node.names:
                    inner = f"{module}.{name.name}".removeprefix(".")
                    yield inner if inner in FILES else module


def room(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_from_lower_floors_only(module: str) -> None:
    if module == FACE:
        return
    assert room(module) in FLOOR, f"{module} stands on no floor: add its room to docs/architecture.md"
    for other in imported(FILES[module]):
        assert other, f"{module} imports from the package's face, which stands on top of it"
        if room(other) != room(module) and (module, other) not in OWED:
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}, which stands no lower"


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_inside_a_room_no_circle(name: str) -> None:
    inside = {
        module: {other for other in imported(FILES[module]) if room(other) == name and other != module}
        for module in FILES
        if room(module) == name
    }
    graphlib.TopologicalSorter(inside).prepare()


@pytest.mark.parametrize("module", sorted(m for m in FILES if room(m) in SHELVES and "." in m))
def test_files_of_a_shelf_of_plug_ins_know_nothing_of_each_other(module: str) -> None:
    if room(module) in ("solvers", "suites") or module.split(".")[1] in SHARED:
        return
    for other in imported(FILES[module]):
        name = other.partition(".")[2]
        if room(other) == room(module):
            assert name.startswith("_") or name in SHARED, f"{module} imports {other}, a file of the same shelf"


def test_every_room_on_the_page_is_there_and_no_other() -> None:
    assert set(FLOOR) == {room(module) for module in FILES} - {FACE}


@pytest.mark.parametrize("name", sorted(name for name in FLOOR if (ROOT / name).is_dir()))
def test_a_room_says_what_the_page_says(name: str) -> None:
    line = re.search(rf"^- `{name}`: (.+)$", PAGE, re.MULTILINE)
    assert line is not None, f"docs/architecture.md has no line for {name}"
    assert importlib.import_module(f"lethe.{name}").__doc__ == line[1]
