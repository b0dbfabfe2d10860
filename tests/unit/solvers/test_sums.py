from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe.errors import EmptyBatchError, InvalidValueError, UnknownModuleError
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.methods.protocol import SteeringMethod
from lethe.methods.rmu import RMU
from lethe.methods.rsv import RSV
from lethe.model.layers import trainable_names
from lethe.model.slice import LayerSlice
from lethe.solvers import sums as sums_module
from lethe.solvers.one_matrix import check_linear, edited, matrix, matrix_inputs
from lethe.solvers.sums import Moments, forget_moments, retain_moments
from lethe.types import Activation, Batch, State, Topic

LAYER = 2
METHODS = (
    RMU(steering_coeff=7.0),
    RSV(steering_coeff=7.0),
    *(AdaptiveRMU(beta=7.0, norm=norm) for norm in ("first-batch", "sample", "token", "running")),
)


@pytest.fixture
def make_layers(tiny_model: Any) -> Callable[..., LayerSlice]:
    def make(
        model_type: str = "llama", *, modules: tuple[str, ...] = (), start: int = LAYER, **more: Any
    ) -> LayerSlice:
        model = tiny_model(model_type, **more)
        return LayerSlice(model, start, LAYER + 1, trainable_names(model, start, modules))

    return make


@pytest.fixture
def batches(tiny_batch: Any) -> tuple[Batch, ...]:
    return tuple(tiny_batch((9, 5, 7), seed=seed, count="no-first") for seed in range(3))


def prepared(layers: LayerSlice, method: SteeringMethod, batches: Sequence[Batch]) -> State:
    return method.prepare(layers, Topic(name="t", batches=tuple(batches)), torch.Generator().manual_seed(0))


def rows(layers: LayerSlice, method: SteeringMethod, batches: Sequence[Batch], state: State) -> tuple[Tensor, Tensor]:
    """Inputs and residuals at the method's own coefficient, read without any of the code under test, in fp64."""
    (name,) = layers.trained
    owner = layers.model.get_submodule(name.removesuffix(".weight"))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in batches:
        noted: list[Tensor] = []
        handle = owner.register_forward_hook(lambda _, args, __, noted=noted: noted.append(args[0]))
        with torch.no_grad():
            out = layers.model(
                batch.input_ids, attention_mask=batch.attention_mask.long(), output_hidden_states=True
            ).hidden_states
        handle.remove()
        h0 = Activation(h=out[LAYER + 1], mask=batch.mask)
        state = method.update(h0, state)
        h0 = Activation(h=h0.h.double(), mask=batch.mask)
        for r, row in enumerate(batch.mask):
            for t in range(len(row)):
                if row[t]:
                    target = method.forget_target(h0, state).expand_as(h0.h)[r, t]
                    found[0].append(noted[0][r, t].double())
                    found[1].append(target - h0.h[r, t])
    return torch.stack(found[0]), torch.stack(found[1])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{getattr(m, 'norm', '')}")
def test_sums_at_any_coefficient_are_those_over_the_tokens(
    make_layers: Any, batches: tuple[Batch, ...], method: SteeringMethod
) -> None:
    layers = make_layers()
    state = prepared(layers, method, batches)
    for coefficient in (0.0, 1.0, 7.0, 300.0):
        at = replace(method, **{method.coefficient: coefficient})
        x, residual = rows(layers, at, batches, state)

        found, _ = forget_moments(layers, method, batches, state)

        assert found.tokens == len(x) == 54
        torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-9, atol=1e-9)
        sums = residual.T @ x
        crossed = found.residuals(coefficient)
        assert crossed is not None
        # Targets are fp32 beyond their linear part, so that much is between the two ways.
        torch.testing.assert_close(crossed, sums, rtol=1e-5, atol=2e-6 * sums.abs().max().item())
        assert found.square(coefficient) == pytest.approx(residual.square().sum().item(), rel=1e-5, abs=1e-9)


def test_the_state_after_the_batches_is_returned(make_layers: Any, batches: tuple[Batch, ...]) -> None:
    layers, method = make_layers(), AdaptiveRMU(norm="running")

    _, state = forget_moments(layers, method, batches, prepared(layers, method, batches))

    assert state["batches"].item() == 3


def test_retain_sums_are_those_over_the_tokens_in_the_dtype_asked_for(
    make_layers: Any, batches: tuple[Batch, ...]
) -> None:
    layers = make_layers()
    x, _ = rows(layers, METHODS[0], batches, prepared(layers, METHODS[0], batches))

    found, single = retain_moments(layers, batches), retain_moments(layers, batches, dtype=torch.float32)

    torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-9, atol=1e-9)
    assert (found.cross, found.slope, found.square(3.0)) == (None, None, 0)
    assert found.residuals(3.0) is None
    assert single.gram.dtype == torch.float32
    torch.testing.assert_close(single.gram.double(), found.gram, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("many", "panel"), [(1, 5), (20, 16), (10**6, 64)])
def test_neither_the_size_of_a_portion_nor_of_a_panel_matters(
    make_layers: Any, batches: tuple[Batch, ...], monkeypatch: pytest.MonkeyPatch, many: int, panel: int
) -> None:
    layers, method = make_layers(), METHODS[0]
    state = prepared(layers, method, batches)
    expected, _ = forget_moments(layers, method, batches, state)
    monkeypatch.setattr(sums_module, "ROWS", many)
    monkeypatch.setattr(sums_module, "PANEL", panel)

    found, _ = forget_moments(layers, method, batches, state)

    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.cross, expected.cross, rtol=1e-12, atol=1e-9)
    assert torch.equal(found.gram, found.gram.T)


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(make_layers: Any, tiny_batch: Any, method: SteeringMethod, side: str) -> None:
    layers = make_layers()
    plain = tiny_batch((6,), seed=3)
    wide = Batch(**{
        field: torch.nn.functional.pad(getattr(plain, field), (3, 0) if side == "left" else (0, 3), value=value)
        for field, value in (("input_ids", 2), ("attention_mask", False), ("mask", False))
    })  # fmt: skip
    state = prepared(layers, method, [plain])

    found, expected = (forget_moments(layers, method, [batch], state)[0] for batch in (wide, plain))

    assert found.tokens == expected.tokens == 6
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.residuals(7.0), expected.residuals(7.0), rtol=1e-4, atol=1e-5)
    assert found.square(7.0) == pytest.approx(expected.square(7.0), rel=1e-5)


def test_what_was_added_can_be_taken_out_again(make_layers: Any, tiny_batch: Any, batches: tuple[Batch, ...]) -> None:
    layers, method = make_layers(), METHODS[0]
    state = prepared(layers, method, batches)
    one, _ = forget_moments(layers, method, batches[:1], state)
    other, _ = forget_moments(layers, method, batches[1:], state)
    whole, _ = forget_moments(layers, method, batches, state)

    both = one + other
    left = both - other

    for found, expected in ((both, whole), (left, one)):
        assert found.tokens == expected.tokens
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.cross, expected.cross, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.slope, expected.slope, rtol=1e-9, atol=1e-9)
        assert found.squares == pytest.approx(expected.squares, rel=1e-9)
    assert both.to("cpu").tokens == both.tokens
    with pytest.raises(InvalidValueError, match=f"{whole.tokens} tokens out of sums over {one.tokens}"):
        _ = one - whole
    with pytest.raises(InvalidValueError, match="cannot be joined"):
        _ = one + retain_moments(layers, batches)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi", "opt", "qwen3", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edited_layer_gives_h0_plus_d_x(
    make_layers: Any, batches: tuple[Batch, ...], model_type: str, dtype: torch.dtype
) -> None:
    layers = make_layers(model_type, dtype=dtype)
    before = layers.delta()
    check_linear(layers, batches[0])
    assert all(torch.equal(before[name], value) for name, value in layers.delta().items())

    x, recording = matrix_inputs(layers, batches[0])
    delta = 0.1 * torch.randn(32, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ((name, value),) = edited(layers, delta).items()
    assert value.dtype == dtype
    layers.trained[name].data.copy_(value)
    with torch.no_grad():
        out = layers.model(
            recording.batch.input_ids, attention_mask=recording.batch.attention_mask.long(), output_hidden_states=True
        ).hidden_states[LAYER + 1]

    mask = recording.batch.mask
    expected = recording.frozen.h.double()[mask] + x.double() @ delta.T
    near = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double()[mask], expected, rtol=near, atol=near)


def test_the_matrix_is_the_untouched_one_in_one_orientation(make_layers: Any) -> None:
    layers = make_layers("gpt2")
    name = f"transformer.h.{LAYER}.mlp.c_proj.weight"
    original = layers.trained[name].detach().clone()
    assert original.shape == (128, 32)
    with torch.no_grad():
        layers.trained[name].zero_()

    assert torch.equal(matrix(layers), original.T)
    assert torch.equal(edited(layers, torch.zeros(32, 128))[name], original)


@pytest.mark.parametrize(
    ("model_type", "more", "message"),
    [
        ("gemma2", {"head_dim": 8}, "has a norm or another operation"),
        ("olmo2", {}, "has a norm or another operation"),
        ("mixtral", {"num_local_experts": 4}, "one matrix for each of 4 experts"),
        ("granite", {"residual_multiplier": 0.25}, "multiplied by 0.25"),
    ],
)
def test_layers_that_are_not_linear_in_the_matrix_are_refused(
    make_layers: Any, batches: tuple[Batch, ...], model_type: str, more: dict[str, Any], message: str
) -> None:
    layers = make_layers(model_type, **more)
    before = layers.delta()

    with pytest.raises(UnknownModuleError, match=f"(?s){message}.*'{model_type}'.*--solver gradient"):
        check_linear(layers, batches[0])

    assert all(torch.equal(before[name], value) for name, value in layers.delta().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ("mlp.down_proj", "mlp.up_proj")}, "are 2 matrices"),
        ({"modules": ("mlp.up_proj",)}, "has 64 outputs, the layer 32"),
        ({"modules": ("mlp.up_proj",), "intermediate_size": 32}, "has a norm or another operation"),
        ({"start": LAYER - 1}, f"stands below layer {LAYER}"),
    ],
)
def test_other_choices_of_matrices_are_refused(
    make_layers: Any, batches: tuple[Batch, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownModuleError, match=message):
        check_linear(make_layers(**options), batches[0])


def test_a_corpus_without_a_counted_token_is_an_error(make_layers: Any, batches: tuple[Batch, ...]) -> None:
    empty = [replace(batch, mask=torch.zeros_like(batch.mask)) for batch in batches]

    with pytest.raises(EmptyBatchError, match="no token counts"):
        retain_moments(make_layers(), empty)


def test_batches_without_a_counted_token_add_nothing(make_layers: Any, batches: tuple[Batch, ...]) -> None:
    layers, method = make_layers(), METHODS[0]
    state = prepared(layers, method, batches)
    empty = replace(batches[1], mask=torch.zeros_like(batches[1].mask))

    found, expected = (forget_moments(layers, method, some, state)[0] for some in ((batches[0], empty), batches[:1]))

    assert found.tokens == expected.tokens
    assert torch.equal(found.gram, expected.gram)
    assert isinstance(found, Moments)
