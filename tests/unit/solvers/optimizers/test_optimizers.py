from typing import Any

import pytest
import torch
from tools.world.muon import Muon as GroupedMuon
from torch import Tensor, nn

from lethe.errors import InvalidValueError
from lethe.solvers import optimizers
from lethe.solvers.optimizers.adamw import AdamW
from lethe.solvers.optimizers.learning_rate import LearningRate
from lethe.solvers.optimizers.muon import Muon
from lethe.solvers.optimizers.sgd import SGD
from lethe.system.plugins import discover

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.up_proj.weight": (16, 4),
    "model.layers.0.mlp.experts.up": (2, 16, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.down_proj.weight": (4, 16),
    "lm_head.weight": (9, 4),
}


def parameters() -> dict[str, nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=rng)) for name, shape in SHAPES.items()}


def train(moved: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for parameter in moved.values():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        optimizer.step()
    return [parameter.detach().clone() for parameter in moved.values()]


def test_the_shelf_holds_optimizers_alone() -> None:
    assert discover(optimizers) == {"adamw": AdamW, "muon": Muon, "sgd": SGD}


def test_adamw_is_that_of_the_published_code() -> None:
    ours, theirs = parameters(), parameters()
    plain = torch.optim.AdamW(list(theirs.values()), lr=5e-5, eps=1e-6, weight_decay=0.0, fused=True)

    moved = train(ours, AdamW().build(ours), range(5))

    assert all(map(torch.equal, moved, train(theirs, plain, range(5))))


def test_sgd_steps_along_the_gradient() -> None:
    ours = parameters()
    before = [parameter.detach().clone() for parameter in ours.values()]

    moved = train(ours, SGD(lr=0.5).build(ours), range(1))

    gradients = [parameter.grad for parameter in ours.values()]
    for new, old, gradient in zip(moved, before, gradients, strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient)


def test_muon_moves_matrices_in_layers_and_adamw_the_rest() -> None:
    ours, theirs = parameters(), parameters()
    inner = [p for name, p in theirs.items() if "layers" in name and p.ndim == 2]
    rest = {name: p for name, p in theirs.items() if all(p is not matrix for matrix in inner)}
    grouped = GroupedMuon(inner, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}

    train(ours, Muon().build(ours), range(3))
    train(rest, torch.optim.AdamW(list(rest.values()), lr=1e-3, weight_decay=0.0, fused=True), range(3))
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        grouped.step(0.02)

    for name, parameter in ours.items():
        if name in rest:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0.01)
            continue
        step = (theirs[name] - before[name]).norm()
        assert (parameter - theirs[name]).norm() < 0.05 * step


def test_muon_leaves_embeddings_to_adamw() -> None:
    ours = parameters()
    optimizer = Muon().build(ours)
    train(ours, optimizer, range(1))

    by_kind = {name: set(optimizer.state[parameter]) for name, parameter in ours.items()}

    assert {name for name, keys in by_kind.items() if keys == {"momentum_buffer"}} == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert all(keys == {"step", "exp_avg", "exp_avg_sq"} for keys in by_kind.values() if len(keys) > 1)


@pytest.mark.parametrize("kind", [AdamW(), Muon(), SGD(momentum=0.9)])
@pytest.mark.parametrize("way", ["by parameter", "state dict"])
def test_a_run_goes_on_from_its_saved_state(kind: Any, way: str) -> None:
    whole, first = parameters(), parameters()
    expected = train(whole, kind.build(whole), range(6))
    optimizer = kind.build(first)
    train(first, optimizer, range(3))
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}

    resumed = kind.build(second)
    if way == "state dict":
        resumed.load_state_dict(optimizer.state_dict())
    else:
        for name, parameter in second.items():
            state = optimizer.state[first[name]]
            assert state
            assert all(isinstance(value, Tensor) for value in state.values())
            resumed.state[parameter] = {key: value.clone() for key, value in state.items()}

    assert all(map(torch.equal, train(second, resumed, range(3, 6)), expected))


def test_a_schedule_changes_all_rates_of_muon() -> None:
    ours = parameters()
    optimizer = Muon().build(ours)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in ours.values()]

    assert all(map(torch.equal, train(ours, optimizer, range(2)), before))


def test_a_learning_rate_warms_up_and_decays() -> None:
    assert [LearningRate().share(step, 4) for step in range(4)] == [1, 1, 1, 1]
    assert [LearningRate(warm_up=3).share(step, 5) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [LearningRate(decay=0.5).share(step, 8) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    with pytest.raises(InvalidValueError, match="'decay' must be in"):
        LearningRate(decay=1.5)
    with pytest.raises(InvalidValueError, match="'warm_up' must be at least 0"):
        LearningRate(warm_up=-1)
