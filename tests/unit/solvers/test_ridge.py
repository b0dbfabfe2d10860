"""Runs in closed form: their folders, requests on top of requests, and requests that are taken back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe import LUNAR, RMU, RSV, Result, RunConfig, unlearn
from lethe.errors import (
    CorpusError,
    InvalidValueError,
    LetheError,
    RunFolderError,
    UnknownModuleError,
    UnknownNameError,
    UsageError,
)
from lethe.evaluation import eval_sets
from lethe.model.checkpoint_files import checkpoint_files, read_tensor
from lethe.model.loading import load_tokenizer
from lethe.model.patch import Patch
from lethe.runs import inputs
from lethe.runs.run_folder import RunFolder
from lethe.solvers import request_sums
from lethe.solvers.ridge import solve_requests

NAME = "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lethe.evaluation.measure.REFERENCES", 8)
        patched.setattr(eval_sets, "TEXTS", 2)
        yield


def settings(out: Path, **changes: Any) -> RunConfig:
    small: dict[str, Any] = {
        "layer": 3,
        "batch_size": 50,
        "max_length": (64,),
        "limit": 2,
        "solver": "ridge",
        "evaluate": "none",
    }
    if changes.get("solver", "ridge") == "ridge":
        small["lam"] = 0.01
    return RunConfig.of(**{"model": "builtin", "out": out} | small | changes)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A request to forget one topic."""
    return unlearn(LUNAR(alpha=30.0), settings(tmp_path_factory.mktemp("r") / "one", forget=("builtin:pathogens",)))


@pytest.fixture(scope="module")
def second(first: Result) -> Result:
    """A request to forget another, on top of the first."""
    out = first.folder.parent / "two"
    config = settings(out, forget=("builtin:exploits",), on=first.folder, evaluate="all")
    return unlearn(LUNAR(alpha=30.0), config)


def delta(result: Result | Patch) -> torch.Tensor:
    patch = result if isinstance(result, Patch) else result.patch
    files = checkpoint_files(inputs.model_source("builtin"))
    return patch.tensors[NAME].double() - read_tensor(files, NAME).double()


def solved(folder: Path, *names: str) -> torch.Tensor:
    held = [request for request in request_sums.load(RunFolder(folder).sums) if request.name in names]
    return solve_requests(held, NAME, 30.0, 0.01)[0]


def test_the_folder_holds_sums_and_no_history(first: Result) -> None:
    assert {file.name for file in first.folder.iterdir()} == {
        "config.yaml", "environment.json", "patch.safetensors", "per_example.json",
        "report.html", "report.json", "report.md", "sums.safetensors",
    }  # fmt: skip
    report = json.loads((first.folder / "report.json").read_text())
    assert report["history"] == []
    assert report["reference_refusal_rate"] >= 0.9
    (facts,) = report["solution"]
    assert (facts["matrix"], facts["solver"], facts["lam"], facts["forget_tokens"]) == (NAME, "ridge", 0.01, 150)
    assert facts["objective"] < facts["before"]
    assert "objective after" in (first.folder / "report.html").read_text()


def test_the_edit_of_one_topic_has_rank_one(first: Result) -> None:
    values = torch.linalg.svdvals(solved(first.folder, "one"))
    assert values[1] < 1e-9 * values[0]
    # In the checkpoint's fp16 the rest is rounding.
    kept = torch.linalg.svdvals(delta(first))
    assert kept[1] < 0.05 * kept[0]


def test_only_the_named_matrix_is_edited(first: Result) -> None:
    assert list(first.patch.tensors) == [NAME]


def test_two_requests_are_the_solution_for_both(second: Result, tmp_path: Path) -> None:
    both = unlearn(LUNAR(alpha=30.0), settings(tmp_path / "both"))
    torch.testing.assert_close(solved(second.folder, "one", "two"), solved(both.folder, "both"), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(delta(second), delta(both), rtol=0, atol=2e-3)


def test_the_first_request_is_still_measured(second: Result, first: Result) -> None:
    assert {"exact_match/earlier", "exact_match/forget", "exact_match/retain"} <= second.after.keys()
    report = json.loads((second.folder / "report.json").read_text())
    assert report["before"].keys() == report["after"].keys()
    config = settings(first.folder.parent / "x", forget=("builtin:pathogens",))
    corpora = inputs.read(config.data, "texts", config.base.model, load_tokenizer(inputs.model_source("builtin")))
    own = eval_sets.sets(config.base.model, config.data, config.evaluation, corpora)[0]
    assert {question.topic for question in own.questions} == {"pathogens"}


def test_what_is_measured_before_is_what_the_first_request_left(second: Result, first: Result) -> None:
    # The base has not moved at all; the first request's edit has.
    assert second.before["cosine_to_frozen/earlier"].value < 1


def test_a_withdrawn_request_was_never_made(second: Result, tmp_path: Path) -> None:
    config = settings(tmp_path / "rest", forget=("builtin:exploits",), on=second.folder, withdraw="one")
    rest = unlearn(LUNAR(alpha=30.0), config)
    alone = unlearn(LUNAR(alpha=30.0), settings(tmp_path / "alone", forget=("builtin:exploits",)))
    assert [request.name for request in request_sums.load(RunFolder(rest.folder).sums)] == ["two"]
    torch.testing.assert_close(solved(rest.folder, "two"), solved(alone.folder, "alone"), rtol=1e-9, atol=1e-12)
    assert torch.equal(rest.patch.tensors[NAME], alone.patch.tensors[NAME])


def test_withdrawing_holds_with_a_lambda_chosen_anew(tmp_path: Path) -> None:
    common: dict[str, Any] = {"lam": None, "batch_size": 25}
    one = unlearn(RSV(alpha=3.0), settings(tmp_path / "one", forget=("builtin:pathogens",), max_length=(24,), **common))
    two = unlearn(
        RSV(alpha=3.0),
        settings(tmp_path / "two", forget=("builtin:exploits",), max_length=(24,), on=one.folder, **common),
    )
    rest = unlearn(
        RSV(alpha=3.0),
        settings(tmp_path / "rest", max_length=(24,), on=two.folder, withdraw="two", **common),
    )
    assert torch.equal(rest.patch.tensors[NAME], one.patch.tensors[NAME])


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"withdraw": "three"}, UnknownNameError, "no request 'three' to withdraw.\nThe run holds one, two"),
        ({"layer": 2}, UsageError, "request 'one' edits model.layers.3"),
        ({"out": "two"}, UsageError, "there is a request 'two' already"),
        ({"solver": "pooled"}, UsageError, "--solver pooled has no sums"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    second: Result, tmp_path: Path, changes: dict[str, Any], error: type[LetheError], said: str
) -> None:
    changes = {**changes, "out": tmp_path / changes.get("out", "new")}
    config = settings(tmp_path / "new", forget=("builtin:exploits",), on=second.folder)
    with pytest.raises(error, match=said):
        unlearn(LUNAR(alpha=30.0), config.changed(**changes))
    assert not changes["out"].exists()


def test_the_only_request_is_not_withdrawn(first: Result, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'one' is the only request"):
        unlearn(LUNAR(), settings(tmp_path / "none", on=first.folder, withdraw="one"))


def test_a_run_without_sums_takes_no_request(first: Result, tmp_path: Path) -> None:
    config = settings(tmp_path / "plain", forget=("builtin:pathogens",), keep_sums=False)
    plain = unlearn(LUNAR(alpha=30.0), config)
    assert not (plain.folder / "sums.safetensors").exists()
    # Conjugate gradients find what Cholesky's factorisation finds.
    torch.testing.assert_close(delta(plain), delta(first), rtol=0, atol=2e-3)
    with pytest.raises(RunFolderError, match="kept no sums"):
        unlearn(LUNAR(), settings(tmp_path / "next", on=plain.folder))


def test_a_run_of_another_model_takes_no_request(first: Result, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"edited builtin, not .*other"):
        unlearn(RMU(), settings(tmp_path / "next", model=str(foreign(tmp_path)), on=first.folder, forget=("f",)))


def foreign(folder: Path) -> Path:
    """A second copy of the built-in model under another name."""
    import shutil

    return Path(shutil.copytree(inputs.model_source("builtin"), folder / "other"))


def test_a_damaged_file_of_sums_is_named(first: Result, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(first.folder, tmp_path / "broken"))
    RunFolder(broken).sums.write_bytes(b"no safetensors")
    with pytest.raises(RunFolderError, match=r"sums\.safetensors is damaged"):
        unlearn(LUNAR(), settings(tmp_path / "next", on=broken))


def test_a_gradient_request_starts_where_the_first_one_ended(first: Result, tmp_path: Path) -> None:
    config = settings(
        tmp_path / "next",
        solver="gradient",
        on=first.folder,
        steps=2,
        batch_size=2,
        train_layers=(3,),
        lr=1e-9,
    )
    found = unlearn(RMU(alpha=1.0), config)
    torch.testing.assert_close(found.patch.tensors[NAME], first.patch.tensors[NAME], rtol=0, atol=1e-3)
    assert found.patch.base_hashes == first.patch.base_hashes


def test_a_gradient_request_keeps_what_the_first_one_changed_elsewhere(first: Result, tmp_path: Path) -> None:
    config = settings(tmp_path / "next", solver="gradient", on=first.folder, layer=1, steps=2, batch_size=2, lr=1e-2)
    found = unlearn(RMU(alpha=1.0), config)
    assert len(found.patch.tensors) == 3
    assert torch.equal(found.patch.tensors[NAME], first.patch.tensors[NAME])


def test_several_layers_are_solved_each_on_the_untouched_model(first: Result, tmp_path: Path) -> None:
    config = settings(tmp_path / "deep", forget=("builtin:pathogens",), layer=4, train_layers=(3, 4))
    found = unlearn(LUNAR(alpha=30.0), config)
    assert list(found.patch.tensors) == [NAME, NAME.replace("3", "4")]
    assert torch.equal(found.patch.tensors[NAME], first.patch.tensors[NAME])


def test_the_published_recipe_runs_on_pooled_rows(tmp_path: Path) -> None:
    found = unlearn(LUNAR(), settings(tmp_path / "pooled", forget=("builtin:pathogens",), solver="pooled"))
    (facts,) = json.loads((found.folder / "report.json").read_text())["solution"]
    assert len(facts["losses"]) == 20
    assert facts["losses"][-1] < facts["losses"][0]


@pytest.mark.parametrize(
    ("method", "changes", "error", "said"),
    [
        (RMU(nu=0.1), {}, UsageError, "'nu' must be 0 for --solver ridge"),
        (RMU(), {"as_published": True}, UsageError, "--as-published repeats"),
        (LUNAR(), {"positions": "last", "reference": "missing.jsonl"}, CorpusError, "no prompts missing.jsonl"),
        (RMU(), {"train_modules": ("mlp.up_proj",)}, UnknownModuleError, "no closed form is known"),
    ],
)
def test_what_has_no_closed_form_is_refused(
    tmp_path: Path, method: Any, changes: dict[str, Any], error: type[LetheError], said: str
) -> None:
    with pytest.raises(error, match=said):
        unlearn(method, settings(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_a_lambda_of_zero_needs_enough_tokens(tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"question": f"Q: What is the {name} of Skarn {i}? A:"}) + "\n" for i in range(3))
        )
    config = settings(
        tmp_path / "new", forget=(str(tmp_path / "forget.jsonl"),), retain=str(tmp_path / "retain.jsonl"), lam=0.0
    )
    with pytest.raises(InvalidValueError, match=r"singular with lam 0: .*\nSet --lam to a positive number"):
        unlearn(LUNAR(alpha=1.0), config)
    assert not (tmp_path / "new").exists()


def test_a_model_that_never_refuses_has_no_direction(foreign_model: Path, tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"What is {name}?", "answer": "x"}) + "\n")
    config = settings(
        tmp_path / "new",
        model=str(foreign_model),
        forget=(str(tmp_path / "forget.jsonl"),),
        retain=str(tmp_path / "retain.jsonl"),
    )
    with pytest.raises(UsageError, match="the model refuses 0 % of 8 reference prompts"):
        unlearn(LUNAR(), config)
    assert not (tmp_path / "new").exists()


def test_forget_and_reference_prompts_must_differ(tmp_path: Path) -> None:
    (tmp_path / "same.jsonl").write_text(json.dumps({"question": "Q: Who is Skarn? A:"}) + "\n")
    same = str(tmp_path / "same.jsonl")
    with pytest.raises(CorpusError, match="1 of 1 forget prompts of 'same' stand among the reference prompts too"):
        unlearn(LUNAR(), settings(tmp_path / "new", forget=(same,), reference=same))
