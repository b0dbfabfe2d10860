"""Reading a shared beginning once changes no number, and is done where it saves tokens."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TinyModel
from lethe.errors import DivergedError, OutOfMemoryError
from lethe.inference import prefix_cache
from lethe.inference.log_probs import log_probs
from lethe.inference.prefix_cache import shared_beginnings
from lethe.inference.spans import Span

WINDOW = {"sliding_window": 4, "use_sliding_window": True}
ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "n_inner": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": GPT,  # positions that are learned
    "bloom": GPT,  # positions as a bias
    "mistral": WINDOW,
    "gemma2": {"head_dim": 8, **WINDOW, "layer_types": ALTERNATING},  # logits are capped after the head
    "cohere": {},  # logits are scaled after the head
    "mamba": {"state_size": 4, "expand": 2},  # no cache of keys and values
}


@pytest.fixture
def cheap_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny rows: a forward of its own for a beginning pays at once."""
    monkeypatch.setattr(prefix_cache, "FORWARD_COST", 1)


def spans_of_an_exam() -> list[Span]:
    """Two subjects with a beginning of 20 tokens each, rows with none, answers of one to three tokens."""
    rng = random.Random(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 99) for _ in range(count))

    beginnings = [draw(20), draw(20), ()]
    found = []
    for number in range(30):
        asked = beginnings[number % 3] + draw(rng.randrange(3, 20))
        found += [Span(ids=asked + draw(1 + choice * (number % 2)), start=len(asked)) for choice in range(3)]
    return found


def whole_rows(model: torch.nn.Module, spans: Sequence[Span]) -> list[Tensor]:
    """Log-probabilities of the asked tokens, each span read whole and alone."""
    found = []
    for span in spans:
        with torch.no_grad():
            table = model(input_ids=torch.tensor([span.ids])).logits[0].float().log_softmax(-1)
        found.append(torch.stack([table[place - 1, span.ids[place]] for place in range(span.start, len(span.ids))]))
    return found


def forwards(model: torch.nn.Module) -> list[int]:
    """Fills up with the number of tokens of each forward from now on."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    return seen


@pytest.mark.usefixtures("cheap_forwards")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_reading_whole_rows_gives(family: str, tiny_model: TinyModel) -> None:
    model, spans = tiny_model(family, **FAMILIES[family]), spans_of_an_exam()
    expected = whole_rows(model, spans)
    seen = forwards(model)
    for found, right in zip(log_probs(model, spans), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    assert (seen.count(20) >= 2) == (family != "mamba"), "the beginnings of the two subjects"


@pytest.mark.usefixtures("cheap_forwards")
def test_small_batches_change_nothing(tiny_model: TinyModel) -> None:
    model, spans = tiny_model(), spans_of_an_exam()
    for found, right in zip(log_probs(model, spans, tokens_per_batch=30), whole_rows(model, spans), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("cheap_forwards")
def test_only_the_asked_positions_reach_the_head(tiny_model: TinyModel) -> None:
    model = tiny_model()
    spans = [Span(ids=tuple(range(3, 30 + length)), start=26 + length) for length in range(4)]
    read: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1]))
    log_probs(model, spans)
    assert max(read) <= 4


def test_a_row_that_begins_another_is_not_read(tiny_model: TinyModel) -> None:
    model, rng = tiny_model(), random.Random(0)
    spans = []
    for _ in range(9):
        prompt = tuple(rng.randrange(4, 99) for _ in range(rng.randrange(5, 30)))
        one_token = [Span(ids=(*prompt, letter), start=len(prompt)) for letter in (5, 6)]
        spans += [*one_token, *(Span(ids=(*prompt, 3, letter), start=len(prompt)) for letter in (7, 8))]
    spans.append(Span(ids=spans[2].ids[:3], start=1))
    expected = whole_rows(model, spans)
    seen = forwards(model)
    for found, right in zip(log_probs(model, spans, tokens_per_batch=1), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    # The last one asks before the others do: in a longer row more positions would reach the head.
    assert sorted(seen) == sorted([*(len(span.ids) - 1 for span in spans[2::4]), 2])


def test_batches_on_a_cpu_are_small(tiny_model: TinyModel) -> None:
    model, rng = tiny_model(), random.Random(0)
    spans = [Span(ids=tuple(rng.randrange(3, 99) for _ in range(61)), start=60) for _ in range(40)]
    seen = forwards(model)
    log_probs(model, spans)
    assert max(seen) == 1024 // 60 * 60


def cost(groups: Sequence[tuple[int, list[tuple[int, ...]]]]) -> int:
    return sum(
        bool(length) * (prefix_cache.FORWARD_COST + length) + sum(len(row) - length for row in rows)
        for length, rows in groups
    )


def test_groups_are_those_with_the_fewest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "FORWARD_COST", 3)
    common, first, second = (1,) * 4, (2,) * 10, (3,) * 10
    rows = [common + first + (n, n) for n in range(10, 14)] + [common + second + (n,) for n in range(10, 14)]
    alone = (9, 9, 9, 9)
    groups = shared_beginnings({row: len(row) - 1 for row in [*rows, alone]})
    assert groups == [(0, [alone]), (14, rows[:4]), (14, rows[4:])]
    assert cost(groups) == 4 + 2 * (3 + 14) + 4 * 2 + 4 * 1
    few = [*rows[:1], *rows[4:5]]
    assert shared_beginnings({row: len(row) - 1 for row in few}) == [(4, few)], "worth it for what all share"
    monkeypatch.setattr(prefix_cache, "FORWARD_COST", 30)
    assert [length for length, _ in shared_beginnings({row: len(row) - 1 for row in few})] == [0]


def test_what_is_asked_for_is_not_shared() -> None:
    rows = {(5,) * 600 + (n,): 500 for n in range(3)}
    assert shared_beginnings(rows) == [(500, sorted(rows))]
    assert shared_beginnings({}) == []


def test_a_batch_that_does_not_fit_is_halved(tiny_model: TinyModel) -> None:
    model, spans = tiny_model(), spans_of_an_exam()
    expected, most = whole_rows(model, spans), 120
    failed: list[int] = []

    def refuse(_: object, __: object, given: dict[str, Tensor]) -> None:
        if given["input_ids"].numel() > most:
            failed.append(given["input_ids"].numel())
            raise torch.OutOfMemoryError("out of memory")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    for found, right in zip(log_probs(model, spans), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    assert 1 <= len(failed) < 8, "later batches start from what fitted"
    handle.remove()
    most = 0
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(OutOfMemoryError, match=r"^out of memory scoring a row of \d+ tokens\.\nUse"):
        log_probs(model, spans)


def test_other_failures_are_not_taken_for_missing_memory(tiny_model: TinyModel) -> None:
    model = tiny_model()
    with pytest.raises(IndexError):
        log_probs(model, [Span(ids=(3, 999, 4), start=2)])


def test_what_is_not_a_number_is_an_error(tiny_model: TinyModel) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(DivergedError, match="on 1 of 1 rows"):
        log_probs(model, [Span(ids=(3, 4, 6), start=2)])
