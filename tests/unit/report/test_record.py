"""A run's record: read as it was written, by this version and by the first one."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lethe.evaluation import results
from lethe.report.pages import write_report
from lethe.report.record import RunRecord, history_row, read_run, with_examples
from lethe.runs.run_folder import RunFolder
from lethe.system.atomic_files import as_json, write_json
from lethe.types import RUN_FORMAT

OLD = Path(__file__).parents[2] / "data" / "run-0.1.0"


@pytest.fixture
def old() -> RunRecord:
    return read_run(OLD)


def again(record: RunRecord) -> RunRecord:
    """The record as it comes back from a file."""
    return RunRecord.from_json(json.loads(as_json(record.to_json(), with_infinity=True)), Path(record.name, "report"))


def in_format_2(content: dict[str, Any]) -> dict[str, Any]:
    """A report of the first version with a step's measures in a mapping, and units and roles of scores."""
    roles = {"forget": "forget", "adjacent": "keep", "retain": "keep"}
    history = []
    for row in content["history"]:
        own = {name: row[name] for name in ("step", "topic", "forget_loss", "retain_loss", "seconds", "peak_mb")}
        rest = {name: row[name] for name in row if name not in {*own, "forget_norm", "retain_norm"}}
        norms = {f"{side}_norm_{name}": row[f"{side}_norm"][name]
                 for side in ("forget", "retain") for name in ("mean", "median", "max")}  # fmt: skip
        history.append(own | {"measures": norms | rest})
    new = content | {"format": 2, "history": history, "layer_search": None}
    for when in ("before", "after"):
        new[when] = {}
        for name, row in content[when].items():
            metric, _, data = name.partition("/")
            role = {"role": roles[data]} if data in roles else {}
            new[when][name] = row | role | {"unit": "share" if metric == "multiple_choice" else ""}
    return new


def test_a_run_of_the_first_version_is_read_whole(old: RunRecord) -> None:
    content: dict[str, Any] = json.loads((OLD / "report.json").read_text())
    assert content["format"] == 1
    assert RUN_FORMAT == 2
    written = json.loads(as_json(old.to_json()))
    assert written == in_format_2(content)
    assert (old.name, old.trained_layers, len(old.history)) == ("run-0.1.0", (0, 1, 2), 3)
    assert old.before["multiple_choice/forget"].chance == 0.25
    assert len(old.after["activation_norm/retain"].by_layer) == 12


def test_all_that_reads_runs_reads_one_of_the_first_version(old: RunRecord, tmp_path: Path) -> None:
    run = Path(shutil.copytree(OLD, tmp_path / "a"))
    assert write_report(run).read_text(encoding="utf-8").count("<figure>") > 5
    found = results.read(run)
    assert len(found.after["multiple_choice/forget"].per_example) == found.after["multiple_choice/forget"].n == 3
    assert found.before["perplexity/retain"] == old.before["perplexity/retain"]
    assert RunFolder(run).history(until=9) == list(old.history)


def test_what_is_written_comes_back(old: RunRecord) -> None:
    score = replace(old.after["perplexity/forget"], value=math.inf, stderr=-math.inf)
    row = replace(old.history[0], forget_loss=math.inf, measures={"target_norm": math.inf})
    odd = replace(old, after={"perplexity/forget": score}, history=(row,), reference_refusal_rate=0.5)
    assert again(odd) == odd


def test_values_by_question_come_back(old: RunRecord, tmp_path: Path) -> None:
    full = with_examples(old, OLD)
    write_json(tmp_path / "per_example.json", full.examples_to_json(), with_infinity=True)
    assert with_examples(old, tmp_path) == full != old
    assert with_examples(old, tmp_path / "nowhere") == old


def test_what_a_later_version_adds_is_left_out_and_what_it_may_lack_is_none(old: RunRecord) -> None:
    content = json.loads(as_json(old.to_json()))
    for place in (content, content["history"][0], content["before"]["perplexity/forget"], content["patch"],
                  content["method"], content["after"]["perplexity/forget"], content["timing"]["train"]):  # fmt: skip
        place["colour"] = "blue"
    for optional in ("measured_on", "solution", "reference_refusal_rate", "layer_search"):
        del content[optional]
    assert RunRecord.from_json(content, OLD / "report.json") == replace(old, measured_on={})


@pytest.mark.parametrize("wrong", [{"step": 1}, [], None, {"step": "one", "topic": "t"}])
def test_what_is_no_step_is_an_error(wrong: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        history_row(wrong)
