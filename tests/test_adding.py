"""Each whole example of docs/adding.md, loaded from a file as a reader would write it, and used."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lethe.evaluation.measure import measure
from lethe.inference.reading import Reading
from lethe.metrics.protocol import Metric
from lethe.types import Question
from rigged_models import bigram, chain, forget_set

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding.md"


def example(heading: str, folder: Path) -> ModuleType:
    """The first Python block under a heading, as a module."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None, f"no Python under {heading}"
    name = f"example_{heading.lower().replace(' ', '_')}"
    path = folder / f"{name}.py"
    path.write_text(block[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metric_module(tmp_path: Path) -> ModuleType:
    return example("A metric", tmp_path)


def test_the_metric_measures_what_it_says(metric_module: ModuleType) -> None:
    model = bigram(chain(["1", "ĠA", "n", "a", "</s>"]))
    data = forget_set(questions=(Question(prompt="is 1", answer="x"), Question(prompt="who is 1", answer="y")))
    metric = metric_module.AnswerLength()
    assert isinstance(metric, Metric)
    scores = metric(Reading(model, data))
    assert (scores.value, scores.n, scores.better) == (3.0, 2, "neither")
    assert metric(Reading(model, forget_set(texts=("a",)))) is None
    found = measure(model, [data], [metric_module.AnswerLength(most=2)])
    assert found.keys() == {"answer_length/forget"}
    assert (found["answer_length/forget"].value, found["answer_length/forget"].label) == (2.0, "length of answers")
