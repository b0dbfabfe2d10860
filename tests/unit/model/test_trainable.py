"""What moves: attached to a model it changes nothing, detached it leaves nothing, and a patch carries what it did."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear

from lethe.errors import UnknownModuleError, UsageError
from lethe.model.layers import trainable_names
from lethe.model.token_view import TokenView
from lethe.model.trainable import EmbeddingRow, Everything, LowRank, Matrices, Projection, Trainable
from lethe.types import Batch

NAMES = ("model.layers.3.mlp.down_proj.weight", "model.layers.4.self_attn.q_proj.weight")
KINDS: list[Trainable] = [
    Matrices(NAMES),
    Everything(),
    LowRank(names=NAMES, rank=4, alpha=8.0),
    EmbeddingRow((5, 7)),
    Projection(names=NAMES[:1], rank=2),
]


@pytest.fixture
def batch(tiny_batch: Any) -> Batch:
    return tiny_batch((9, 5, 7))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits


def put(view: TokenView) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in view.trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_an_edit_is_what_was_trained_and_restoring_leaves_nothing(tiny_model: Any, batch: Batch, kind: Any) -> None:
    model = tiny_model()
    untouched = copy.deepcopy(model)
    modules = [(name, type(module)) for name, module in model.named_modules()]
    before = logits(model, batch)
    view = TokenView(model, kind)
    view.check(batch)
    with torch.no_grad():
        assert torch.equal(view(view.record(batch)).of_tokens, view.record(batch).frozen.of_tokens)
    put(view)
    trained = logits(model, batch)

    edit = view.delta()
    view.restore()

    assert not torch.allclose(trained, before)
    assert torch.equal(logits(model, batch), before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    state = untouched.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()
    assert not hasattr(model, "peft_config")
    for name, value in edit.items():
        untouched.get_parameter(name).data.copy_(value)
    torch.testing.assert_close(logits(untouched, batch), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own loop
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_is_trained_as_peft_trains_it(tiny_model: Any, batch: Batch, family: str) -> None:
    model = tiny_model(family, **({} if family == "llama" else {"n_embd": 32, "n_layer": 5, "n_head": 4}))
    names = trainable_names(model, 3) + trainable_names(model, 4)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[n.removesuffix(".weight") for n in names], fan_in_fan_out=family == "gpt2"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = get_peft_model(copy.deepcopy(model), config).eval()
    view = TokenView(model, LowRank(names=names, rank=4, alpha=8.0, seed=3))
    recording = view.record(batch)
    ours = torch.optim.AdamW(list(view.trained.values()), lr=1e-2)
    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    counted = view(recording).mask[:, 1:]

    for _ in range(6):
        now = view(recording)
        ours.zero_grad()
        (-now.of_tokens[now.mask].mean()).backward()
        ours.step()
        found = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
        of_tokens = found[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        plain.zero_grad()
        (-of_tokens[counted].mean()).backward()
        plain.step()

    merged = theirs.merge_and_unload()
    for name, value in view.delta().items():
        assert not torch.equal(value, model.get_parameter(name.replace(".weight", ".base_layer.weight")))
        torch.testing.assert_close(value, merged.get_parameter(name), rtol=0, atol=1e-6)


def test_a_row_moves_alone_and_with_it_the_row_of_a_tied_head(tiny_model: Any, batch: Batch) -> None:
    token = int(batch.input_ids[0, 3])
    view = TokenView(tiny_model(tie_word_embeddings=True), EmbeddingRow((token,)))
    (matrix,) = view.trained.values()
    optimizer = torch.optim.AdamW([matrix], lr=1e-2, weight_decay=0.0)

    view(view.record(batch)).of_tokens.sum().backward()
    optimizer.step()

    moved = (matrix != view.originals["model.embed_tokens.weight"]).any(-1)
    assert moved.nonzero().flatten().tolist() == [token]
    assert view.model.lm_head.weight is matrix


def test_either_name_of_a_tied_matrix_moves_both(tiny_model: Any) -> None:
    attached = Matrices(("lm_head.weight",)).attach(tiny_model(tie_word_embeddings=True))

    assert list(attached.parameters) == ["model.embed_tokens.weight"]


def test_lora_on_a_tied_head_is_refused(tiny_model: Any) -> None:
    with pytest.raises(UsageError, match="lm_head shares its matrix with another layer"):
        LowRank(names=("lm_head.weight",)).attach(tiny_model(tie_word_embeddings=True))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.9.mlp.down_proj.weight"])
def test_lora_and_projections_want_linear_layers(tiny_model: Any, name: str) -> None:
    for kind in (LowRank(names=(name,)), Projection(names=(name,), rank=1)):
        with pytest.raises(UnknownModuleError, match="not a linear layer"):
            kind.attach(tiny_model())


def test_a_projection_removes_its_directions_from_what_a_layer_writes(tiny_model: Any) -> None:
    model = tiny_model()
    attached = Projection(names=NAMES[:1], rank=2).attach(model)
    (rows,) = attached.parameters.values()
    with torch.no_grad():
        rows.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))

    written = model.model.layers[3].mlp.down_proj(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)))

    assert linear(written, rows).abs().max() < 1e-5
    written.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.any()
