"""The names that `import lethe` promises, and that it promises them without importing what they need."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lethe

PUBLIC = [
    "LUNAR",
    "RMU",
    "RSV",
    "Activation",
    "AdaptiveRMU",
    "Analysis",
    "Batch",
    "Combination",
    "CorpusError",
    "DivergedError",
    "EmptyBatchError",
    "EvalSet",
    "Evaluation",
    "Finetune",
    "GradDiff",
    "Gradient",
    "InvalidLayerError",
    "InvalidValueError",
    "LayerSlice",
    "LetheError",
    "LoadedModel",
    "Method",
    "Metric",
    "ModelError",
    "OutOfMemoryError",
    "Patch",
    "PatchError",
    "Question",
    "QuestionError",
    "ReplayError",
    "Result",
    "Ridge",
    "RunConfig",
    "RunFolderError",
    "SaveError",
    "Scores",
    "Solver",
    "SteeringMethod",
    "Suite",
    "Sweep",
    "TokenMethod",
    "TokenView",
    "UnknownModuleError",
    "UnknownNameError",
    "UsageError",
    "check",
    "compare",
    "evaluate",
    "load_model",
    "load_tokenizer",
    "read_scores",
    "sweep",
    "unlearn",
]


def test_the_public_names_are_these() -> None:
    assert lethe.__all__ == PUBLIC
    assert lethe.__version__ == "0.1.0"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(lethe, name)
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"
    if inspect.isclass(thing):
        members = [member for key, member in vars(thing).items() if not key.startswith("_") and callable(member)]
        assert all(inspect.getdoc(member) for member in members if inspect.isfunction(member))


def test_nothing_else_of_the_package_looks_public() -> None:
    """A name imported into the package but left out of `__all__` would be one by accident."""
    for name in PUBLIC:
        getattr(lethe, name)
    found = {name for name, thing in vars(lethe).items() if not name.startswith("_") and not inspect.ismodule(thing)}
    assert found == set(PUBLIC)
    assert set(PUBLIC) <= set(dir(lethe))
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = lethe.unlern  # type: ignore[attr-defined]


def test_type_checkers_see_what_is_there() -> None:
    """What the face imports for type checkers only is what it gives when it is asked."""
    tree = ast.parse(Path(lethe.__file__).read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {}
    for node in branch.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {name.asname or name.name: (str(node.module), name.name) for name in node.names}
    assert sorted(seen) == sorted(PUBLIC)
    for name, (module, own) in seen.items():
        assert getattr(lethe, name) is getattr(importlib.import_module(module), own), name


def test_importing_the_package_imports_no_torch() -> None:
    code = "import lethe, sys; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(); lethe.RMU; "
    subprocess.run([sys.executable, "-c", f"{code}assert 'torch' in sys.modules"], check=True, timeout=120)
