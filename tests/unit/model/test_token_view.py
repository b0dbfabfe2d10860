from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lethe.errors import InvalidLayerError, ReplayError
from lethe.model.hooks import changed
from lethe.model.layers import trainable_names
from lethe.model.recordings import Store
from lethe.model.slice import LayerSlice, SeveralLayers
from lethe.model.token_view import TokenView
from lethe.model.trainable import Everything, Matrices
from lethe.types import Batch


@pytest.fixture
def batch(tiny_batch: Any) -> Batch:
    return tiny_batch((9, 5, 7), side="left", count="no-first")


def names(model: Any) -> tuple[str, ...]:
    return sum((trainable_names(model, layer) for layer in (2, 3)), ())


def noise(model: Any, batch: Batch, seed: int) -> Tensor:
    shape = (*batch.input_ids.shape, model.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def log_probs(model: Any, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]


def test_neither_padding_nor_the_first_token_of_a_row_is_predicted(tiny_model: Any, tiny_batch: Any) -> None:
    view = TokenView(tiny_model(), Everything())
    for side in ("left", "right"):
        batch = tiny_batch((9, 5), side=side)
        frozen = view.record(batch).frozen
        assert frozen.mask.sum(1).tolist() == [8, 4]
        assert not (frozen.mask & ~batch.mask).any()


def test_a_replay_runs_only_layers_from_the_first_that_moves(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    view = TokenView(model, names(model))
    recording = view.record(batch)
    calls: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))

    now = view(recording)
    assert calls == [2, 3, 4]
    assert now.distribution.gather(-1, batch.input_ids[..., None])[..., 0].equal(now.of_tokens)
    assert calls == [2, 3, 4]


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_reference_is_kept_in_half_precision_as_long_as_there_is_room(
    tiny_model: Any, batch: Batch, tmp_path: Path, on_disk: bool
) -> None:
    room = batch.input_ids.numel() * 99 * 2
    store = Store(room, tmp_path / "kept" if on_disk else None)
    view = TokenView(tiny_model(), Everything(), distributions=store)

    kept, recomputed = view.record(batch).frozen, view.record(batch).frozen

    assert store.used == room
    assert torch.equal(kept.distribution, recomputed.distribution.half().float())
    assert torch.equal(kept.of_tokens, recomputed.of_tokens)
    assert (tmp_path / "kept").exists() == on_disk


def test_originals_on_disk_are_the_untouched_weights(tiny_model: Any, batch: Batch, tmp_path: Path) -> None:
    view = TokenView(tiny_model(), Everything(), originals_in=tmp_path)
    before, reference = view.delta(), view.record(batch).frozen.of_tokens
    with torch.no_grad():
        for parameter in view.trained.values():
            parameter += 0.1

    assert torch.equal(view.record(batch).frozen.of_tokens, reference)
    view.restore()
    assert all(torch.equal(value, before[name]) for name, value in view.delta().items())


@pytest.mark.parametrize("trained", ["some", "everything"])
@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_a_disturbance_is_a_hook_on_the_full_model(tiny_model: Any, batch: Batch, trained: str, layer: int) -> None:
    model = tiny_model()
    view = TokenView(model, Everything() if trained == "everything" else names(model))
    number = view.start_at_layer + layer if layer < 1 else layer
    recording, added = view.record(batch), noise(model, batch, 0).requires_grad_()

    found = view(recording, {number: added}).of_tokens[:, 1:]

    before = model.model.layers[number] if number >= 0 else model.model.embed_tokens
    with changed(before, lambda h: h + added):
        expected = log_probs(model, batch)
    assert torch.equal(found, expected)
    (mine,), (theirs,) = (torch.autograd.grad(value.sum(), added) for value in (found, expected))
    assert torch.equal(mine, theirs)
    assert not torch.equal(view(recording).of_tokens[:, 1:], found)


def test_a_slice_takes_disturbances_too_and_refuses_one_outside(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    layers = LayerSlice(model, 1, 4, names(model))
    recording = layers.record(batch)
    first, inside = noise(model, batch, 0), noise(model, batch, 1)

    assert torch.equal(layers(recording, first), layers(recording, {0: first}))
    with changed(model.model.layers[0], lambda h: h + first), changed(model.model.layers[2], lambda h: h + inside):
        expected = model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True).hidden_states[4]
    assert torch.equal(layers(recording, {0: first, 2: inside}), expected)
    with pytest.raises(InvalidLayerError, match=r"at layer 4 lies outside the replayed layers 1\.\.3"):
        layers(recording, {4: inside})


def test_several_layers_read_what_hooks_see(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    layers = SeveralLayers(model, 1, (1, 3), trainable_names(model, 1) + trainable_names(model, 3))
    layers.check(batch)
    recording = layers.record(batch)
    with torch.no_grad():
        for parameter in layers.trained.values():
            parameter += 0.1
    states = model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True).hidden_states

    now = layers(recording)

    assert list(now) == list(recording.frozen) == [1, 3]
    assert all(torch.equal(now[number], states[number + 1]) for number in (1, 3))
    with layers.untouched():
        replayed = layers(recording)
    assert all(torch.equal(recording.frozen[number].h, replayed[number]) for number in (1, 3))
    assert recording.nbytes > 3 * recording.hidden.numel() * 4


def test_a_token_view_of_what_has_no_influence_is_refused(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    with pytest.raises(ReplayError, match="nothing of unused influences the model's tokens"):
        TokenView(model, Matrices(("unused",))).check(batch)


def test_the_check_refuses_a_model_that_cannot_be_replayed(
    tiny_model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    view = TokenView(model, names(model))
    original, calls = type(model.model.layers[0]).forward, []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs) + 1e-4 * len(calls)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    with pytest.raises(ReplayError, match=r"replaying layers 2\.\.4 of model_type 'llama' differs"):
        view.check(batch)
