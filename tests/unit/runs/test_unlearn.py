"""Whole runs, small ones: what stands in the folder afterwards, and what does not."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lethe
from lethe import Activation, LayerSlice, Patch, Result, RunConfig, SteeringMethod, unlearn
from lethe.errors import DivergedError, OutOfMemoryError, RunFolderError, SaveError
from lethe.evaluation import eval_sets
from lethe.methods.directions import random_unit
from lethe.model.diff import diff
from lethe.runs.config_file import read_config
from lethe.solvers.gradient import Gradient
from lethe.suites import world
from lethe.suites.world import exam
from lethe.suites.world.generator import build
from lethe.system.progress import Progress
from lethe.types import State, Topic

METHOD = lethe.AdaptiveRMU(beta=2.0, alpha=10.0)
FILES = {
    "config.yaml",
    "history.jsonl",
    "patch.safetensors",
    "environment.json",
    "report.json",
    "report.html",
    "report.md",
    "per_example.json",
}
SETS = ("forget", "adjacent", "retain")


def settings(out: Path, **changes: Any) -> RunConfig:
    small: dict[str, Any] = {
        "layer": 3,
        "steps": 4,
        "batch_size": 2,
        "max_length": (32,),
        "lr": 1e-2,
        "limit": 4,
        "evaluate": "none",
    }
    return RunConfig.of(**{"model": "builtin", "out": out} | small | changes)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


class Ears(Progress):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.phases: list[list[Any]] = []
        self.warnings: list[str] = []

    def phase(self, name: str, total: int) -> None:
        self.phases.append([name, total, 0])

    def advance(self, note: str = "") -> None:
        self.phases[-1][2] += 1

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module", autouse=True)
def _few_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(eval_sets, "TEXTS", 4)
        yield


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same run without evaluation."""
    return unlearn(METHOD, settings(tmp_path_factory.mktemp("runs") / "unmeasured"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Ears]:
    """A run with everything in it, of the built-in model."""
    ears = Ears()
    out = tmp_path_factory.mktemp("runs") / "measured"
    return unlearn(METHOD, settings(out, evaluate="all"), command="lethe unlearn adaptive-rmu", progress=ears), ears


# The folder


def test_a_run_folder_holds_these_files(measured: tuple[Result, Ears]) -> None:
    assert files(measured[0].folder) == FILES


def test_the_report_has_what_others_read(measured: tuple[Result, Ears]) -> None:
    result, _ = measured
    found = report(result.folder)
    assert found["format"] == 2
    assert found["command"] == "lethe unlearn adaptive-rmu"
    assert found["model"] == "builtin"
    assert found["method"] == {
        "name": "adaptive-rmu",
        "source": METHOD.source,
        "fields": {
            "alpha": 10.0,
            "nu": 0.0,
            "noise": "target",
            "beta": 2.0,
            "norm": "first-batch",
            "direction": "uniform",
        },
    }
    assert found["config"]["steps"] == 4
    assert found["config"]["train_layers"] == [1, 2, 3]
    assert found["config"]["retain_questions"] is None
    assert list(found["timing"]) == ["load", "record", "train", "evaluate"]
    assert all(spent["seconds"] >= 0 and spent["peak_mb"] > 0 for spent in found["timing"].values())
    assert found["environment"] == json.loads((result.folder / "environment.json").read_text())
    assert {"lethe", "python", "torch", "transformers", "platform", "device", "threads"} <= set(found["environment"])
    assert found["history"] == [row.as_dict() for row in result.history]
    lines = (result.folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["history"]
    assert [row.step for row in result.history] == [0, 1, 2, 3]
    assert {row.topic for row in result.history} == set(exam.forget_texts())


def test_the_report_scores_every_set_before_and_after(measured: tuple[Result, Ears]) -> None:
    result, _ = measured
    found = report(result.folder)
    wanted = {f"{metric}/{name}" for metric in ("multiple_choice", "exact_match", "perplexity") for name in SETS}
    wanted |= {"exact_match/unknown", "answer_confidence/forget", "activation_norm/retain", "cosine_to_frozen/forget"}
    assert wanted <= found["before"].keys() == found["after"].keys()
    for score in (*found["before"].values(), *found["after"].values()):
        assert {"value", "stderr", "n", "better"} <= score.keys() <= {*score, "chance", "by_layer"}
    assert found["before"]["multiple_choice/retain"]["n"] == 4
    assert found["before"]["multiple_choice/retain"]["chance"] == 0.25
    assert found["before"]["cosine_to_frozen/forget"]["value"] == 1
    moved = found["after"]["cosine_to_frozen/forget"]["by_layer"]
    assert moved[0] == 1  # Layer 0 is below the first trained one.
    assert max(moved[1:]) < 1
    examples = json.loads((result.folder / "per_example.json").read_text())
    for side, scores in (("before", result.before), ("after", result.after)):
        assert {name: tuple(values) for name, values in examples[side].items()} == {
            name: score.per_example for name, score in scores.items()
        }
        assert {name: score.summary() for name, score in scores.items()} == found[side]


def test_the_report_names_the_patch_as_it_is(measured: tuple[Result, Ears]) -> None:
    result, _ = measured
    content = (result.folder / "patch.safetensors").read_bytes()
    stated = report(result.folder)["patch"]
    base = (world.MODEL_FOLDER / "model.safetensors").stat().st_size
    assert stated == {
        "file": "patch.safetensors",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "tensors": [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)],
        "share_of_model": len(content) / base,
    }
    patch = Patch.load(result.folder / "patch.safetensors")
    assert (patch.model, patch.method) == ("builtin", "adaptive-rmu")
    assert patch.config["run"]["layer"] == 3
    assert patch.versions == {key: report(result.folder)["environment"][key] for key in patch.versions}
    assert {"lethe", "torch", "transformers"} == patch.versions.keys()


def test_progress_hears_every_part_of_every_phase(measured: tuple[Result, Ears]) -> None:
    _, ears = measured
    assert ears.phases == [["unlearn", 4, 4], ["measure before and after", 8, 8]]


def test_config_yaml_repeats_the_run(measured: tuple[Result, Ears], tmp_path: Path) -> None:
    result, _ = measured
    method, config = read_config(result.folder / "config.yaml")
    assert (method, config) == (METHOD, settings(result.folder, evaluate="all"))
    again = unlearn(method, config.changed(evaluate="none", out=tmp_path / "again"))
    assert again.patch.tensors.keys() == result.patch.tensors.keys()
    assert all(torch.equal(again.patch.tensors[name], value) for name, value in result.patch.tensors.items())


# What must not stand in it


def forget_words() -> set[str]:
    """Names of what the built-in model is to forget, and the questions about it."""
    facts = build().facts("forget")
    return {fact.name for fact in facts} | {fact.exam_question() for fact in facts}


def leaked(folder: Path) -> set[str]:
    content = b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
    return {word for word in forget_words() if word.encode() in content}


def test_no_forget_text_is_written(measured: tuple[Result, Ears]) -> None:
    assert len(forget_words()) > 50
    assert not leaked(measured[0].folder)
    assert {row["set"] for row in report(measured[0].folder)["samples"]} == {"adjacent", "retain", "unknown"}


def test_forget_text_is_written_on_demand(tmp_path: Path) -> None:
    result = unlearn(METHOD, settings(tmp_path / "a", steps=2, evaluate="all", limit=1, show_forget=True))
    samples = report(result.folder)["samples"]
    assert [row["set"] for row in samples] == ["forget", "adjacent", "retain", "unknown"]
    assert leaked(result.folder)
    for file in FILES - {"report.json", "report.html"}:
        assert not any(word.encode() in (result.folder / file).read_bytes() for word in forget_words()), file


# The same again


def test_equal_runs_in_two_folders_give_equal_bytes(unmeasured: Result, tmp_path: Path) -> None:
    torch.manual_seed(1)
    for seed in (0, 1):
        unlearn(METHOD, settings(tmp_path / str(seed), seed=seed))
    same, other = ((tmp_path / seed / "patch.safetensors").read_bytes() for seed in "01")
    assert same == (unmeasured.folder / "patch.safetensors").read_bytes() != other


def test_without_evaluation_the_folder_is_as_complete(unmeasured: Result) -> None:
    assert files(unmeasured.folder) == FILES
    assert (unmeasured.before, unmeasured.after) == ({}, {})
    found = report(unmeasured.folder)
    assert (found["before"], found["after"], found["samples"]) == ({}, {}, [])
    assert json.loads((unmeasured.folder / "per_example.json").read_text()) == {"before": {}, "after": {}}


def test_a_complete_run_is_not_run_again(measured: tuple[Result, Ears]) -> None:
    result, _ = measured
    before = {file.name: file.stat().st_mtime_ns for file in result.folder.iterdir()}
    with pytest.raises(RunFolderError) as caught:
        unlearn(METHOD, settings(result.folder, evaluate="all"))
    assert str(caught.value) == (
        f"{result.folder} holds this run, complete.\nChoose another --out, or delete the folder."
    )
    with pytest.raises(
        RunFolderError, match=r" holds another run: alpha is 10\.0 there and 11\.0 here\.\nChoose another"
    ):
        unlearn(replace(METHOD, alpha=11.0), settings(result.folder, evaluate="all"))
    assert {file.name: file.stat().st_mtime_ns for file in result.folder.iterdir()} == before


# Layers and methods


@pytest.mark.parametrize(("layer", "trained"), [(0, [0]), (1, [0, 1])])
def test_a_low_layer_trains_those_that_exist(layer: int, trained: list[int], tmp_path: Path) -> None:
    result = unlearn(METHOD, settings(tmp_path / "a", layer=layer, steps=2))
    assert list(result.patch.tensors) == [f"model.layers.{number}.mlp.down_proj.weight" for number in trained]
    assert report(tmp_path / "a")["config"]["train_layers"] == trained


@dataclass(frozen=True, kw_only=True)
class Ablation(SteeringMethod):
    """Steer h0 to h0 - strength * (h0 . u) u."""

    source: ClassVar[str] = "made up in 2025 for this test"

    strength: float = 1.0
    """Multiple of the projection that is removed."""
    scales: tuple[float, ...] = (1.0,)
    """A setting of a kind that YAML does not have."""

    def prepare(self, layers: LayerSlice, topic: Topic, rng: torch.Generator) -> State:
        return {"direction": random_unit(layers.d_model, "gaussian", rng)}

    def forget_target(self, frozen: Activation, state: State) -> Float[Tensor, "#batch #pos d_model"]:
        u = state["direction"]
        return frozen.h - self.strength * (frozen.h @ u)[..., None] * u


def test_a_method_of_ones_own_is_passed_as_an_object(tmp_path: Path) -> None:
    result = unlearn(Ablation(alpha=1.0), settings(tmp_path / "a"))
    assert result.history[-1].forget_loss < result.history[0].forget_loss
    assert report(tmp_path / "a")["method"] == {
        "name": "ablation",
        "source": "made up in 2025 for this test",
        "fields": {"alpha": 1.0, "nu": 0.0, "noise": "target", "strength": 1.0, "scales": [1.0]},
    }


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """BPE, because transformers reads a Qwen2 tokenizer as nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen2": ({}, "model.layers.{}.mlp.down_proj.weight"),
    "gemma3_text": ({"head_dim": 8}, "model.layers.{}.mlp.down_proj.weight"),
    "gpt_neox": ({}, "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
}


@pytest.mark.parametrize(("family", "changes", "name"), [(key, *row) for key, row in FAMILIES.items()], ids=FAMILIES)
def test_the_mlp_output_matrices_move_and_nothing_else(
    family: str,
    changes: dict[str, Any],
    name: str,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    tiny_model(family, vocab_size=300, **changes).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    for file, first in (("forget.jsonl", "viper"), ("retain.jsonl", "bread")):
        texts = [f"{first} {row}: " + first * (row % 4) for row in range(12)]
        (tmp_path / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    config = settings(
        tmp_path / "run",
        model=str(base),
        forget=(str(tmp_path / "forget.jsonl"),),
        retain=str(tmp_path / "retain.jsonl"),
        evaluate="all",
    )
    result = unlearn(lethe.RMU(steering_coeff=9.0, alpha=1.0), config)
    edited = Patch.load(result.folder / "patch.safetensors").export(base, tmp_path / "edited")
    rows = diff(base, edited)
    assert [(row.name, row.kind) for row in rows] == [(name.format(layer), "changed") for layer in (1, 2, 3)]
    assert result.after["cosine_to_frozen/forget"].by_layer[0] == 1
    assert result.after["cosine_to_frozen/forget"].by_layer[3] < 1
    assert result.after["perplexity/retain"].n == 4


# What can go wrong


def fail_with(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


MEMORY = (
    "out of memory with layers 0..3, 2 rows of up to 32 tokens.\n"
    "Lower --batch-size (and raise --accumulate), --max-length or --layer, or pass --dtype bfloat16; "
    "--evaluate none spares loading the whole model."
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_to_lower(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gradient, "solve", fail_with(error))
    with pytest.raises(OutOfMemoryError) as caught:
        unlearn(METHOD, settings(tmp_path / "a"))
    assert str(caught.value) == MEMORY
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), NotImplementedError("no kernel")]
)
def test_other_failures_are_not_taken_for_it(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gradient, "solve", fail_with(error))
    with pytest.raises(type(error)) as caught:
        unlearn(METHOD, settings(tmp_path / "a"))
    assert caught.value is error
    assert not files(tmp_path)


def test_a_run_that_diverges_at_once_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"^training diverged at step 1: "):
        unlearn(METHOD, settings(tmp_path / "a", lr=1e12))
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "patch.safetensors", "report.json"])
def test_after_a_full_disk_the_run_goes_on(
    name: str, unmeasured: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target, **kwargs)

    original = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(SaveError, match="No space left on device"):
            unlearn(METHOD, settings(tmp_path / "a"))
    if name == "checkpoint.safetensors":
        assert not files(tmp_path)
    else:
        assert files(tmp_path / "a") < FILES | {"checkpoint.safetensors"}
    unlearn(METHOD, settings(tmp_path / "a"))
    assert files(tmp_path / "a") == FILES
    assert (tmp_path / "a" / "patch.safetensors").read_bytes() == (unmeasured.folder / "patch.safetensors").read_bytes()
