"""Each whole example of docs/adding.md, loaded from a file as a reader would write it, and used."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lethe.analyses.protocol import Analysis
from lethe.analyses.workbench import Bench
from lethe.evaluation.measure import measure
from lethe.inference.reading import Reading
from lethe.methods.rmu import RMU
from lethe.metrics.protocol import Metric
from lethe.model.patch import Patch
from lethe.runs.config import RunConfig
from lethe.runs.unlearn import unlearn
from lethe.suites.protocol import Suite
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


def quick(out: Path, **settings: object) -> RunConfig:
    return RunConfig.of(
        model="builtin", layer=3, batch_size=2, max_length=(32,), threads=1, evaluate="none", out=out, **settings
    )


def test_the_method_steers_to_the_opposite(tmp_path: Path) -> None:
    flip = example("A method", tmp_path).Flip(strength=0.5)
    history = unlearn(flip, quick(tmp_path / "run", steps=6, lr=1e-2)).history
    by_topic = [row.forget_loss for row in history if row.topic == history[0].topic]
    assert by_topic[-1] < by_topic[0]


def test_the_method_by_its_loss_lowers_it(tmp_path: Path) -> None:
    demote = example("A method by its loss", tmp_path).Demote(margin=1.0, alpha=0.0)
    history = unlearn(demote, quick(tmp_path / "run", steps=8, lr=3e-2)).history
    assert history[0].forget_loss == pytest.approx(1.0)
    assert history[-1].forget_loss < 0.9
    assert history[0].measures["too_likely"] == pytest.approx(1.0)


def test_the_solver_damps_what_would_be_trained(tmp_path: Path) -> None:
    damp = example("A solver", tmp_path).Damp(factor=0.25)
    out = tmp_path / "run"
    result = unlearn(RMU(), quick(out, solver=damp))
    assert result.history == ()
    bench = Bench(quick(tmp_path / "other"))
    patch = Patch.load(out / "patch.safetensors")
    base = dict(bench.model.named_parameters())
    assert patch.tensors
    assert all(torch.equal(new, 0.25 * base[name].to(new.dtype)) for name, new in patch.tensors.items())


def test_the_analysis_finds_larger_edits_for_stronger_pushes(tmp_path: Path) -> None:
    analysis = example("An analysis", tmp_path).EditSize(multiples=(0.5, 8.0))
    assert isinstance(analysis, Analysis)
    finding = analysis(Bench(quick(tmp_path / "run", steps=4, lr=1e-2)))
    base, weak, strong = (row["share"] for row in finding.data["models"])
    assert 0.0 == base < weak
    assert 0.0 < strong < 1.0
    assert finding.figure.axes


def test_the_suite_reads_its_files(tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        row = f'{{"question": "Which of {name}?", "choices": ["a", "b"], "answer": 1}}\n'
        (tmp_path / f"dev_{name}.jsonl").write_text(row)
    suite = example("A suite", tmp_path).Facts(split="dev")
    assert isinstance(suite, Suite)
    assert [(data.name, data.role, len(data.questions)) for data in suite.sets(tmp_path)] == [
        ("forget", "forget", 1),
        ("retain", "keep", 1),
    ]
