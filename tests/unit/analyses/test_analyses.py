"""Analyses on a tiny random model, each against its plainly written numbers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lethe import analyses
from lethe.analyses import max_logit, prompt_independence, token_gradient
from lethe.analyses.accuracy import Accuracy
from lethe.analyses.alignment import Alignment
from lethe.analyses.forget_norm import ForgetNorm
from lethe.analyses.layers import Layers
from lethe.analyses.max_logit import MaxLogit
from lethe.analyses.noise_sensitivity import NoiseSensitivity
from lethe.analyses.prompt_independence import PromptIndependence
from lethe.analyses.protocol import Analysis, Finding, analyze_all, summary, write
from lethe.analyses.token_gradient import TokenGradient
from lethe.analyses.workbench import Bench, open_bench, spread_layers
from lethe.errors import InvalidLayerError, RunFolderError, UsageError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.inference.spans import Span
from lethe.methods.rmu import RMU
from lethe.metrics.multiple_choice import MultipleChoice
from lethe.model.loading import load_model
from lethe.model.patch import Patch
from lethe.report.standalone_figures import drawing
from lethe.runs.config import RunConfig
from lethe.runs.unlearn import unlearn
from lethe.system.plugins import discover

SECRET = "zimbarel"
"""A word of every forget text and question, and of nothing else."""

QUICK: dict[str, Any] = {
    "accuracy": Accuracy(multiples=(0.5, 2.0), snapshots=2, seeds=2, questions=4),
    "alignment": Alignment(multiples=(0.5, 2.0), seeds=2),
    "forget-norm": ForgetNorm(layers=(1, 3)),
    "layers": Layers(layers=(1, 3), questions=4),
    "max-logit": MaxLogit(multiples=(2.0,), questions=4, new_tokens=5),
    "noise-sensitivity": NoiseSensitivity(ratios=(0.1, 1.0), texts=2, draws=2),
    "prompt-independence": PromptIndependence(multiples=(2.0,), questions=4),
    "token-gradient": TokenGradient(multiples=(2.0,), questions=3),
}


@pytest.fixture(scope="module")
def config(foreign_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("material")
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight")
    for name, word in (("forget", SECRET), ("retain", "garden")):
        texts = [f"The {word} of {n} is a long way from the {word} of {m}." for n in numbers for m in numbers[:3]]
        (folder / f"{name}.txt").write_text("\n\n".join(texts))
        rows = [
            {"question": f"Where is the {word} of {n}?", "choices": ["here", "there", "nowhere"], "answer": k % 3}
            for k, n in enumerate(numbers)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RunConfig.of(
        model=str(foreign_model),
        forget=(str(folder / "forget.txt"),),
        retain=str(folder / "retain.txt"),
        forget_questions=folder / "forget.jsonl",
        retain_questions=folder / "retain.jsonl",
        scoring="cloze",
        layer=2,
        steps=4,
        batch_size=2,
        max_length=(32,),
        lr=1e-2,
        device="cpu",
        out=folder / "run",
    )


@pytest.fixture(scope="module")
def bench(config: RunConfig) -> Bench:
    return Bench(config)


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    unlearn(RMU(steering_coeff=3.0), config.changed(evaluate="none"))
    return config.out


def weights(bench: Bench) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in bench.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def forget_tokens(bench: Bench, layer: int, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `read` makes of the tokens of each forget text at a layer's output, read one text at a time without BOS."""
    found = []
    for text in bench.forget["forget"][:64]:
        ids = torch.tensor([bench.tokenizer(text)["input_ids"]])
        ids = ids[:, : ids.shape[1] - int(ids[0, -1] == bench.tokenizer.eos_token_id)]
        with torch.no_grad():
            states = bench.model.model(input_ids=ids, output_hidden_states=True).hidden_states
        # The library's last hidden state is the one after the final norm.
        assert layer + 1 < len(states) - 1
        found.append(read(states[layer + 1][0, int(ids[0, 0] == bench.tokenizer.bos_token_id) :]))
    return found


def test_every_analysis_is_found_and_says_where_it_comes_from() -> None:
    known = discover(analyses)
    assert known.keys() == QUICK.keys()
    for name, kind in known.items():
        assert isinstance(kind(), Analysis)
        assert kind.source
        assert kind.__doc__
        assert type(QUICK[name]) is kind


@pytest.mark.parametrize("name", QUICK)
def test_a_finding_is_whole_and_the_base_is_put_back(name: str, bench: Bench, tmp_path: Path) -> None:
    before = weights(bench)
    finding = QUICK[name](bench)
    assert same(weights(bench), before)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in bench.model.parameters())
    assert finding.name == name
    assert finding.title
    assert finding.reading.endswith(".")
    assert not any(broken in finding.reading for broken in ("nan", "inf ", "{", "None"))
    for axes in finding.figure.axes:
        assert axes.get_xlabel()
    assert finding.figure.axes[0].get_ylabel()
    paths = write(finding, tmp_path)
    assert [path.name for path in paths] == [f"{name}.json", f"{name}.svg", f"{name}.png"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    text = paths[0].read_text()
    assert json.loads(text)["reading"] == finding.reading
    assert "NaN" not in text
    assert SECRET not in text + paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    first = [path.read_bytes() for path in paths]
    write(finding, tmp_path)
    assert [path.read_bytes() for path in paths] == first


def test_training_in_memory_equals_a_run(bench: Bench, run: Path) -> None:
    edit = bench.train(RMU(steering_coeff=3.0), at=(2, 4))
    patch = Patch.load(run / "patch.safetensors")
    assert same(dict(edit.weights), patch.tensors)
    assert same(dict(edit.snapshots[4]), patch.tensors)
    assert not same(dict(edit.snapshots[2]), patch.tensors)
    losses = [json.loads(line)["forget_loss"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert [row.forget_loss for row in edit.history] == losses


def test_coefficients_of_one_layer_share_recordings_and_no_edit_is_made_twice(config: RunConfig) -> None:
    bench = Bench(config)
    first = bench.train(RMU(steering_coeff=3.0))
    recordings = bench.workspace.recordings
    assert recordings is not None
    passes = recordings.passes
    assert passes > 0
    assert bench.train(RMU(steering_coeff=4.0)) is not first
    assert recordings.passes == passes
    assert bench.train(RMU(steering_coeff=3.0)) is first


def test_an_edit_is_taken_back_even_if_what_it_serves_fails(bench: Bench) -> None:
    before = weights(bench)
    edit = bench.train(RMU(steering_coeff=3.0))

    def fail() -> None:
        with bench.applied(edit.weights) as subject:
            assert not same(weights(bench), before)
            assert same(subject.originals, {name: before[name] for name in edit.weights})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert same(weights(bench), before)


def test_the_norm_that_coefficients_are_multiples_of(bench: Bench) -> None:
    tokens = torch.cat(forget_tokens(bench, 2, lambda h: h.norm(dim=-1)))
    assert bench.norms()[2] == pytest.approx(float(tokens.median()), rel=1e-5)
    assert bench.coefficients((2.0,)) == [pytest.approx(2 * float(tokens.median()), rel=5e-3)]


def test_alignment_is_the_cosine_with_the_direction_of_each_seed(bench: Bench) -> None:
    finding = Alignment(multiples=(2.0,), seeds=2)(bench)
    by_text, by_token = [], []
    for seed in (0, 1):
        edit = bench.train(bench.rmu(finding.data["rows"][1]["c"]), seed=seed)
        u = edit.directions["forget"]
        assert float(u.norm()) == pytest.approx(1)
        with bench.applied(edit.weights):
            by_text += forget_tokens(bench, 2, lambda h: torch.cosine_similarity(h.mean(0), u, 0)[None])  # noqa: B023
            by_token += forget_tokens(bench, 2, lambda h: torch.cosine_similarity(h, u[None], 1))  # noqa: B023
    row = finding.data["rows"][1]
    assert row["by_text"]["mean"] == pytest.approx(float(torch.cat(by_text).mean()), abs=1e-5)
    assert row["by_token"]["mean"] == pytest.approx(float(torch.cat(by_token).mean()), abs=1e-5)
    assert row["by_token"]["quantiles"]["50"] == pytest.approx(float(torch.cat(by_token).median()), abs=1e-2)
    assert row["by_text"]["n"] == len(by_text)


def test_alignment_of_a_strong_and_long_push_grows_and_is_said_to(config: RunConfig) -> None:
    bench = Bench(config.changed(steps=12, lr=5e-2))
    bench.method_of_run = RMU(steering_coeff=1.0, alpha=0.0)
    finding = Alignment(multiples=(1.0, 8.0), seeds=1)(bench)
    base, _, strong = (row["by_text"]["mean"] for row in finding.data["rows"])
    assert strong > base + 0.2
    means = [row["by_text"]["mean"] for row in finding.data["rows"]]
    grows = means == sorted(means)
    assert ("grows with every increase" in finding.reading) == grows


@pytest.mark.parametrize("on", ["sequences", "mean vector"])
@pytest.mark.parametrize("kind", ["each", "onward"])
def test_phi_by_hand(kind: str, on: str, config: RunConfig) -> None:
    bench = Bench(config.changed(layer=0))
    ratio, read = 0.3, 1 if kind == "each" else 2
    finding = NoiseSensitivity(ratios=(ratio,), texts=1, draws=1)(bench)
    row = next(r for r in finding.data["models"][0]["rows"] if (r["kind"], r["on"], r["layer"]) == (kind, on, read))
    units = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    xi = ratio * bench.norms()[0] * units[0] / units[0].norm()
    # The analysis reads the longest row of the first batch.
    batch = bench.forget_batches()["forget"][0]
    counted = batch.mask[0]
    ids = batch.input_ids[:1][:, batch.attention_mask[0]]
    states: dict[str, Tensor] = {}

    def forward(inside: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        layers = bench.model.model.layers
        handles = [
            layers[0].register_forward_hook(lambda _, __, out: inside(out)),
            layers[read].register_forward_hook(lambda _, __, out: states.update(out=out)),
        ]
        with torch.no_grad():
            bench.model(input_ids=tokens)
        for handle in handles:
            handle.remove()
        return states["out"]

    if on == "sequences":
        clean, noisy = forward(lambda h: h, ids), forward(lambda h: h + xi, ids)
        keep = counted[batch.attention_mask[0]]
    else:
        first: dict[str, Tensor] = {}
        forward(lambda h: first.setdefault("h", h), ids)
        mean = first["h"][0, counted[batch.attention_mask[0]]].mean(0)[None, None]
        clean, noisy = forward(lambda h: mean, ids[:, :1]), forward(lambda h: mean + xi, ids[:, :1])
        keep = torch.ones(1, dtype=torch.bool)
    phi = ((noisy - clean).norm(dim=-1) ** 2 / clean.norm(dim=-1) ** 2)[0, keep].mean()
    assert row["mean"] == pytest.approx(float(phi), rel=1e-4)


def test_prompt_independence_against_loops() -> None:
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    found = prompt_independence._independence(z)
    p = z.double().softmax(1)

    def kl(rows: list[int]) -> float:
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return sum(float((p[i] * (p[i] / p[j]).log()).sum()) for i, j in pairs) / len(pairs)

    def spread(rows: list[int]) -> float:
        centred = z[rows].double() - z[rows].double().mean(1, keepdim=True)
        mean = centred.mean(0)
        return float(((centred - mean) ** 2).sum(1).mean() / (mean**2).sum())

    everything = list(range(5))
    for name, measure in (("kl", kl), ("spread", spread)):
        assert found[name] == pytest.approx(measure(everything))
        without = [measure([k for k in everything if k != left]) for left in everything]
        mean = sum(without) / 5
        assert found[f"{name}_stderr"] == pytest.approx(math.sqrt(4 / 5 * sum((w - mean) ** 2 for w in without)))


def test_prompts_that_all_get_one_prediction_are_independent_whatever_is_added_to_their_logits() -> None:
    z = torch.randn(1, 7).repeat(4, 1) + torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    found = prompt_independence._independence(z)
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["spread"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="at least 3 questions"):
        prompt_independence._independence(z[:2])


def test_the_reading_of_independence_follows_the_numbers() -> None:
    def row(label: str, kl: float) -> dict[str, Any]:
        return {"label": label, "forget": {"kl": kl, "kl_stderr": 0.1, "spread": 1.0}}

    for left, said in ((0.1, "collapsed onto one, as"), (5.0, "less than before"), (9.9, "still depend")):
        reading = prompt_independence._reading({"layer": 2, "models": [row("base", 10.0), row("c = 9", left)]})
        assert said in reading


def test_max_logit_is_that_of_a_plain_greedy_loop(bench: Bench) -> None:
    asked = bench.asked("forget", 3)
    subject = LoadedModel(model=bench.model, tokenizer=bench.tokenizer)
    answers = max_logit._answers(subject, asked.questions, "cloze", 4)
    plain: list[list[tuple[float, float]]] = []
    for question in asked.questions:
        ids = bench.tokenizer(question.prompt)["input_ids"]
        ids = ids[:-1] if ids[-1] == bench.tokenizer.eos_token_id else ids
        found = []
        for _ in range(4):
            with torch.no_grad():
                logits = bench.model(torch.tensor([ids])).logits[0, -1]
            found.append((float(logits.max()), float(logits.softmax(-1).max())))
            ids = [*ids, int(logits.argmax())]
            if ids[-1] == bench.tokenizer.eos_token_id:
                break
        plain.append(found)
    assert sorted(a.flatten().tolist() for a in answers) == [
        pytest.approx([value for pair in found for value in pair], rel=1e-4)
        for found in sorted(plain, key=lambda found: [v for pair in found for v in pair])
    ]


def test_the_token_gradient_is_that_of_one_hot_tokens(bench: Bench) -> None:
    span = Span(ids=(0, 20, 30, 40, 50), start=3)
    subject = LoadedModel(model=bench.model, tokenizer=bench.tokenizer)
    ((loss, norm),) = token_gradient._gradients(subject, [span])
    table = bench.model.get_input_embeddings().weight.detach()
    one_hot = torch.nn.functional.one_hot(torch.tensor([span.ids]), len(table)).float().requires_grad_(True)
    logits = bench.model(inputs_embeds=one_hot @ table).logits[0].log_softmax(-1)
    expected = -(logits[2, 40] + logits[3, 50]) / 2
    (gradient,) = torch.autograd.grad(expected, one_hot)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert norm == pytest.approx(float(gradient[0, :3].norm()), rel=1e-4)


def test_accuracy_is_the_metric_s_on_the_edited_model(bench: Bench) -> None:
    finding = Accuracy(multiples=(2.0,), snapshots=2, seeds=1, questions=8)(bench)
    edit = bench.train(bench.rmu(bench.coefficients((2.0,))[0]), at=(2, 4))
    for step, point in zip((2, 4), finding.data["by_step"][0]["path"], strict=True):
        with bench.applied(edit.snapshots[step]) as subject:
            scores = MultipleChoice()(Reading(subject, bench.asked("forget", 8)))
        assert scores is not None
        assert (point["step"], point["forget"]["mean"]) == (step, scores.value)
        assert point["forget"]["stderr"] == pytest.approx(scores.stderr)
    last = finding.data["by_c"][0]
    assert last["forget"]["mean"] == point["forget"]["mean"] == last["forget_by_seed"][0]
    assert finding.data["chance"] == pytest.approx(1 / 3)


def test_forget_norms_are_those_of_the_history_and_of_the_texts(bench: Bench) -> None:
    finding = ForgetNorm(layers=(1, 2))(bench)
    row = finding.data["rows"][1]
    edit = bench.train(bench.rmu(finding.data["c"]), layer=2)
    assert row["norm"] == [step.measures["forget_norm_mean"] for step in edit.history]
    with bench.applied(edit.weights):
        tokens = torch.cat(forget_tokens(bench, 2, lambda h: h.norm(dim=-1)))
    assert row["after"]["without_bos"] == pytest.approx(float(tokens.mean()), rel=1e-5)
    assert row["after"]["with_bos"] != pytest.approx(row["after"]["without_bos"], rel=1e-6)
    assert finding.data["c"] == pytest.approx(2 * bench.norms()[1], rel=5e-3)


def test_layers_train_both_methods_at_each_layer(bench: Bench) -> None:
    finding = Layers(layers=(1, 3), questions=8)(bench)
    assert [(r["method"], r["layer"]) for r in finding.data["rows"]] == [
        (method, layer) for layer in (1, 3) for method in ("RMU", "Adaptive RMU")
    ]
    edit = bench.train(bench.rmu(finding.data["c"]), layer=3)
    assert {name.split(".")[2] for name in edit.weights} == {"1", "2", "3"}
    hits = bench.hits(edit.weights, bench.asked("retain", 8))
    assert finding.data["rows"][2]["retain"] == pytest.approx(summary(hits))
    with pytest.raises(InvalidLayerError):
        Layers(layers=(1, 9))(bench)


def test_a_run_is_compared_with_its_base(run: Path) -> None:
    bench = open_bench(str(run), {})
    base, edited = bench.variants((1.0, 2.0))
    assert (base.label, edited.label) == ("base", "this run")
    assert same(dict(edited.weights), Patch.load(run / "patch.safetensors").tensors)
    untouched = load_model(bench.config.base.model)
    assert same(weights(bench), dict(untouched.named_parameters()))
    finding = QUICK["noise-sensitivity"](bench)
    assert [model["label"] for model in finding.data["models"]] == ["base", "this run"]
    for name in ("max-logit", "prompt-independence", "token-gradient"):
        assert "this run" in QUICK[name](bench).reading
    assert bench.rmu(2.0).alpha == 1200.0


def test_what_lacks_its_inputs_says_so_and_stands_on_the_page(config: RunConfig, tmp_path: Path) -> None:
    bare = Bench(RunConfig.of(model=config.base.model, layer=2, device="cpu", forget=config.data.forget))
    findings, missing = analyze_all(bare, QUICK, tmp_path / "all")
    assert findings.keys() == {"noise-sensitivity"}
    assert "--forget-questions" in missing["accuracy"]
    assert "--retain" in missing["alignment"]
    page = (tmp_path / "all" / "analyses.html").read_text()
    assert all(f"<strong>{name}</strong>" in page for name in missing)
    assert findings["noise-sensitivity"].title in page
    assert "<svg" in page
    assert "http" not in page.split("<svg", 1)[1].split("</svg>")[0]
    assert "#1c1e21" not in page.split("<svg", 1)[1]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "analyses.html", "noise-sensitivity.json", "noise-sensitivity.svg", "noise-sensitivity.png",
    }  # fmt: skip
    bare = Bench(RunConfig.of(model=config.base.model, layer=2, device="cpu"))
    with pytest.raises(UsageError, match="--forget FILE"):
        NoiseSensitivity()(bare)
    with pytest.raises(UsageError, match="--forget and --retain FILE"):
        bare.train(RMU())


def test_a_folder_that_is_no_model_and_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="neither a run folder nor a model folder"):
        open_bench(str(tmp_path), {})


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    with drawing() as (figure, (axes,)):
        axes.set(xlabel="x", ylabel="y")
    finding = Finding(
        name="odd",
        title="Odd",
        reading="Odd.",
        data={"a": math.nan, "b": (1.0, math.inf), 3: {"c": None}},
        figure=figure,
    )
    path, *_ = write(finding, tmp_path / "new")
    assert json.loads(path.read_text())["data"] == {"a": None, "b": [1.0, None], "3": {"c": None}}


def test_layers_are_spread_from_the_third_to_the_last() -> None:
    assert spread_layers(12, 5) == (2, 4, 6, 9, 11)
    assert spread_layers(32, 5) == (2, 9, 16, 24, 31)
    assert spread_layers(3, 5) == (2,)
    assert spread_layers(1, 5) == (0,)
