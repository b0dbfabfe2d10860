"""Ranking rows by gradients: similarities by hand, planted rows found, the projection near to the whole gradients."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from lethe.advice import rank_rows
from lethe.advice.rank_rows import Sketch, gradients, rank, similarities
from lethe.cli.main import main
from lethe.data.data_folder import Row
from lethe.errors import CorpusError
from lethe.methods.directions import random_unit
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model, load_tokenizer
from lethe.model.slice import LayerSlice
from lethe.suites import world
from lethe.suites.world import exam


def rows(texts: Sequence[str], topic: str = "") -> list[Row]:
    return [Row(number=number, text=text, topic=topic) for number, text in enumerate(texts, start=1)]


@pytest.fixture(scope="module")
def layers() -> LayerSlice:
    model = load_model(world.MODEL_FOLDER, layers=4, dtype=torch.float32)
    return LayerSlice(model, 2, 4, trainable_names(model, 2, ()) + trainable_names(model, 3, ()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(world.MODEL_FOLDER)


def auc(planted: set[int], ranked: Sequence[int]) -> float:
    """Share of pairs of a planted and another row in which the planted one stands first."""
    others = better = 0
    for number in reversed(ranked):
        if number in planted:
            better += others
        else:
            others += 1
    return better / (len(planted) * others)


def test_similarities_are_mean_cosines_once_the_common_part_is_gone() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 3
    classes = [("forget", "a"), ("forget", "b"), ("retain", "r"), ("retain", "r"), ("retain", "r"), ("forget", "a")]
    own, to_class = similarities(features, classes)
    unit = normalize(features, dim=1)
    common = ((unit[0] + unit[5]) / 2 + unit[1] + unit[2:5].mean(0)) / 3
    cosines = torch.nn.functional.cosine_similarity((unit - common)[:, None], (unit - common)[None], dim=-1)
    torch.testing.assert_close(own[0], cosines[0, 5])
    torch.testing.assert_close(own[2], (cosines[2, 3] + cosines[2, 4]) / 2)
    assert own[1] == 0
    torch.testing.assert_close(to_class["retain", "r"], cosines[:, 2:5].mean(1))
    torch.testing.assert_close(to_class["forget", "a"], (cosines[:, 0] + cosines[:, 5]) / 2)


def planted(seed: int = 0) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Forget rows of two topics, the last five of them retain text; retain rows, the last five of them on a topic."""
    rng = random.Random(seed)
    topics = {name: rng.sample(texts, 15) for name, texts in exam.forget_texts().items()}
    kept = rng.sample(exam.retain_texts(), 30)
    pathogens, exploits = topics["pathogens"], topics["exploits"]
    forget = {"a.jsonl": rows(pathogens[:12] + kept[:5], "pathogens"), "b.jsonl": rows(exploits[:12], "exploits")}
    return forget, {"r.jsonl": rows(kept[5:] + pathogens[12:] + exploits[12:14])}


def test_planted_rows_are_found_in_the_built_in_world(layers: LayerSlice, tokenizer: Any) -> None:
    forget, retain = planted()
    found = rank(layers, tokenizer, forget, retain, max_length=64)
    assert auc(set(range(26, 31)), [row.number for row in found.retain]) >= 0.95
    generic = [row.number if row.source == "a.jsonl" else 0 for row in found.forget]
    assert auc(set(range(13, 18)), generic) >= 0.95
    assert [row.score for row in found.forget] == sorted((row.other - row.own for row in found.forget), reverse=True)
    nearest = {row.number: row.nearest for row in found.retain}
    assert [nearest[number] for number in (26, 27, 28, 29, 30)] == ["pathogens"] * 3 + ["exploits"] * 2


def test_a_forget_row_in_the_retain_corpus_fights_it_most(layers: LayerSlice, tokenizer: Any) -> None:
    topic = exam.forget_texts()["pathogens"][:8]
    found = rank(
        layers,
        tokenizer,
        {"forget.jsonl": rows(topic)},
        {"retain.jsonl": rows([*exam.retain_texts()[:12], topic[3]])},
        max_length=64,
    )
    assert (found.retain[0].number, found.retain[0].source) == (13, "retain.jsonl")
    assert found.retain[0].score > 2 * max(0, found.retain[1].score)


def test_of_retain_topics_the_least_like_counts_for_a_forget_row(layers: LayerSlice, tokenizer: Any) -> None:
    topics = exam.forget_texts()
    forget = {"f.jsonl": rows(topics["exploits"][:5])}
    near, far = rows(topics["exploits"][:5], "near"), rows(topics["pathogens"][:5], "far")
    found = rank(layers, tokenizer, forget, {"r.jsonl": [*near, *far]}, max_length=32)
    whole = features(layers, tokenizer, [row.text for row in (*forget["f.jsonl"], *near, *far)], seed=0)
    to_class = similarities(whole, [("forget", "f")] * 5 + [("retain", "near")] * 5 + [("retain", "far")] * 5)[1]
    assert {row.nearest for row in found.forget} == {"far"}
    for row in found.forget:
        assert row.other == pytest.approx(float(to_class["retain", "far"][row.number - 1]), abs=0.05)


def features(layers: LayerSlice, tokenizer: Any, texts: Sequence[str], seed: int) -> torch.Tensor:
    """Whole gradients, not shortened, along the direction of a seed."""
    direction = random_unit(layers.d_model, "gaussian", torch.Generator().manual_seed(seed))
    batches = [rank_rows._batch(text, tokenizer, 32) for text in texts]
    found = [gradients(layers, batch, direction) for batch in batches if batch is not None]
    return torch.stack([torch.cat([gradient.flatten() for gradient in one]) for one in found])


@pytest.mark.parametrize("rank_one", [True, False])
def test_a_sketch_keeps_inner_products(rank_one: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    if rank_one:
        left, right = torch.randn(1, 60, 1, generator=rng), torch.randn(8, 1, 90, generator=rng)
        matrices = left * (right + right[:1])
    else:
        matrices = torch.randn(8, 60, 90, generator=rng)
        matrices = matrices + matrices[:1]
    sketch = Sketch((60, 90), 4096, torch.device("cpu"), rng)
    whole, short = normalize(matrices.flatten(1), dim=1), normalize(torch.stack([*map(sketch, matrices)]), dim=1)
    torch.testing.assert_close(short @ short.T, whole @ whole.T, atol=0.08, rtol=0)


def test_a_sketch_adds_each_entry_once() -> None:
    sketch = Sketch((3, 4), 7, torch.device("cpu"), torch.Generator().manual_seed(1))
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(7)
    for i in range(3):
        for j in range(4):
            place = int(sketch.places[0][i] + sketch.places[1][j]) % 7
            expected[place] += sketch.signs[0][i] * sketch.signs[1][j] * matrix[i, j]
    torch.testing.assert_close(sketch(matrix), expected)


def test_similarities_of_sketches_are_those_of_whole_gradients(layers: LayerSlice, tokenizer: Any) -> None:
    whole = features(layers, tokenizer, exam.retain_texts()[:8], seed=0)
    assert whole.shape[1] == sum(parameter.numel() for parameter in layers.trained.values())
    shapes = [parameter.shape for parameter in layers.trained.values()]
    rng = torch.Generator().manual_seed(1)
    sketches = [Sketch((shape[0], shape[1]), rank_rows.NUMBERS // 2, torch.device("cpu"), rng) for shape in shapes]
    parts = whole.split([shape.numel() for shape in shapes], dim=1)
    short = torch.cat(
        [
            torch.stack([sketch(row.reshape(shape)) for row in part])
            for sketch, part, shape in zip(sketches, parts, shapes, strict=True)
        ],
        dim=1,
    )
    cosines = [normalize(found, dim=1) @ normalize(found, dim=1).T for found in (short, whole)]
    torch.testing.assert_close(*cosines, atol=0.05, rtol=0)


def test_a_gradient_is_the_slope_of_the_mean_activation_along_the_direction(layers: LayerSlice, tokenizer: Any) -> None:
    direction = random_unit(layers.d_model, "gaussian", torch.Generator().manual_seed(3))
    batch = rank_rows._batch(exam.retain_texts()[0], tokenizer, 16)
    assert batch is not None
    last = list(layers.trained)[-1]
    slope = gradients(layers, batch, direction)[-1]
    recording = layers.record(batch)
    step = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = (layers(recording)[batch.mask] @ direction).mean()
        layers.trained[last] += 1e-2 * step
        after = (layers(recording)[batch.mask] @ direction).mean()
        layers.restore()
    # The output of the last layer is linear in its last matrix.
    torch.testing.assert_close((after - before) / 1e-2, (slope * step).sum(), rtol=1e-2, atol=1e-3)


def test_rows_without_a_token_are_left_out_and_counted(layers: LayerSlice, tokenizer: Any) -> None:
    real = rank_rows._batch

    def of_nothing(text: str, *_: Any) -> Any:
        return None if text == "nothing" else real(text, tokenizer, 16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_rows, "_batch", of_nothing)
        retain = {"r.jsonl": rows(["nothing", *exam.retain_texts()[:3]])}
        found = rank(layers, tokenizer, {"f.jsonl": rows(exam.forget_texts()["exploits"][:3])}, retain, max_length=16)
        assert (found.left_out, sorted(row.number for row in found.retain)) == (1, [2, 3, 4])
        with pytest.raises(CorpusError, match="no row of the retain corpus is one that this tokenizer can read"):
            rank(layers, tokenizer, {"f.jsonl": rows(["a"])}, {"r.jsonl": rows(["nothing"])}, max_length=16)


def test_the_command_writes_all_rows_and_shows_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in (("forget", exam.forget_texts()["exploits"][:4]), ("retain", exam.retain_texts()[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["data", "rank", str(tmp_path), "--layer", "1", "--max-length", "16", "--top", "1", "--out"]
    with pytest.raises(SystemExit) as ended:
        main([*argv, str(tmp_path / "rows.csv")])
    assert ended.value.code == 0
    captured = capsys.readouterr()
    table = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["side"] for row in table] == ["retain"] * 4 + ["forget"] * 4
    assert captured.out.count("retain.jsonl") == captured.out.count("forget.jsonl") == 1
    with pytest.raises(SystemExit):
        main([*argv, str(tmp_path / "rows.json"), "--json"])
    found = json.loads((tmp_path / "rows.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert (found["layer"], len(found["trained"])) == (1, 2)
    assert float(table[0]["score"]) == found["retain"][0]["score"]
    words = exam.forget_texts()["exploits"][0].split()
    assert " ".join(words[:4]) not in captured.out + captured.err + (tmp_path / "rows.json").read_text()
