from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lethe.errors import ReplayError
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.model.view import _tensors
from lethe.types import Batch


def slice_of(model: Any, start: int = 1, stop: int = 4, modules: tuple[str, ...] = ()) -> LayerSlice:
    return LayerSlice(model, start, stop, sum((trainable_names(model, i, modules) for i in range(start, stop)), ()))


def move(layers: LayerSlice) -> None:
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)


def hooks_and_patches(model: nn.Module) -> list[Any]:
    return [
        found
        for module in model.modules()
        for found in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), vars(module).get("forward"))
        if found is not None
    ]


@pytest.fixture
def batch(tiny_batch: Any) -> Batch:
    return tiny_batch((9, 5, 7))


@pytest.mark.parametrize(
    "modules",
    [
        ("self_attn.o_proj",),
        ("self_attn.q_proj",),
        ("mlp.gate_proj",),
        ("self_attn.v_proj", "mlp.up_proj"),
        ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"),
    ],
    ids="+".join,
)
def test_any_matrix_may_be_trained(tiny_model: Any, batch: Batch, modules: tuple[str, ...]) -> None:
    layers = slice_of(tiny_model(), modules=modules)

    layers.check(batch)

    move(layers)
    recording = layers.record(batch)
    with torch.no_grad():
        expected = layers.model(batch.input_ids, batch.attention_mask.long(), output_hidden_states=True).hidden_states
    assert torch.equal(layers(recording), expected[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_replays_exactly_on_a_cpu(tiny_model: Any, batch: Batch, dtype: torch.dtype) -> None:
    slice_of(tiny_model(dtype=dtype)).check(batch)


def test_dropout_is_off_and_only_trained_matrices_want_gradients(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model(attention_dropout=0.5).train()

    layers = slice_of(model)

    layers.check(batch)
    assert not model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == list(layers.trained)


def test_recordings_are_of_the_untouched_model_even_after_training(tiny_model: Any, batch: Batch) -> None:
    layers = slice_of(tiny_model())
    before = layers.record(batch)
    move(layers)
    moved = layers.delta()

    after = layers.record(batch)

    assert torch.equal(after.frozen.h, before.frozen.h)
    assert not torch.equal(layers(after), after.frozen.h)
    assert all(torch.equal(value, moved[name]) for name, value in layers.delta().items())
    with layers.untouched():
        assert torch.equal(layers(after), after.frozen.h)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert layers.recording_seconds > 0


def test_a_delta_does_not_follow_the_weights(tiny_model: Any) -> None:
    layers = slice_of(tiny_model())
    kept = layers.delta()

    move(layers)

    assert not any(torch.equal(value, kept[name]) for name, value in layers.delta().items())
    assert all(torch.equal(value, kept[name]) for name, value in layers.originals.items())


def test_untouched_puts_the_weights_back_after_an_exception(tiny_model: Any) -> None:
    layers = slice_of(tiny_model())
    move(layers)
    moved = layers.delta()

    with pytest.raises(ZeroDivisionError), layers.untouched():
        raise ZeroDivisionError

    assert all(torch.equal(value, moved[name]) for name, value in layers.delta().items())
    assert torch.is_grad_enabled()


def test_nothing_is_left_on_the_model_when_a_forward_fails(
    tiny_model: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = slice_of(tiny_model())
    move(layers)
    moved = layers.delta()
    recording = layers.record(batch)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(type(layers.layers[1].mlp), "forward", fail)
        for attempt in (lambda: layers.record(batch), lambda: layers(recording), lambda: layers.check(batch)):
            with pytest.raises(ZeroDivisionError):
                attempt()

    assert hooks_and_patches(layers.model) == []
    assert all(torch.equal(value, moved[name]) for name, value in layers.delta().items())


# --- the check


def with_state(layer: nn.Module) -> Callable[..., Tensor]:
    original, calls = type(layer).forward, []

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(self, *args, **kwargs) + 1e-4 * len(calls)

    return forward


def with_noise(layer: nn.Module) -> Callable[..., Tensor]:
    original, noise = type(layer).forward, torch.Generator().manual_seed(0)

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, hidden + 1e-3 * torch.rand(hidden.shape, generator=noise), *args, **kwargs)

    return forward


def with_writing_into_its_input(layer: nn.Module) -> Callable[..., Tensor]:
    original = type(layer).forward

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = original(self, hidden, *args, **kwargs)
        if not hidden.requires_grad:
            hidden.mul_(1.001)
        return output

    return forward


def with_writing_into_an_argument(layer: nn.Module) -> Callable[..., Tensor]:
    original = type(layer).forward

    def forward(self: nn.Module, *args: Any, position_embeddings: Any, **kwargs: Any) -> Tensor:
        output = original(self, *args, position_embeddings=position_embeddings, **kwargs)
        position_embeddings[0].mul_(1.001)
        return output

    return forward


def with_writing_only_when_replayed(layer: nn.Module) -> Callable[..., Tensor]:
    """Right in the recording and in the first replay of it, wrong from the second on."""
    original, seen = type(layer).forward, []

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = original(self, hidden, *args, **kwargs)
        if any(hidden is other for other in seen):
            hidden.mul_(1.001)
        seen.append(hidden)
        return output

    return forward


@pytest.mark.parametrize(
    "fault",
    [
        with_state,
        with_noise,
        with_writing_into_its_input,
        with_writing_into_an_argument,
        with_writing_only_when_replayed,
    ],
)
def test_the_check_refuses_layers_that_cannot_be_replayed(
    tiny_model: Any, batch: Batch, fault: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = slice_of(tiny_model())
    layers.check(batch)
    move(layers)
    moved = layers.delta()
    monkeypatch.setattr(type(layers.layers[0]), "forward", fault(layers.layers[0]))

    with pytest.raises(ReplayError) as error:
        layers.check(batch)

    first, second = str(error.value).split("\n")
    assert first.startswith("replaying layers 1..3 of model_type 'llama' differs from its own forward by ")
    assert first.endswith(" (allowed 0), so training would be wrong and was not started.")
    assert second == "Please report the model type."
    assert hooks_and_patches(layers.model) == []
    assert all(torch.equal(value, moved[name]) for name, value in layers.delta().items())


def test_the_check_refuses_nan(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan

    with pytest.raises(ReplayError, match="differs from its own forward by nan"):
        slice_of(model).check(batch)


def test_the_check_refuses_a_matrix_without_influence(tiny_model: Any, batch: Batch) -> None:
    model = tiny_model()
    layers = LayerSlice(model, 1, 3, trainable_names(model, 1) + trainable_names(model, 3))

    with pytest.raises(ReplayError) as error:
        layers.check(batch)

    assert str(error.value) == (
        "model.layers.3.mlp.down_proj.weight does not influence the output of layer 2, so it cannot be trained there.\n"
        "Choose other --train-modules or --train-layers."
    )
    assert all(torch.equal(value, layers.originals[name]) for name, value in layers.delta().items())


# --- what a recording keeps, and what a replay does


def test_only_the_matrices_that_can_change_the_output_run_in_a_replay(tiny_model: Any, batch: Batch) -> None:
    layers = slice_of(tiny_model())
    recording = layers.record(batch)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        module.register_forward_hook(note(name))
        for name, module in layers.model.named_modules()
        if isinstance(module, nn.Linear) and "self_attn" in name
    ]
    layers(recording)
    for handle in handles:
        handle.remove()

    assert {name.split(".")[2] for name in calls} == {"2", "3"}
    assert len(calls) == 8


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mixtral"])
def test_a_recording_keeps_nothing_wider_than_the_hidden_state_and_no_graph(
    tiny_model: Any, batch: Batch, family: str
) -> None:
    layers = slice_of(tiny_model(family, head_dim=8))
    move(layers)

    recording = layers.record(batch)

    width = recording.hidden.numel()
    assert width == batch.input_ids.numel() * 32
    assert recording.constants
    assert all(tensor.numel() <= width for _, output in recording.constants for tensor in _tensors(output))
    kept = [recording.hidden, recording.frozen.h, *_tensors((recording.calls, [out for _, out in recording.constants]))]
    assert not any(tensor.requires_grad for tensor in kept)


def storages(tensors: Iterator[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_nbytes_counts_what_a_recording_holds(tiny_model: Any, batch: Batch) -> None:
    recording = slice_of(tiny_model()).record(batch)

    held = storages(
        _tensors((recording.hidden, recording.frozen.h, recording.calls, [o for _, o in recording.constants]))
    )

    assert 0.8 * held <= recording.nbytes <= 1.2 * held
