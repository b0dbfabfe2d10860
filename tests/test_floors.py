"""Imports point down: every module of the package stands on a floor and imports from lower floors only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lethe

ROOT = Path(lethe.__file__).parent

FLOORS = (
    ("types", "progress", "__version__"),
    ("decoder", "directions", "environment", "losses", "membership", "recovery", "refusals", "resemblance", "saving",
     "significance", "textfiles", "tokens", "weights"),
    # report reads run folders only, so it needs nothing of what wrote them.
    ("checkpoint", "corpora", "diff", "history", "kept_text", "keywords", "ngrams", "patch", "pretrained", "prompts",
     "questions", "report", "score_cache", "slice"),
    ("exams", "folder", "own_data", "protocols", "recordings", "sharing", "suites", "sweep_folder"),
    ("data_check", "data_rank", "methods", "moments", "scoring", "solvers", "starts"),
    ("embedding", "exam_sources", "kept", "likelihood", "pooled", "prefix", "requests", "ridge"),
    ("choices", "harness"),
    ("config", "marks", "metrics", "world"),
    ("calibrate", "grid", "measured", "sources"),
    ("closed_form", "compare", "evalsets", "outcomes", "readings"),
    ("bench", "edits", "evaluate", "plan", "sweep_spec", "target"),
    ("advise", "analysis", "layer_search", "measure_target"),
    ("analyses", "run"),
    ("cell_group",),
    ("halving", "ray_engine", "search"),
    ("sweep", "sweep_report", "tables"),
    ("commands",),
    ("command_analyze", "command_compare", "command_data", "command_eval", "command_files", "command_layers",
     "command_sweep"),
    ("cli",),
)  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
EQUALS = ("methods", "metrics", "analyses")
"""Folders whose files know nothing of each other."""
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported(module: Path) -> Iterator[str]:
    """What a module imports from the package, wherever it does so: `slice`, `report.folder`."""
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.removeprefix("lethe.") for name in node.names if name.name.startswith("lethe."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            if node.module == "lethe":
                yield from (name.name for name in node.names)
            elif (node.module or "").startswith("lethe."):
                yield str(node.module).removeprefix("lethe.")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_imports_from_lower_floors_only(module: Path) -> None:
    name = module.parts[0].removesuffix(".py")
    assert name in FLOOR, f"{name} stands on no floor: add it to FLOORS"
    for path in imported(module):
        other = path.partition(".")[0]
        assert other in FLOOR, f"{module} imports {path}, which is not a module"
        if other == name:
            assert name not in EQUALS, f"{module} imports {path}, a file of the same folder"
        else:
            assert FLOOR[other] < FLOOR[name], f"{module} (floor {FLOOR[name]}) imports {path} (floor {FLOOR[other]})"


def test_every_name_on_a_floor_is_a_module() -> None:
    assert set(FLOOR) - {"__version__"} == {module.parts[0].removesuffix(".py") for module in MODULES}
