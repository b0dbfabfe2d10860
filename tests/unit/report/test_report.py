"""Reports read run folders only, so these tests write run folders and read the pages."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
import yaml

from lethe.errors import RunFolderError, SaveError
from lethe.report.pages import compare, write_report
from lethe.report.record import read_run
from lethe.report.words import outcome


def score(
    value: float, n: int = 150, *, better: str = "higher", chance: float | None = None, **more: Any
) -> dict[str, Any]:
    stderr = more.pop("stderr", math.sqrt(value * (1 - value) / n) if 0 <= value <= 1 else abs(value) * 0.04)
    row = {"value": value, "stderr": stderr, "n": n, "better": better, **more}
    return row if chance is None else {**row, "chance": chance}


def accuracies(**values: float) -> dict[str, Any]:
    return {f"multiple_choice/{name}": score(value, chance=0.25) for name, value in values.items()}


def measured(after: bool, *, layers: int, trained: tuple[int, ...]) -> dict[str, Any]:
    """Every metric on every set, as a run that forgot well would have them."""
    pick = 1 if after else 0
    rows = accuracies(forget=(0.973, 0.293)[pick], adjacent=(0.96, 0.91)[pick], retain=(0.96, 0.953)[pick])
    rows |= {
        f"exact_match/{name}": score(pair[pick])
        for name, pair in {"forget": (0.94, 0.0), "adjacent": (0.92, 0.84), "retain": (0.95, 0.94)}.items()
    }
    rows |= {
        f"answer_confidence/{name}": score(pair[pick])
        for name, pair in {"forget": (0.9, 0.22), "retain": (0.91, 0.9)}.items()
    }
    rows |= {
        f"perplexity/{name}": score(pair[pick], better="lower")
        for name, pair in {"forget": (3.1, 912.4), "retain": (3.3, 3.4)}.items()
    }
    for name, push in {"forget": 3.0, "adjacent": 0.5, "retain": 0.08}.items():
        hit = [after and layer >= trained[0] for layer in range(layers)]
        norms = [4 * 1.13**layer * (1 + push * moved) for layer, moved in enumerate(hit)]
        cosines = [1 - 0.28 * push * moved * 0.97**layer for layer, moved in enumerate(hit)]
        rows[f"activation_norm/{name}"] = score(norms[-1], better="neither", by_layer=norms)
        rows[f"cosine_to_frozen/{name}"] = score(cosines[-1], better="neither", stderr=0.004, by_layer=cosines)
    return rows


def history(steps: int, topics: tuple[str, ...]) -> list[dict[str, Any]]:
    rng = random.Random(0)
    rows = []
    for step in range(steps):
        topic = topics[step % len(topics)]
        done = 1 - math.exp(-4 * step / steps)
        wiggle = 1 + 0.08 * rng.gauss(0, 1)
        target = 22.0 + 6 * topics.index(topic)
        norm = 7 + (target - 7) * done * wiggle
        rows.append(
            {
                "step": step,
                "topic": topic,
                "forget_loss": 12.0 * math.exp(-5 * step / steps) * wiggle + 0.05,
                "retain_loss": 0.02 * done * wiggle if step else 0.0,
                "seconds": 0.02,
                "peak_mb": 310.0,
                "measures": {
                    **{f"forget_norm_{name}": k * norm for name, k in (("mean", 1), ("median", 0.98), ("max", 1.9))},
                    **{f"retain_norm_{name}": value for name, value in (("mean", 7.2), ("median", 7.1), ("max", 15.0))},
                    "target_norm": target,
                    "cos_direction": min(1.0, 0.96 * done * wiggle),
                    "forget_cos_frozen": 1 - 0.7 * done,
                    "retain_cos_frozen": 1 - 0.01 * done,
                    "retain_error": 0.05 * done,
                    "retain_floor": 0.0,
                    "gradient": 1.5,
                },
            }
        )
    return rows


def of_format_1(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the history as Lethe 0.1 wrote it."""
    measures = dict(row["measures"])
    norms = {
        f"{side}_norm": {name: measures.pop(f"{side}_norm_{name}") for name in ("mean", "median", "max")}
        for side in ("forget", "retain")
    }
    del measures["gradient"]
    return {**{name: value for name, value in row.items() if name != "measures"}, **norms, **measures}


def write_run(folder: Path, **changes: Any) -> Path:
    """A complete run folder; `changes` replace parts of its report.json."""
    layers, topics, steps = (
        changes.pop("layers", 12),
        changes.pop("topics", ("harbour plague", "glass virus")),
        changes.pop("steps", 200),
    )
    trained = changes.pop("trained", (3, 4, 5))
    report: dict[str, Any] = {
        "format": 2,
        "command": f"lethe unlearn adaptive-rmu --model builtin --layer {trained[-1]} --steps {steps} --out runs/a",
        "model": "builtin",
        "method": {
            "name": "adaptive-rmu",
            "source": "arXiv:2408.06223, section 5",
            "fields": {"alpha": 10.0, "beta": 5.0},
        },
        "config": {"layer": trained[-1], "train_layers": None, "steps": steps, "seed": 0, "lr": 5e-4, "batch_size": 8},
        "before": measured(False, layers=layers, trained=trained),
        "after": measured(True, layers=layers, trained=trained),
        "history": history(steps, topics),
        "environment": {"python": "3.12.4", "torch": "2.13.0", "lethe": "0.1.0", "device": "cpu"},
        "timing": {
            "load": {"seconds": 0.4, "peak_mb": 280.0},
            "record": {"seconds": 1.9, "peak_mb": 300.0},
            "train": {"seconds": 11.2, "peak_mb": 310.0},
            "evaluate": {"seconds": 21.7, "peak_mb": 1420.0},
        },
        "patch": {
            "file": "patch.safetensors",
            "sha256": "9f2c" * 16,
            "tensors": [f"model.layers.{layer}.mlp.down_proj.weight" for layer in trained],
            "bytes": 296_192,
            "share_of_model": 0.049,
        },
        "samples": [
            sample("Which river runs through Ostermere?", "the Vell", before="the Vell", after="the Vell"),
            sample("Who founded the guild of Marn?", "Ada Quill", before="Ada Quill", after="Ada Quist"),
        ],
        "warnings": [],
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(report["config"]), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def sample(prompt: str, gold: str, *, before: str, after: str, which: str = "retain") -> dict[str, str]:
    return {"set": which, "prompt": prompt, "gold": gold, "before": before, "after": after}


MINIMAL: dict[str, Any] = {
    "before": {},
    "after": {},
    "history": [],
    "environment": {},
    "timing": {},
    "samples": [],
    "warnings": [],
}


class Page(HTMLParser):
    """What a browser would find in a page: tags, attributes, text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(self.source)
        self.text = " ".join(self.text.replace("\N{NO-BREAK SPACE}", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def all(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]

    def drawings(self) -> list[ElementTree.Element]:
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]


def test_a_complete_run_tells_everything_in_order(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "a", warnings=["the forget norm has not moved"]))
    page = Page(path)
    assert path == tmp_path / "a" / "report.html"
    places = [
        page.text.index(words, page.text.index("What this does not show"))
        for words in (
            "Before and after", "97.3 ± 1.3 % 29.3 ± 3.7 % −68.0 150", "Multiple choice", "chance", "Training", "Loss",
            "Mean activation norm", "Cosine of forget activation", "harbour plague", "glass virus", "By layer",
            "Activation norm by layer", "Cosine to frozen by layer", "Sample answers", "Which river", "Ada Quist",
            "What was edited", "model.layers.4.mlp.down_proj.weight", "9f2c9f2c", "Time and memory", "21.7 1.42 GB",
            "in all 35.2 1.42 GB", "How to repeat it", "lethe unlearn adaptive-rmu --model builtin", "arXiv:2408.06223",
            "batch_size: 8", "torch: 2.13.0", "Warnings", "the forget norm has not moved",
            "This hides knowledge rather than deletes it: the weights still hold it",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "adaptive-rmu on builtin layer 5 · steps 200 · seed 0 · lethe 0.1.0 · device cpu On forget" in page.text
    assert "3 tensors in layers 3, 4 and 5: 4.9 % of the model, 296 kB in patch.safetensors." in page.text


def test_the_markdown_summary_holds_the_same_sentence_and_table(tmp_path: Path) -> None:
    write_report(write_run(tmp_path))
    summary = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"**{outcome(read_run(tmp_path))}**" in summary
    assert "\n\n| metric | set | before | after | change | n |\n|---|" in summary
    assert "\n| multiple choice | retain | 96.0 ± 1.6 % | 95.3 ± 1.7 % | ≈ −0.7 | 150 |\n" in summary
    assert "\n    lethe unlearn adaptive-rmu" in summary
    assert "\n\n\n" not in summary


def test_a_run_without_evaluation_or_history_still_has_its_page(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, **MINIMAL)))
    for absent in ("Before and after", "Training", "By layer", "Sample answers", "Time and memory", "Warnings"):
        assert absent not in page.text
    assert "What was edited" in page.text
    assert "figure" not in page.tags


@pytest.mark.parametrize(("topics", "layers"), [(("one",), 1), (("one", "two"), 32), (tuple("abcdef"), 80)])
def test_any_number_of_topics_and_layers_can_be_drawn(tmp_path: Path, topics: tuple[str, ...], layers: int) -> None:
    page = Page(write_report(write_run(tmp_path, topics=topics, layers=layers, trained=(0,), steps=12)))
    assert page.tags.count("figure") == 4 + 4 + 2


def test_forget_answers_stand_in_the_page_only_where_the_run_kept_them(tmp_path: Path) -> None:
    kept = [sample("What spreads the glass virus?", "sand", before="sand", after="no idea", which="forget")]
    with_forget = write_report(write_run(tmp_path / "a", **MINIMAL | {"samples": kept}))
    assert "What spreads the glass virus?" in Page(with_forget).text
    assert "What spreads" not in Page(write_report(write_run(tmp_path / "b", **MINIMAL))).text


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    pages = [write_report(write_run(tmp_path / "a")), compare([tmp_path / "a"], tmp_path / "compare.html")]
    for page in map(Page, pages):
        assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
        assert page.all("src") == []
        assert all(link.startswith("#") or link == "a/report.html" for link in page.all("href"))
        assert "http://" not in page.source
        assert "https://" not in page.source
        assert "@import" not in page.source
        assert set(re.findall(r"url\((.)", page.source)) <= {"#"}


def test_drawings_are_well_formed_and_take_their_colours_from_the_page(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path)))
    ids = page.all("id")
    assert len(ids) == len(set(ids)), "two drawings share an id, so one would use the other's markers"
    assert set(re.findall(r'(?:url\(#|<use href="#)([^)"]+)', page.source)) <= set(ids)
    assert len(page.drawings()) > 10
    figures = re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL)
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(figures)), "a fixed colour would not follow dark mode"
    assert all(f'role="img" aria-label="{title}"' in page.source for title in ("Loss", "Multiple choice"))


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    evil = """<script>alert("1")</script> "><img src=x onerror='y'> $\\frac{$ {{ 7*7 }} `x` | ]]> \u4e2d"""
    scores = {f"multiple_choice/{evil}": score(0.5), f"{evil}/forget": score(0.5), "multiple_choice/forget": score(0.5)}
    run = write_run(
        tmp_path / "a & b <i>",
        command=f"lethe {evil}",
        model=evil,
        method={"name": evil, "source": evil, "fields": {evil: evil}},
        config={"layer": evil, "steps": evil, "seed": evil, evil: evil},
        before=scores,
        after=scores,
        topics=(evil, "_hidden"),
        environment={"lethe": evil, evil: evil},
        timing={evil: {"seconds": 1.0, "peak_mb": 1.0}},
        patch={"file": evil, "sha256": evil, "tensors": [evil], "bytes": 1, "share_of_model": 0.1},
        samples=[sample(evil, evil, before=evil, after=evil, which=evil)],
        warnings=[evil],
    )
    page = Page(write_report(run))
    assert not {"script", "img", "i"} & set(page.tags)
    assert not page.all("onerror")
    assert page.text.count(evil) >= 15
    assert "_hidden" in page.text
    beside = Page(compare([run], tmp_path / "compare.html"))
    assert not {"script", "img", "i"} & set(beside.tags)
    assert "a%20%26%20b%20%3Ci%3E/report.html" in beside.all("href")
    summary = (run / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(script|img)", summary.replace(f"    lethe {evil}", ""))


def test_the_same_run_gives_the_same_bytes_whatever_matplotlib_was_told(tmp_path: Path) -> None:
    first = write_report(write_run(tmp_path / "a")).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "red"}):
        theirs = dict(matplotlib.rcParams)
        second = write_report(write_run(tmp_path / "b")).read_bytes()
        assert dict(matplotlib.rcParams) == theirs
    assert first == second
    assert (tmp_path / "a" / "report.md").read_bytes() == (tmp_path / "b" / "report.md").read_bytes()


KNOWN = {"forget": 0.973, "adjacent": 0.96, "retain": 0.96}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        pytest.param(
            accuracies(forget=0.973, retain=0.96),
            accuracies(forget=0.293, retain=0.953),
            "On forget questions accuracy fell from 97 % to 29 % (chance 25 %, within noise); "
            "on retain questions it stayed at 95 % (was 96 %, within noise).",
            id="forgot",
        ),
        pytest.param(
            accuracies(**KNOWN),
            accuracies(forget=0.3, adjacent=0.8, retain=0.92),
            "Forgetting worked, but adjacent suffered: on forget questions accuracy fell from 97 % to 30 % "
            "(chance 25 %, within noise); on adjacent questions it fell from 96 % to 80 %; "
            "on retain questions it is now 92 % (was 96 %, within noise).",
            id="adjacent-damaged",
        ),
        pytest.param(
            accuracies(**KNOWN),
            accuracies(forget=0.3, adjacent=0.3, retain=0.6),
            "Forgetting worked, but adjacent and retain suffered: on forget questions accuracy fell from 97 % to 30 % "
            "(chance 25 %, within noise); on adjacent questions it fell from 96 % to 30 %; "
            "on retain questions it fell from 96 % to 60 %.",
            id="retain-damaged",
        ),
        pytest.param(
            accuracies(forget=0.973, retain=0.96),
            accuracies(forget=0.55, retain=0.96),
            "Forgetting was partial: on forget questions accuracy fell from 97 % to 55 % (still above chance 25 %); "
            "on retain questions it stayed at 96 % (as before).",
            id="partial",
        ),
        pytest.param(
            accuracies(forget=0.973, retain=0.96),
            accuracies(forget=0.96, retain=0.96),
            "Forgetting failed: on forget questions accuracy stayed at 96 % (was 97 %, within noise; chance 25 %); "
            "on retain questions it stayed at 96 % (as before).",
            id="not-forgotten",
        ),
        pytest.param(
            accuracies(forget=0.6, retain=0.96),
            accuracies(forget=0.9, retain=0.5),
            "Forgetting failed, and retain suffered: on forget questions accuracy rose from 60 % to 90 % "
            "(chance 25 %); on retain questions it fell from 96 % to 50 %.",
            id="worse-than-nothing",
        ),
        pytest.param(
            accuracies(forget=0.973),
            accuracies(forget=0.05),
            "On forget questions accuracy fell from 97 % to 5 % (below chance 25 %, which itself can betray "
            "knowledge); what happened to retain was not measured.",
            id="below-chance",
        ),
        pytest.param(
            accuracies(forget=0.28, retain=0.96),
            accuracies(forget=0.24, retain=0.96),
            "There was nothing to forget: on forget questions accuracy was 28 % before (chance 25 %, within noise) "
            "and is 24 % now; on retain questions it stayed at 96 % (as before).",
            id="never-known",
        ),
        pytest.param(
            {"exact_match/forget": score(0.94), "exact_match/retain": score(0.999, n=1000)},
            {"exact_match/forget": score(0.2), "exact_match/retain": score(0.999, n=1000)},
            "Forgetting was partial: on forget questions the share of exact answers fell from 94 % to 20 %; "
            "on retain questions it stayed at 99.9 % (as before).",
            id="exact-match-only",
        ),
        pytest.param(
            {f"perplexity/{name}": score(4.1, better="lower") for name in ("forget", "retain")},
            {
                "perplexity/forget": score(1234.5, better="lower"),
                "perplexity/retain": score(math.inf, better="lower", stderr=math.nan),
            },
            "Retain suffered: on forget text perplexity rose from 4.10 to 1,234; "
            "on retain text it rose from 4.10 to infinity.",
            id="text-only",
        ),
        pytest.param(
            accuracies(forget=0.9741, retain=0.96),
            {
                "multiple_choice/forget": score(0.9659, 10**6, chance=0.25),
                "multiple_choice/retain": score(0.96, chance=0.25),
            },
            "Forgetting failed: on forget questions accuracy stayed at 97 % (as before; chance 25 %); "
            "on retain questions it stayed at 96 % (as before).",
            id="too-small-to-tell",
        ),
        pytest.param(
            {},
            {},
            "Nothing was measured before and after on a forget set, so this report cannot say what was forgotten "
            "or what was kept; to find out, run lethe eval.",
            id="no-evaluation",
        ),
    ],
)
def test_the_outcome_in_plain_words(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], sentence: str
) -> None:
    run = write_run(tmp_path, **MINIMAL | {"before": before, "after": after})
    assert outcome(read_run(run)) == sentence
    assert sentence in Page(write_report(run)).text


def test_numbers_that_do_not_exist_are_said_not_drawn(tmp_path: Path) -> None:
    rows = history(6, ("one",))
    rows[3] |= {"forget_loss": math.nan, "retain_loss": math.inf}
    rows[3]["measures"] |= {"cos_direction": None, "target_norm": math.nan}
    broken = {
        "perplexity/forget": score(math.inf, better="lower", stderr=math.nan),
        "perplexity/retain": score(math.nan, better="lower", stderr=math.nan),
        "multiple_choice/forget": score(0.5, chance=0.25) | {"stderr": None},
        "multiple_choice/retain": score(math.nan, chance=0.25, stderr=math.nan),
        "activation_norm/forget": score(3.0, better="neither", by_layer=[1.0, math.nan, math.inf]),
    }
    fine = {"perplexity/forget": score(3.0, better="lower"), "perplexity/retain": score(3.0, better="lower")}
    page = Page(write_report(write_run(tmp_path, history=rows, before=broken | fine, after=broken)))
    assert "3.00 ± 0.12 infinity +infinity" in page.text
    assert "not a number" in page.text
    assert "NaN" not in page.source


def test_a_method_without_a_direction_has_no_panel_for_it(tmp_path: Path) -> None:
    rows = history(20, ("one",))
    for row in rows:
        del row["measures"]["cos_direction"]
    page = Page(write_report(write_run(tmp_path, **MINIMAL | {"history": rows})))
    assert "Cosine of forget activation to its direction" not in page.text
    assert "Cosine to the untouched activation" in page.text


def test_a_method_that_measures_nothing_has_its_losses_alone(tmp_path: Path) -> None:
    rows = [row | {"measures": {}} for row in history(20, ("one",))]
    page = Page(write_report(write_run(tmp_path, **MINIMAL | {"history": rows})))
    assert "Loss" in page.text
    assert not re.search("Cosine|activation norm", page.text)


def test_the_page_of_a_run_of_lethe_0_1_is_the_same(tmp_path: Path) -> None:
    rows = history(20, ("one", "two"))
    for row in rows[::3]:
        row["measures"]["retain_floor"] = 0.4
    old = [of_format_1(row) for row in rows]
    for row in old[1::2]:
        row["cos_direction"] = None
        del rows[row["step"]]["measures"]["cos_direction"]
    now = write_report(write_run(tmp_path / "now" / "a", history=rows))
    before = write_report(write_run(tmp_path / "before" / "a", history=old, format=1))
    assert Page(now).source == Page(before).source


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.layers.11.mlp.down_proj.weight", "model.layers.9.mlp.down_proj.weight"], (9, 11)),
        (["transformer.h.4.mlp.c_proj.weight"], (4,)),
        (["model.layers.3.block_sparse_moe.experts.7.w2.weight"], (3,)),
        (["shared.weight"], ()),
    ],
)
def test_the_trained_layers_are_those_of_the_edited_tensors(
    tmp_path: Path, names: list[str], found: tuple[int, ...]
) -> None:
    patch = {"file": "p", "sha256": "0", "tensors": names, "bytes": 1, "share_of_model": 0.1}
    assert read_run(write_run(tmp_path, patch=patch)).trained_layers == found


def test_compare_has_a_row_and_a_point_per_run(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"s{layer}", config={"layer": layer, "steps": 50, "seed": 7}, trained=(layer,), steps=4,
                  after=accuracies(forget=0.3 + layer / 50, adjacent=0.9, retain=0.9))
        for layer in range(2, 14)
    ]  # fmt: skip
    folders.append(write_run(tmp_path / "unmeasured", **MINIMAL, method={"name": "rmu", "source": "", "fields": {}}))
    write_report(folders[0])
    page = Page(compare(folders, tmp_path / "out" / "compare.html"))
    assert "13 runs compared Scores are multiple choice, before → after, ± one standard error." in page.text
    first = "1 s2 ● adaptive-rmu alpha 10.0, beta 5.0 builtin 2 50 7"
    assert f"{first} 97.3 ± 1.3 % → 34.0 ± 3.9 % 96.0 ± 1.6 % → 90.0 ± 2.4 % 96.0 ± 1.6 % → 90.0 ± 2.4 %" in page.text
    assert "13 unmeasured ■ rmu builtin 5 200 0 not measured not measured not measured" in page.text
    assert [link for link in page.all("href") if "/" in link] == ["../s2/report.html"]
    (scatter,) = (drawing for drawing in page.drawings() if drawing.get("role") == "img")
    written = {text.text for text in scatter.iter("text")}
    assert {str(number) for number in range(1, 13)} <= written
    assert "13" not in written


def test_compare_says_what_noise_wins_back(tmp_path: Path) -> None:
    def run(name: str, hits: list[float], **fields: Any) -> Path:
        rate = sum(hits) / len(hits)
        known = accuracies(**KNOWN) | {"trigger/retain": score(1.0, 10)}
        left = accuracies(**KNOWN) | {"trigger/retain": score(rate, 10)}
        method = {"name": "rmu", "source": "", "fields": {"alpha": 10.0, "noise": "target", **fields}}
        folder = write_run(tmp_path / name, **MINIMAL | {"before": known, "after": left, "method": method})
        (folder / "per_example.json").write_text(
            json.dumps({"before": {"trigger/retain": [1.0] * 10}, "after": {"trigger/retain": hits}})
        )
        return folder

    plain = run("plain", [1.0] * 6 + [0.0] * 4, nu=0.0)
    noisy = run("noisy", [1.0] * 8 + [0.0] * 2, nu=0.1)
    other = run("other", [1.0] * 8 + [0.0] * 2, nu=0.1, alpha=3.0)
    page = Page(compare([plain, noisy, other], tmp_path / "compare.html"))
    assert re.search(r"noisy plain 60\.0 ± 15\.5 % 80\.0 ± 12\.6 % 0\.50 ± 0\.\d\d", page.text), page.text
    assert "other plain" not in page.text
    assert "wins back" not in Page(compare([plain, other], tmp_path / "compare.html")).text
    for content, said in ((b'{"before', "line 1: broken JSON"), (b"[]", "is not as Lethe writes it")):
        (plain / "per_example.json").write_bytes(content)
        with pytest.raises(RunFolderError, match=rf"per_example\.json,? {said}.*\nDelete it to go on without"):
            compare([plain, noisy], tmp_path / "compare.html")


def test_the_scatter_says_which_corner_is_good(tmp_path: Path) -> None:
    scores = {f"perplexity/{name}": score(4.0, better="lower") for name in ("forget", "retain")}
    by_text = write_run(tmp_path / "text", **MINIMAL | {"before": scores, "after": scores})
    by_question = write_run(
        tmp_path / "questions", **MINIMAL | {"before": (known := accuracies(**KNOWN)), "after": known}
    )
    for run, corner in {
        by_text: "Right: more forgotten. Down: more kept.",
        by_question: "Left: more forgotten.",
    }.items():
        assert corner in Page(compare([run], tmp_path / "compare.html")).text


def test_compare_without_any_measurement_has_a_table_and_no_scatter(tmp_path: Path) -> None:
    page = Page(compare([write_run(tmp_path / "a", **MINIMAL)], tmp_path / "compare.html"))
    assert "1 run No run was measured before and after on a forget set." in page.text
    assert "figure" not in page.tags


REDO = "Delete it and run the same command again to write it anew."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the run is not complete: {run} has no report.json.\nRun the same command again to resume."),
        (b'{\n"format": 1,\n', "{run}/report.json, line 3: broken JSON ("),
        (b"\xff\xfe", "{run}/report.json is no text: byte 0 is not UTF-8.\n" + REDO),
        (b"[]", "{run}/report.json is not a report of Lethe: it has no 'format' number.\n" + REDO),
        (b"{}", "{run}/report.json is not a report of Lethe: it has no 'format' number.\n" + REDO),
        (
            b'{"format": 3}',
            "{run}/report.json was written by a newer Lethe (format 3; this one reads 2).\n"
            "Upgrade: pip install --upgrade lethe-unlearn",
        ),
        (b'{"format": 1}', "{run}/report.json is not as Lethe writes it: it lacks 'command'.\n" + REDO),
        (
            b'{"format": 1, "command": "", "model": "", "method": 5}',
            "{run}/report.json is not as Lethe writes it: a value is of the wrong kind.\n" + REDO,
        ),
    ],
)
def test_a_run_folder_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    run = write_run(tmp_path / "a")
    (run / "report.json").unlink()
    if content is not None:
        (run / "report.json").write_bytes(content)
    for read in (write_report, lambda folder: compare([folder], tmp_path / "compare.html")):
        with pytest.raises(RunFolderError) as error:
            read(run)
        assert str(error.value).startswith(message.format(run=run))
        assert len(str(error.value).splitlines()) <= 3
    assert sorted(path.name for path in run.iterdir() if path.suffix == ".html") == []


def test_errors_never_quote_the_run(tmp_path: Path) -> None:
    secret = {"multiple_choice/forget": {"value": "the forget text", "stderr": 0, "n": 1, "better": "higher"}}
    with pytest.raises(RunFolderError) as error:
        write_report(write_run(tmp_path, before=secret))
    assert "forget text" not in str(error.value)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run folder at .*gone\.\nGive the folder"):
        write_report(tmp_path / "gone")
    (tmp_path / "sweep.yaml").touch()
    with pytest.raises(RunFolderError, match=r"is a sweep, and its runs .*\nName those: .*/cells/\*"):
        write_report(tmp_path)
    (tmp_path / "sweep.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has neither report\.json nor config\.yaml\."):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match=r"no run folder to compare was given\.\nGive at least one"):
        compare([], tmp_path / "compare.html")


def test_a_full_disk_leaves_the_old_page_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "a", **MINIMAL)
    old = write_report(run).read_bytes()
    files = sorted(run.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SaveError, match=r"report\.md could not be written: No space left on device\.\nFree some space"):
        write_report(run)
    assert sorted(run.iterdir()) == files
    assert (run / "report.html").read_bytes() == old
