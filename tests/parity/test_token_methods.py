"""Token methods against loops written out: two whole models, full forwards, an optimizer of their own."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from lethe.data.batches import Schedule
from lethe.methods.finetune import Finetune
from lethe.methods.grad_diff import GradDiff
from lethe.methods.protocol import TokenMethod
from lethe.model.layers import trainable_names
from lethe.model.token_view import TokenView
from lethe.model.trainable import Everything, LowRank, Matrices, Trainable
from lethe.solvers.gradient import Gradient
from lethe.types import Batch, HistoryRow, Topic

TRAINED, STEPS, TOPICS, LR = (1, 2, 3), 6, ("bio", "cyber"), 1e-3
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gpt_neox": {},
    "phi3": {},
}
Keep = Literal["cross-entropy", "kl"]
KEEP: tuple[Keep, ...] = ("cross-entropy", "kl")


@pytest.fixture(params=["left", "right"])
def schedule(request: pytest.FixtureRequest, tiny_batch: Any) -> Schedule:
    """Topics in turn; one retain batch serves one step of each topic."""
    how = {"side": request.param, "count": "no-first"}
    topics = tuple(
        Topic(name=name, batches=tuple(tiny_batch((9, 5, 7, 3 + i), seed=10 * n + i, **how) for i in range(3)))
        for n, name in enumerate(TOPICS)
    )
    retain = [tiny_batch((8, 4, 6, 2), seed=100 + i, **how) for i in range(3)]
    return Schedule(topics=topics, retain=tuple(retain[step // len(TOPICS)] for step in range(STEPS)), steps=STEPS)


def names(model: PreTrainedModel) -> tuple[str, ...]:
    return sum((trainable_names(model, layer) for layer in TRAINED), ())


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Of every position but the last, in a forward of the whole model."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits[:, :-1]


def labels(batch: Batch) -> Tensor:
    """Tokens that follow a real token and count."""
    predicted = batch.mask[:, 1:] & batch.attention_mask[:, :-1]
    return batch.input_ids[:, 1:].masked_fill(~predicted, -100)


def mean_nll(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(logits(model, batch).flatten(0, 1), labels(batch).flatten())


def mean_divergence(frozen: nn.Module, now: nn.Module, batch: Batch) -> Tensor:
    counted = labels(batch) != -100
    with torch.no_grad():
        before = logits(frozen, batch)[counted].log_softmax(-1)
    return kl_div(logits(now, batch)[counted].log_softmax(-1), before, log_target=True, reduction="batchmean")


def naive_loop(
    updated: nn.Module, frozen: nn.Module, moving: list[nn.Parameter], method: TokenMethod, schedule: Schedule
) -> list[tuple[float, float]]:
    """Trains `updated` in place; forget and retain loss of each step."""
    sign = -method.gamma if isinstance(method, GradDiff) else 1.0
    optimizer = torch.optim.AdamW(moving, lr=LR, eps=1e-6, weight_decay=0.0)
    seen = []
    for step in range(STEPS):
        forget = schedule.topics[step % len(TOPICS)].batches[step // len(TOPICS)]
        retain = schedule.retain[step]
        forget_loss = sign * mean_nll(updated, forget)
        if method.retain_with == "kl":
            retain_loss = mean_divergence(frozen, updated, retain)
        else:
            retain_loss = mean_nll(updated, retain)
        (forget_loss + method.alpha * retain_loss).backward()
        optimizer.step()
        updated.zero_grad()
        seen.append((forget_loss.item(), retain_loss.item()))
    return seen


def ours(model: PreTrainedModel, kind: Trainable, method: TokenMethod, schedule: Schedule) -> tuple[Any, Any]:
    """What is trained in a copy of the model, and the losses."""
    view = TokenView(copy.deepcopy(model), kind)
    rows: list[HistoryRow] = []
    Gradient(lr=LR).train(view, method, schedule, torch.Generator().manual_seed(0), on_row=rows.append)
    return view.delta(), [(row.forget_loss, row.retain_loss) for row in rows]


def compare(
    model: PreTrainedModel,
    kind: Trainable,
    method: TokenMethod,
    schedule: Schedule,
    moves: Callable[[str], bool],
) -> None:
    updated, frozen = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    parameters = {name: parameter for name, parameter in updated.named_parameters() if moves(name)}
    losses = naive_loop(updated, frozen, list(parameters.values()), method, schedule)

    found, found_losses = ours(model, kind, method, schedule)

    start = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    torch.testing.assert_close(found_losses, losses, rtol=0, atol=1e-5)
    for name, value in parameters.items():
        assert (value - start[name]).abs().max() > 2 * LR
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_difference_is_that_of_two_whole_models(
    tiny_model: Any, schedule: Schedule, family: str, keep: Keep
) -> None:
    model = tiny_model(family, **FAMILIES[family])
    method = GradDiff(alpha=2.0, gamma=0.5, retain_with=keep)

    compare(model, Matrices(names(model)), method, schedule, set(names(model)).__contains__)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", KEEP)
def test_everything_moves_as_in_two_whole_models(tiny_model: Any, schedule: Schedule, keep: Keep, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)

    compare(model, Everything(), GradDiff(alpha=2.0, retain_with=keep), schedule, lambda _: True)


def test_fine_tuning_is_next_token_prediction_alone(tiny_model: Any, schedule: Schedule) -> None:
    model = tiny_model()
    found, losses = ours(model, Matrices(names(model)), Finetune(), schedule)
    updated = copy.deepcopy(model).eval()
    parameters = {name: updated.get_parameter(name) for name in names(model)}

    expected = naive_loop(updated, updated, list(parameters.values()), Finetune(), schedule)

    assert [retain for _, retain in losses] == [0.0] * STEPS
    for (mine, _), (theirs, _) in zip(losses, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for name, value in parameters.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own loop
@pytest.mark.parametrize("method", [Finetune(), *(GradDiff(alpha=2.0, retain_with=keep) for keep in KEEP)], ids=str)
def test_lora_is_trained_as_peft_trains_it(tiny_model: Any, schedule: Schedule, method: TokenMethod) -> None:
    model = tiny_model()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[name.removesuffix(".weight") for name in names(model)])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = get_peft_model(copy.deepcopy(model), config).eval()
    factors = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    losses = naive_loop(theirs, copy.deepcopy(model).eval(), factors, method, schedule)

    found, found_losses = ours(model, LowRank(names=names(model), rank=4, alpha=8.0, seed=3), method, schedule)

    merged = theirs.merge_and_unload()
    assert found.keys() == set(names(model))
    if not method.reads_retain:
        losses = [(forget, 0.0) for forget, _ in losses]
    torch.testing.assert_close(found_losses, losses, rtol=0, atol=1e-5)
    for name, value in found.items():
        assert not torch.equal(value, model.get_parameter(name))
        torch.testing.assert_close(value, merged.get_parameter(name), rtol=0, atol=1e-6)


def test_ascending_is_not_taken_for_divergence(tiny_model: Any, schedule: Schedule) -> None:
    """The loss is below zero from the first step on, or next to nothing where both sides weigh the same."""
    same = replace(schedule, retain=tuple(schedule.at(step)[1] for step in range(STEPS)))
    for keep, plan in (("kl", schedule), ("cross-entropy", same)):
        _, losses = ours(tiny_model(), Everything(), GradDiff(retain_with=keep), plan)
        assert len(losses) == STEPS
        assert losses[0][0] < 0
