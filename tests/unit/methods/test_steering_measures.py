import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from lethe.methods._steering_measures import of_forget, of_retain, stalled
from lethe.methods.protocol import Side
from lethe.methods.rmu import RMU
from lethe.types import Activation, Batch, HistoryRow


@pytest.fixture
def given() -> dict[str, Any]:
    """Two rows of three tokens in four dimensions, two tokens of padding."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    forget, retain, frozen_forget, frozen_retain, target = torch.randn(5, 2, 3, 4, generator=rng)

    def activation(h: torch.Tensor) -> Activation:
        return Activation(h=h, mask=mask)

    return {
        "forget": activation(forget),
        "retain": activation(retain),
        "frozen_forget": activation(frozen_forget),
        "frozen_retain": activation(frozen_retain),
        "target": target,
        "direction": torch.randn(4, generator=rng),
    }


def measured(given: dict[str, Any]) -> dict[str, float]:
    found = {
        **of_forget(given["forget"], given["frozen_forget"], given["target"], given["direction"]),
        **of_retain(given["retain"], given["frozen_retain"]),
    }
    return {name: value.item() for name, value in found.items()}


def test_measures_are_the_plain_formulas_over_counted_tokens(given: dict[str, Any]) -> None:
    mask = given["forget"].mask
    forget, retain, frozen_forget, frozen_retain = (
        given[name].h[mask] for name in ("forget", "retain", "frozen_forget", "frozen_retain")
    )

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean().item()

    expected = {
        "target_norm": given["target"][mask].norm(dim=-1).mean().item(),
        "forget_cos_frozen": cosine(forget, frozen_forget),
        "retain_cos_frozen": cosine(retain, frozen_retain),
        "retain_error": ((retain - frozen_retain).norm(dim=-1) / frozen_retain.norm(dim=-1)).mean().item(),
        "forget_norm_mean": forget.norm(dim=-1).mean().item(),
        "forget_norm_median": forget.norm(dim=-1).median().item(),
        "forget_norm_max": forget.norm(dim=-1).max().item(),
        "retain_norm_mean": retain.norm(dim=-1).mean().item(),
        "retain_norm_median": retain.norm(dim=-1).median().item(),
        "retain_norm_max": retain.norm(dim=-1).max().item(),
        "cos_direction": cosine(forget, given["direction"].expand_as(forget)),
    }
    assert measured(given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
def test_padding_is_in_no_measure(given: dict[str, Any], junk: float) -> None:
    clean = measured(given)
    for name in ("forget", "retain", "frozen_forget", "frozen_retain"):
        given[name].h[~given[name].mask] = junk
    given["target"][~given["forget"].mask] = junk

    assert measured(given) == clean


def test_one_target_for_all_tokens_and_no_direction(given: dict[str, Any]) -> None:
    found = measured({**given, "target": torch.full((1, 1, 4), 3.0), "direction": None})

    assert found["target_norm"] == pytest.approx(6)
    assert "cos_direction" not in found


def test_a_method_writes_them_down_beside_its_losses(given: dict[str, Any]) -> None:
    mask = given["forget"].mask
    batch = Batch(input_ids=torch.zeros(2, 3, dtype=torch.long), attention_mask=mask, mask=mask)
    method = RMU(steering_coeff=3.0, alpha=10.0)
    state = {"direction": given["direction"] / given["direction"].norm()}

    forget = method.forget_loss(Side(batch=batch, frozen=given["frozen_forget"], now=given["forget"]), state)
    retain = method.retain_loss(
        Side(batch=batch, frozen=given["frozen_retain"], now=given["retain"]), state, torch.Generator()
    )

    target = (3.0 * state["direction"])[None, None]
    expected = measured({**given, "target": target, "direction": state["direction"]}) | {"retain_floor": 0.0}
    found = {name: value.item() for name, value in {**forget.measures, **retain.measures}.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert forget.measures.keys().isdisjoint(retain.measures.keys())
    assert forget.loss.item() == pytest.approx((given["forget"].h - target)[mask].square().mean().item(), rel=1e-6)
    assert method.shown.format(**found) == f"norm {found['forget_norm_mean']:.3g} of 3"


def test_a_row_holds_every_measure_once(given: dict[str, Any]) -> None:
    found = measured(given)

    row = HistoryRow(step=3, topic="t", forget_loss=2.0, retain_loss=0.5, seconds=0.1, peak_mb=5.0, measures=found)

    made = row.as_dict()
    assert made.pop("measures") == found
    assert made == {
        "step": 3,
        "topic": "t",
        "forget_loss": 2.0,
        "retain_loss": 0.5,
        "seconds": 0.1,
        "peak_mb": 5.0,
    }
    assert HistoryRow.of(json.loads(json.dumps(row.as_dict()))) == row


# --- warnings


def history(
    topic: str, *, target: float, norms: tuple[float, float], cosines: Any = (0.1, 0.1), steps: int = 50
) -> Any:
    """Rows whose norm and cosine go straight from a first to a last value."""

    def between(ends: tuple[float, float], i: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * i / (steps - 1)

    def at(i: int) -> HistoryRow:
        norm = between(norms, i)
        return HistoryRow(
            step=i,
            topic=topic,
            forget_loss=1.0,
            retain_loss=0.0,
            seconds=0.1,
            peak_mb=1.0,
            measures={"forget_norm_mean": norm, "target_norm": target}
            | ({} if cosines is None else {"cos_direction": between(cosines, i)}),
        )

    return [at(i) for i in range(steps)]


@pytest.mark.parametrize("cosines", [(0.1, 0.15), None])
def test_a_target_out_of_reach_is_told_with_what_to_change(cosines: Any) -> None:
    assert stalled(history("bio", target=300.0, norms=(12.0, 13.0), cosines=cosines)) == (
        "topic bio: the forget norm has not moved towards its target (12 -> 13, target 300): the target is out of "
        "reach. Lower --steering-coeff (or --beta), raise --lr, or lower --alpha.",
    )


def test_a_target_shorter_than_the_activations_is_told_with_what_to_change() -> None:
    assert stalled(history("bio", target=6.5, norms=(20.0, 19.9))) == (
        "topic bio: the forget norm has not moved towards its target (20 -> 19.9, target 6.5): the target is shorter "
        "than the activations already are. Raise --steering-coeff (or --beta).",
    )


@pytest.mark.parametrize(
    "moved",
    [
        {"target": 100.0, "norms": (10.0, 20.0)},
        {"target": 6.5, "norms": (20.0, 15.0)},
        {"target": 6.5, "norms": (20.0, 20.0), "cosines": (0.1, 0.3)},
        {"target": 10.0, "norms": (10.0, 10.0)},
        {"target": 300.0, "norms": (12.0, 12.0), "steps": 49},
    ],
    ids=["longer", "shorter", "turned", "there from the start", "too early to tell"],
)
def test_a_run_that_moves_is_not_warned_of(moved: dict[str, Any]) -> None:
    assert stalled(history("bio", **moved)) == ()


def test_each_topic_is_judged_by_itself() -> None:
    moving = history("bio", target=100.0, norms=(10.0, 90.0), steps=100)[::2]
    stuck = history("cyber", target=100.0, norms=(10.0, 10.0), steps=100)[1::2]
    rows = [found for pair in zip(moving, stuck, strict=True) for found in pair]

    (warning,) = stalled(rows)

    assert warning.startswith("topic cyber: ")
    assert RMU().warnings(rows) == (warning,)


def test_moving_away_is_no_movement_towards_the_target() -> None:
    rows = history("bio", target=6.5, norms=(20.0, 40.0))

    assert len(stalled(rows)) == 1
    assert stalled([dataclasses.replace(found, forget_loss=0.0) for found in rows]) == stalled(rows)
    assert stalled([]) == ()
