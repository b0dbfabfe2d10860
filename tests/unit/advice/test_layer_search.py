"""The layer search: what the hook does, what is measured, what is chosen, and how the file is read again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lethe import LoadedModel, load_model, load_tokenizer
from lethe.advice.layer_search import LayerSearch, search, steered
from lethe.data import unanswerable
from lethe.data.prompts import Prompts
from lethe.errors import InvalidValueError, RunFolderError
from lethe.model.layers import find_layers
from lethe.suites import world
from lethe.suites.world import exam, generator


def test_steering_moves_the_last_token_of_a_prompt_alone(tiny_model: Any) -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    shift = torch.ones(32)

    def output(layer: int, steer: bool, **more: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with steered(find_layers(model)[2], shift if steer else 0 * shift), torch.no_grad():
            handle = find_layers(model)[layer].register_forward_hook(
                lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            model(input_ids=ids, **more)
            handle.remove()
        return seen[0]

    plain, moved = output(2, False), output(2, True)
    torch.testing.assert_close(moved[0, -1], plain[0, -1] + shift)
    assert torch.equal(moved[0, :-1], plain[0, :-1])
    assert not any(module._forward_hooks for module in model.modules())


def test_generated_tokens_are_not_steered(tiny_model: Any) -> None:
    model = tiny_model()
    seen: list[int] = []
    with steered(find_layers(model)[2], torch.ones(32)):
        handle = find_layers(model)[2].register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).shape[1])
        )
        model.generate(
            torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        handle.remove()
    # One pass over the prompt, then one token at a time: these are left alone.
    assert seen == [4, 1, 1]


@pytest.fixture(scope="module")
def found() -> LayerSearch:
    subject = LoadedModel(
        model=load_model(world.MODEL_FOLDER, dtype=torch.float32), tokenizer=load_tokenizer(world.MODEL_FOLDER)
    )
    forget = {name: asked[:12] for name, asked in exam.forget_prompts().items()}
    asked = Prompts(forget=forget, retain=(), reference=exam.reference_prompts()[:32])
    return search(subject, asked, top=2, wanted=generator.DECLINES)


def test_the_built_in_model_declines_when_steered_in_later_layers(found: LayerSearch) -> None:
    rates = [score.refusal_rate for score in found.layers]
    assert [score.layer for score in found.layers] == list(range(12))
    assert max(rates[:3]) <= 0.2
    assert min(rates[6:]) >= 0.7
    assert all(score.wanted > score.unwanted for score in found.layers[6:])


def test_the_best_layers_are_chosen(found: LayerSearch) -> None:
    points = {score.layer: (score.wanted - score.unwanted) * score.refusal_rate for score in found.layers}
    assert len(found.chosen) == 2
    assert min(points[layer] for layer in found.chosen) >= max(
        value for layer, value in points.items() if layer not in found.chosen
    )


def test_it_survives_its_file(found: LayerSearch, tmp_path: Path) -> None:
    assert LayerSearch.load(found.save(tmp_path / "layers.json")) == found


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"coefficient": 2, "layers": [{"x": 1}], "chosen": [1]}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"x\.json is no layer search"):
        LayerSearch.load(tmp_path / "x.json")


def test_more_layers_than_there_are_cannot_be_chosen(tiny_model: Any) -> None:
    subject = LoadedModel(model=tiny_model(), tokenizer=load_tokenizer(world.MODEL_FOLDER))
    with pytest.raises(InvalidValueError, match=r"'top' must be in \[1, 5\] for this model. Got 6."):
        search(subject, Prompts(forget={}, retain=(), reference=unanswerable.unverifiable(2, seed=0)), top=6)
