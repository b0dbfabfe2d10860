"""What settings name, opened: alone afresh, and shared once for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lethe.data.prompt_corpora import PromptCorpora
from lethe.errors import InvalidLayerError, UnknownModuleError
from lethe.methods.rmu import RMU
from lethe.model.recordings import Recordings, Store
from lethe.model.settings import ModelSettings
from lethe.model.slice import LayerSlice
from lethe.runs import workspace as workspaces
from lethe.runs.check import check
from lethe.runs.config import RunConfig
from lethe.runs.unlearn import unlearn
from lethe.runs.workspace import Workspace

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BUILTIN = ModelSettings(model="builtin", device="cpu")


def config(**settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {"model": "builtin", "device": "cpu", "batch_size": 2, "max_length": (16,), "layer": 3}
    return RunConfig.of(**defaults | settings)


def sliced(settings: RunConfig) -> LayerSlice:
    return Workspace(settings.base).slice(settings)


@pytest.mark.parametrize(
    ("stored", "asked", "device", "found"),
    [
        ("bfloat16", "auto", CPU, "bfloat16"),
        ("float32", "auto", CPU, "float32"),
        ("float16", "auto", CPU, "float32"),
        ("float16", "auto", GPU, "float16"),
        ("float16", "float16", CPU, "float16"),
        ("float32", "bfloat16", CPU, "bfloat16"),
    ],
)
def test_the_number_type(stored: str, asked: Any, device: torch.device, found: str, tmp_path: Path) -> None:
    # The first tensor by name is a mask of integers.
    tensors = {"a.mask": torch.ones(2, dtype=torch.int64), "b.weight": torch.ones(2, dtype=getattr(torch, stored))}
    save_file(tensors, tmp_path / "model.safetensors")
    workspace = Workspace(ModelSettings(model=str(tmp_path), dtype=asked, device="cpu"))
    workspace.device = device
    assert workspace.dtype == getattr(torch, found)


@pytest.fixture
def saved(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(("layer", "trained"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (4, [2, 3, 4])])
def test_the_slice_ends_at_the_layer_and_begins_at_the_first_trained_one(
    layer: int, trained: list[int], saved: str
) -> None:
    layers = sliced(config(model=saved, layer=layer))
    assert (layers.start_at_layer, layers.stop_at_layer) == (trained[0], layer + 1)
    assert list(layers.trained) == [f"model.layers.{number}.mlp.down_proj.weight" for number in trained]
    assert len(layers.model.model.layers) == layer + 1


def test_named_matrices_of_named_layers(saved: str) -> None:
    settings = config(model=saved, layer=3, train_layers=(1, 3), train_modules=("self_attn.o_proj",))
    layers = sliced(settings.changed(dtype="bfloat16"))
    assert list(layers.trained) == [f"model.layers.{number}.self_attn.o_proj.weight" for number in (1, 3)]
    assert all(parameter.dtype == torch.bfloat16 for parameter in layers.trained.values())


def test_a_layer_that_the_model_does_not_have(saved: str) -> None:
    with pytest.raises(InvalidLayerError) as caught:
        sliced(config(model=saved, layer=5))
    assert str(caught.value) == f"'layer' must be in [0, 4] for {saved}, which has 5 layers. Got 5."


def test_a_matrix_that_the_layer_does_not_have(saved: str) -> None:
    settings = config(model=saved, layer=3, train_modules=("mlp.c_proj",))
    with pytest.raises(UnknownModuleError, match=r"^layer 1 has no matrix named mlp\.c_proj\.\nLayer 1 has: mlp\."):
        sliced(settings)


def test_checking_a_model_says_what_would_be_trained(saved: str) -> None:
    found = check(config(model=saved, layer=3, train_layers=(2, 3)))
    assert found == {
        "model_type": "llama",
        "layers replayed": "2..3",
        "d_model": 32,
        "trained": {f"model.layers.{layer}.mlp.down_proj.weight": [32, 64] for layer in (2, 3)},
    }


def test_each_trained_layer_has_a_slice_of_its_own(saved: str) -> None:
    settings = config(model=saved, layer=3, train_layers=(1, 3), solver="ridge")
    slices = Workspace(settings.base).layers(settings)
    assert [(layers.start_at_layer, layers.stop_at_layer) for layers in slices] == [(1, 2), (3, 4)]
    assert [list(layers.trained) for layers in slices] == [
        [f"model.layers.{layer}.mlp.down_proj.weight"] for layer in (1, 3)
    ]
    assert slices[0].model is slices[1].model


# Alone and shared


def test_alone_a_model_is_loaded_as_deep_as_it_is_asked_for(saved: str) -> None:
    workspace = Workspace(ModelSettings(model=saved, device="cpu"))
    assert [len(workspace.model(count).model.layers) for count in (2, 4, None)] == [2, 4, 5]
    assert workspace.model(2) is not workspace.model(2)


@pytest.mark.parametrize(("depth", "loaded"), [(4, 4), (None, 5)])
def test_shared_there_is_one_model_of_one_depth(depth: int | None, loaded: int, saved: str) -> None:
    workspace = Workspace(ModelSettings(model=saved, device="cpu"), share=True, depth=depth)
    model = workspace.model(2)
    assert len(model.model.layers) == loaded
    assert workspace.model(3) is model
    assert workspace.model() is model
    workspace.clear()
    assert workspace.model() is not model


def test_a_run_on_top_of_another_leaves_the_shared_model_untouched(tmp_path: Path) -> None:
    workspace = Workspace(BUILTIN, share=True)
    before = {name: value.clone() for name, value in workspace.model().state_dict().items()}
    small: dict[str, Any] = {"steps": 2, "lr": 1e-2, "evaluate": "none"}
    first = config(out=tmp_path / "first", **small)
    second = config(out=tmp_path / "second", on=first.out, forget=("builtin:exploits",), layer=2, **small)
    alone = [unlearn(RMU(alpha=1.0), chosen) for chosen in (first, second)]
    for result, chosen in zip(alone, (first, second), strict=True):
        found = unlearn(RMU(alpha=1.0), chosen.changed(out=tmp_path / "shared" / chosen.out.name), workspace=workspace)
        assert all(torch.equal(found.patch.tensors[name], value) for name, value in result.patch.tensors.items())
        now = workspace.model().state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())


def test_corpora_sets_and_rows_are_made_once_for_equal_settings() -> None:
    workspace, settings = Workspace(BUILTIN, share=True), config(limit=2)
    corpora = workspace.corpora(settings.data, "texts")
    assert workspace.corpora(settings.changed(layer=2, lr=1.0).data, "texts") is corpora
    for make, other in (
        (lambda chosen: workspace.sets(chosen, corpora), {"limit": 3}),
        (lambda chosen: workspace.rows(chosen, corpora), {"seed": 1}),
        (lambda chosen: workspace.schedule(chosen, corpora, 2, 1), {"seed": 1}),
    ):
        made = make(settings)
        assert make(settings.changed(layer=2, steps=9, lr=1.0, out=Path("x"))) is made
        assert make(settings.changed(**other)) is not made
    assert workspace.corpora(settings.changed(forget=("builtin:exploits",)).data, "texts") is not corpora


def test_a_schedule_of_texts_is_none_of_prompts() -> None:
    workspace, settings = Workspace(BUILTIN, share=True), config()
    for reads in ("texts", "prompts", "texts"):
        corpora = workspace.corpora(settings.data, reads)
        found = workspace.schedule(settings, corpora, 2, 1)
        alone = corpora.schedule(settings.batching, torch.Generator().manual_seed(settings.seed), steps=2)
        assert [bool(topic.reference) for topic in found.topics] == [reads == "prompts"] * 2
        for step in range(2):
            for mine, other in zip(found.at(step)[1:], alone.at(step)[1:], strict=True):
                assert torch.equal(mine.input_ids, other.input_ids)
                assert torch.equal(mine.mask, other.mask)


def test_another_schedule_gives_up_what_was_recorded_of_the_last() -> None:
    workspace, settings = Workspace(BUILTIN, share=True, depth=4), config()
    workspace.recordings = Recordings(Store(2**28))
    cleared: list[bool] = []
    workspace.recordings.clear = lambda: cleared.append(True)  # type: ignore[method-assign]
    corpora = workspace.corpora(settings.data, "texts")
    for chosen, times in ((settings, 1), (settings.changed(layer=2), 1), (settings.changed(seed=1), 2)):
        workspace.schedule(chosen, corpora, 2, 1)
        assert len(cleared) == times


def test_refusals_are_asked_once_for_the_same_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(subject: Any, reference: Any, refusals: Any) -> float:
        asked.append(len(reference))
        return len(asked) / 10

    monkeypatch.setattr(workspaces, "check_refusals", ask)
    workspace, settings = Workspace(BUILTIN, share=True, depth=1), config()
    found = []
    for forget in ("builtin", "builtin", "builtin:exploits", "builtin:pathogens"):
        corpora = workspace.corpora(settings.changed(forget=(forget,)).data, "prompts")
        assert isinstance(corpora, PromptCorpora)
        found.append(workspace.refusal_rate(corpora, settings.evaluation))
    assert found == [0.1, 0.1, 0.2, 0.3]
    for _ in range(3):
        # Nobody else holds them, so the next ones get their place in memory.
        again = PromptCorpora(prompts=corpora.prompts, tokenizer=corpora.tokenizer)
        found.append(workspace.refusal_rate(again, settings.evaluation))
        del again
    assert found[4:] == [0.4, 0.5, 0.6]
