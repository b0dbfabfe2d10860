"""The names that `import lethe` promises."""

import inspect

import pytest

import lethe

PUBLIC = [
    "LUNAR",
    "RMU",
    "RSV",
    "Activation",
    "AdaptiveRMU",
    "Batch",
    "EvalSet",
    "Gradient",
    "LayerSlice",
    "LetheError",
    "LoadedModel",
    "Metric",
    "Patch",
    "Question",
    "Result",
    "RunConfig",
    "Scores",
    "SteeringMethod",
    "load_model",
    "load_tokenizer",
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
    found = {name for name, thing in vars(lethe).items() if not name.startswith("_") and not inspect.ismodule(thing)}
    assert found == set(PUBLIC)
