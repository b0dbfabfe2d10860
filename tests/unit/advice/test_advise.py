"""The adviser: what is read of each layer, what the rule chooses, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lethe.advice.advise import Advice, advise, choose, choose_alpha
from lethe.advice.layer_readings import LayerReading, Samples, read_layers, separate
from lethe.errors import CorpusError
from lethe.runs.config import RunConfig
from lethe.suites.builtin import Builtin
from lethe.system.progress import Progress

BUILTIN = RunConfig.of(model="builtin", **Builtin.suits)


@pytest.fixture(scope="module")
def found() -> Advice:
    return advise(BUILTIN.changed(layer=0), Progress())


def test_the_built_in_models_advice(found: Advice) -> None:
    reach = [row.reach for row in found.layers]
    assert [row.layer for row in found.layers] == list(range(12))
    assert all(later <= max(reach) / 2 for later in reach[found.chosen.layer + 1 :])
    assert reach[found.chosen.layer] >= max(reach) / 2
    # The full sweep in docs/results.md: there Adaptive RMU forgets most at layers 6, 7 and 8.
    assert found.chosen.layer in (6, 7, 8)
    assert [other.layer for other in found.runners_up] == [found.chosen.layer - 1, found.chosen.layer + 1]
    assert found.chosen.alpha == 10
    assert found.chosen.steering_coeff == pytest.approx(2 * found.layers[found.chosen.layer].median_norm, rel=5e-3)
    assert found.layers[-1].passed_on == pytest.approx(1, abs=1e-3)
    assert all(0 < (row.separability or 0) < 1 for row in found.layers)
    assert f"Layer {found.chosen.layer} of 0..11" in found.reason


def test_it_survives_json(found: Advice, tmp_path: Path) -> None:
    written = json.loads(found.save(tmp_path / "advice.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(found)))
    assert written["layers"][3]["reach"] == found.layers[3].reach


def reading(layer: int, reach: float, moved: tuple[float, ...] | None = None) -> LayerReading:
    return LayerReading(
        layer=layer, median_norm=1.0, mean_norm=1.0, growth=1.0, passed_on=1.0, reach=reach, separability=None,
        retain_moved=moved,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reach", "layer"),
    [((0.2, 0.8, 0.5, 0.41, 0.39, 0.1), 3), ((0.1, 0.2, 0.3), 2), ((0.9, 0.1, 0.46), 2), ((0, 0), 1)],
)
def test_the_deepest_layer_with_half_the_greatest_reach_is_chosen(reach: tuple[float, ...], layer: int) -> None:
    assert choose([reading(k, float(value)) for k, value in enumerate(reach)]).layer == layer


def test_alpha_is_the_least_that_keeps_retain_tokens_in_place() -> None:
    rows = [reading(0, 1.0, (0.4, 0.1, 0.0, 0.0)), reading(1, 1.0, (0.5, 0.2, 0.0, 0.0)), reading(2, 1.0)]
    assert choose_alpha(rows) == 10  # twice the median of 0.1 and 0.2 is below a third
    assert choose_alpha([reading(0, 1.0, (1.0, 1.0, 1.0, 1.0))]) == 1000
    assert choose_alpha([reading(0, 1.0)]) == 10


def test_separate_is_ridge_regression_by_the_better_penalty() -> None:
    rng = torch.Generator().manual_seed(0)
    shift = torch.zeros(6)
    shift[0] = 4.0

    def rows(count: int, forget: bool) -> torch.Tensor:
        return (0.1 * torch.randn(count, 6, generator=rng) + forget * shift).double()

    fit, held = (rows(40, True), rows(30, False)), (rows(50, True), rows(50, False))
    missed, leaked = separate(fit, held, 10.0)
    errors = []
    for lam in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        a = fit[0].T @ fit[0] / 40 + 10 * fit[1].T @ fit[1] / 30
        w = torch.linalg.solve(a + lam * a.diagonal().mean() * torch.eye(6), fit[0].mean(0))
        errors.append(((held[0] @ w - 1).square().mean().item(), (held[1] @ w).square().mean().item()))
    assert (missed, leaked) == pytest.approx(min(errors, key=lambda e: e[0] + 10 * e[1]))
    assert missed < 0.01
    same = rows(40, False)
    assert sum(separate((same, same), (rows(50, False), rows(50, False)), 1.0)) > 0.9


def test_readings_of_any_model_are_those_of_its_own_forward(tiny_model: Any, tiny_batch: Any) -> None:
    for kind in ("llama", "gpt2", "mixtral"):
        changes = {"num_local_experts": 2} if kind == "mixtral" else {}
        model = tiny_model(kind, **changes)
        batches = [tiny_batch(seed=seed, count="no-first") for seed in range(4)]
        samples = Samples(
            fit_forget=(batches[0],), fit_retain=(batches[1],), held_forget=(batches[2],), held_retain=(batches[3],)
        )
        rows, tokens = read_layers(model, samples, Progress())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        states = model(
            input_ids=batches[2].input_ids,
            attention_mask=batches[2].attention_mask.long(),
            output_hidden_states=True,
        ).hidden_states
        first = model(
            input_ids=batches[0].input_ids,
            attention_mask=batches[0].attention_mask.long(),
            output_hidden_states=True,
        ).hidden_states
        norms = torch.cat([states[2][batches[2].mask], first[2][batches[0].mask]]).norm(dim=-1)
        assert rows[1].median_norm == pytest.approx(norms.median().item(), rel=1e-5)
        assert tokens == (4 + 1 + 5) * 21
        assert (rows[0].separability is None) == (kind == "mixtral")
        assert rows[-1].passed_on == pytest.approx(1, abs=1e-4)


def test_a_model_of_ones_own(foreign_model: Path, tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"The {name} text number {n} is here." for n in range(9)))
    config = RunConfig.of(
        model=str(foreign_model), forget=(str(tmp_path / "forget.txt"),), retain=str(tmp_path / "retain.txt"), steps=7
    )
    found = advise(config, Progress())
    assert len(found.layers) == 4
    again = advise(config.changed(layer=2), Progress())
    assert (again.layers, again.reason, again.tokens) == (found.layers, found.reason, found.tokens)
    assert found.chosen.steps == 7
    assert found.chosen.minutes > 0
    assert "number" not in json.dumps(dataclasses.asdict(found))


def test_corpora_that_are_missing_or_too_small_are_refused(foreign_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="Pass --forget and --retain FILE"):
        advise(RunConfig.of(model=str(foreign_model)), Progress())
    (tmp_path / "one.txt").write_text("One text alone.")
    (tmp_path / "more.txt").write_text("Some text.\n\nAnother text.\n\nA third.")
    one, more = str(tmp_path / "one.txt"), str(tmp_path / "more.txt")
    with pytest.raises(CorpusError, match="forget corpus 'one' has 1 text, and advice needs two"):
        advise(RunConfig.of(model=str(foreign_model), forget=(one,), retain=more), Progress())
    with pytest.raises(CorpusError, match="retain corpus has 1 text"):
        advise(RunConfig.of(model=str(foreign_model), forget=(more,), retain=one), Progress())
