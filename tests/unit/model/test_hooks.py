"""Hooks: what is read, changed and replaced, and that nothing of it stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lethe.model import hooks
from lethe.model.layers import find_layers


def attached(model: PreTrainedModel) -> list[Any]:
    return [
        found
        for module in model.modules()
        for found in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), vars(module).get("forward"))
        if found is not None
    ]


def test_what_leaves_a_layer_enters_the_next(tiny_model: Callable[..., PreTrainedModel], tiny_batch: Any) -> None:
    model, batch = tiny_model(), tiny_batch((5, 3))
    layers = list(find_layers(model))
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    with hooks.inputs(layers, entered.__setitem__), hooks.outputs(layers, left.__setitem__), torch.no_grad():
        hooks.forward(model, batch)
    assert list(entered) == list(left) == list(range(len(layers)))
    assert all(torch.equal(left[place], entered[place + 1]) for place in range(len(layers) - 1))
    assert not attached(model)


def test_a_change_reaches_the_output_and_a_forward_is_replaced(
    tiny_model: Callable[..., PreTrainedModel], tiny_batch: Any
) -> None:
    model, batch = tiny_model(), tiny_batch((5, 3))
    layers = list(find_layers(model))
    seen: list[Tensor] = []
    with torch.no_grad():
        before = hooks.forward(model, batch).logits
        with hooks.changed(layers[1], torch.zeros_like), hooks.inputs([layers[2]], lambda _, h: seen.append(h)):
            hooks.forward(model, batch)
        with hooks.replaced_forward(layers[1].mlp, torch.zeros_like):
            replaced = hooks.forward(model, batch).logits
        assert torch.equal(hooks.forward(model, batch).logits, before)
    assert not seen[0].any()
    assert not torch.equal(replaced, before)
    assert not attached(model)


def test_an_error_leaves_nothing_behind(tiny_model: Callable[..., PreTrainedModel], tiny_batch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop")

    model, batch = tiny_model(), tiny_batch((5, 3))
    layers = list(find_layers(model))
    contexts = (
        lambda: hooks.outputs(layers, refuse),
        lambda: hooks.inputs(layers, refuse),
        lambda: hooks.changed(layers[0], refuse),
        lambda: hooks.replaced_forward(layers[0], refuse),
    )
    for context in contexts:
        with pytest.raises(RuntimeError, match="stop"), context():
            hooks.forward(model, batch)
        assert not attached(model)
