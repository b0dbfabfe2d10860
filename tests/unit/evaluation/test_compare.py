"""Comparisons read run folders and results of `lethe eval`, so these tests write such and read the table."""

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from lethe.cli import main
from lethe.errors import RunFolderError, UnknownNameError, UsageError
from lethe.evaluation.compare import Compared, Row, as_dict, compare
from lethe.evaluation.results import read
from lethe.evaluation.significance import mcnemar

N = 40


def hits(share: float, seed: int = 0, n: int = N) -> list[float]:
    """So many hits of n, the same ones for the same seed as far as they go."""
    order = random.Random(seed).sample(range(n), n)
    return [float(order[place] < round(share * n)) for place in range(n)]


def row(values: list[float], better: str = "higher") -> dict[str, Any]:
    return {
        "value": statistics.fmean(values),
        "stderr": statistics.stdev(values) / math.sqrt(len(values)),
        "n": len(values),
        "better": better,
    }


def perplexity(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.04 * value, "n": N, "better": "lower"}


BEFORE = {"multiple_choice/forget": hits(0.9, 1), "multiple_choice/retain": hits(0.95, 2)}
AFTER = {"multiple_choice/forget": hits(0.25, 1), "multiple_choice/retain": hits(0.9, 2)}
LOSSES = [1 + place / N for place in range(N)]


def write_run(folder: Path, after: dict[str, list[float]] = AFTER, *, keep: bool = True, **changes: Any) -> Path:
    """A complete run folder; `changes` are settings of its config or, as `report`, parts of its report.json."""
    parts = changes.pop("report", {})
    examples = {"before": BEFORE | {"perplexity/retain": LOSSES}, "after": after | {"perplexity/retain": LOSSES}}
    report: dict[str, Any] = {
        "format": 1, "command": "lethe unlearn", "model": "builtin",
        "method": {"name": "rmu", "source": "", "fields": {"alpha": 10.0}},
        "config": {"layer": 5, "forget": ["builtin"], "seed": 0, "limit": None, "out": str(folder), **changes},
        "history": [], "environment": {}, "timing": {}, "samples": [], "warnings": [],
        "patch": {"file": "p", "sha256": "0", "tensors": [], "bytes": 1, "share_of_model": 0.1},
    }  # fmt: skip
    for when, value in (("before", 3.0), ("after", 3.1)):
        scores = {name: row(values) for name, values in examples[when].items()}
        report[when] = scores | {"perplexity/retain": perplexity(value), "deviation_score": perplexity(value)}
    report |= parts
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("format: 1\n")
    (folder / "report.json").write_text(json.dumps(report))
    if keep:
        (folder / "per_example.json").write_text(json.dumps(examples))
    return folder


def write_eval(path: Path, values: dict[str, list[float]], **parts: Any) -> Path:
    """What `lethe eval --out` writes."""
    scores = {name: row(found) for name, found in values.items()}
    path.write_text(
        json.dumps({"lethe": "0.1.0", "model": "builtin", "scores": scores, "per_example": values, **parts})
    )
    return path


def compared(*paths: Path, **how: Any) -> Compared:
    return compare([read(path) for path in paths], **how)


def rows(found: Compared) -> dict[str, Row]:
    return {f"{one.metric}/{one.set}": one for one in found.rows}


def test_two_runs_on_the_same_questions_are_paired(tmp_path: Path) -> None:
    weaker = {**AFTER, "multiple_choice/forget": hits(0.6, 1)}
    found = compared(write_run(tmp_path / "a"), write_run(tmp_path / "b", weaker, layer=7))
    assert [column.name for column in found.columns] == ["a", "b"]
    forget, retain = (rows(found)[f"multiple_choice/{name}"] for name in ("forget", "retain"))
    (one,) = forget.differences
    assert one is not None
    # 14 questions are hit by the second alone, and none by the first alone.
    assert (one.value, one.test, one.p, one.is_paired) == (pytest.approx(0.35), "McNemar", 2 / 2**14, True)
    assert one.within_noise is False
    assert (forget.good, retain.good) == ("lower", "higher")
    assert retain.differences[0] is not None
    assert retain.differences[0].within_noise
    # Two accuracies, perplexity and the deviation score.
    assert found.tests == 4
    assert forget.p_adjusted == (pytest.approx(4 * 2 / 2**14),)
    assert any(note.startswith("4 tests; p is adjusted for all of them (Holm)") for note in found.notes)
    assert any("One seed says nothing of other seeds" in note for note in found.notes)


def test_rows_stand_in_the_order_of_reports_and_others_on_request(tmp_path: Path) -> None:
    shares = {"kl/retain": hits(0.5), "multiple_choice/zoology": hits(0.5), "multiple_choice/adjacent": hits(0.5)}
    extra = AFTER | shares | {"exam_accuracy/virology": hits(0.4)}
    found = compared(write_run(tmp_path / "a", extra), write_run(tmp_path / "b", extra, layer=7))
    assert list(rows(found)) == [
        "multiple_choice/forget", "multiple_choice/adjacent", "multiple_choice/retain", "multiple_choice/zoology",
        "perplexity/retain", "deviation_score/", "exam_accuracy/virology",
    ]  # fmt: skip
    assert "Metrics that are not shown: 1; --metrics all shows them." in found.notes
    assert "kl/retain" in rows(compared(tmp_path / "a", tmp_path / "b", metrics=("all",)))
    assert list(rows(compared(tmp_path / "a", tmp_path / "b", metrics=("kl",)))) == ["kl/retain"]
    with pytest.raises(UnknownNameError, match=r"none of these measured 'acc'\.\nMetrics: multiple_choice, "):
        compared(tmp_path / "a", tmp_path / "b", metrics=("acc",))


def test_one_run_is_compared_with_before_its_edit(tmp_path: Path) -> None:
    found = compared(write_run(tmp_path / "a"))
    assert [column.name for column in found.columns] == ["before", "a"]
    (one,) = rows(found)["multiple_choice/forget"].differences
    assert one is not None
    assert (one.value, one.test, one.is_paired) == (pytest.approx(-0.65), "McNemar", True)
    # The same questions in both: what one hits and the other misses is what the test counts.
    assert one.p == 2 / 2**26
    assert found == compared(tmp_path / "a", against="before")


def test_runs_that_differ_in_the_seed_are_one_column(tmp_path: Path) -> None:
    seeds = [write_run(tmp_path / f"s{seed}", {**AFTER, "multiple_choice/forget": hits(share, 1)}, seed=seed)
             for seed, share in ((0, 0.2), (1, 0.3), (2, 0.55))]  # fmt: skip
    other = write_run(tmp_path / "other", layer=7)
    found = compared(*seeds[:2], other, seeds[2])
    assert [column.name for column in found.columns] == ["s0, 3 seeds", "other"]
    value = rows(found)["multiple_choice/forget"].values[0]
    assert value is not None
    assert value.value == pytest.approx(0.35)
    assert value.spread == pytest.approx(statistics.stdev([0.2, 0.3, 0.55]))
    # Seeds alone are one column, so their model before the edit stands beside them.
    assert [column.name for column in compared(*seeds).columns] == ["before", "s0, 3 seeds"]


def test_the_same_seed_again_is_no_further_seed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a0", 0), ("a1", 1), ("b0", 0), ("b1", 1))]
    found = compared(*runs)
    assert [column.name for column in found.columns] == ["a0, 2 seeds", "b0, 2 seeds"]
    assert all(one is None or one.within_noise for line in found.rows for one in line.differences)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ({"keep": False}, "b has no values by question"),
        ({"forget": ["builtin:exploits"]}, "a and b are not known to be measured on the same questions"),
        ({"report": {"model": "./other"}}, "a and b are not known to be measured on the same questions"),
        ({"after": {name: hits(0.3, 1, n=30) for name in AFTER}, "layer": 7},
         "multiple_choice/forget was measured on 40 and 30 questions"),
    ],
    ids=["no values", "other settings", "built-in or not", "fewer"],
)  # fmt: skip
def test_scores_that_do_not_pair_up_say_so(second: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = compared(write_run(tmp_path / "a"), write_run(tmp_path / "b", **second, seed=1, lr=2.0))
    (one,) = rows(found)["multiple_choice/forget"].differences
    assert one is not None
    assert (one.is_paired, one.test) == (False, "t")
    first, other = rows(found)["multiple_choice/forget"].scores
    assert one.stderr == pytest.approx(math.hypot(first.stderr, other.stderr))
    assert reason in " ".join(found.notes)


def test_what_was_measured_on_is_believed_over_settings(tmp_path: Path) -> None:
    name = "multiple_choice/forget"
    runs = [write_run(tmp_path / folder, forget=[folder], report={"measured_on": {name: hash_}})
            for folder, hash_ in (("a", "1"), ("b", "1"), ("c", "2"))]  # fmt: skip
    paired = [one is not None and one.is_paired for one in rows(compared(*runs))[name].differences]
    assert paired == [True, False]
    # Results of lethe eval have no settings, so only this tells.
    files = [write_eval(tmp_path / f"{name}.json", AFTER, **more)
             for name, more in (("x", {"measured_on": {name: "1"}}), ("y", {}))]  # fmt: skip
    paired = [one is not None and one.is_paired for one in rows(compared(runs[0], *files))[name].differences]
    assert paired == [True, False]


def test_results_of_eval_stand_beside_runs(tmp_path: Path) -> None:
    base = write_eval(tmp_path / "base.json", BEFORE | {"exact_match/retain": hits(0.5)})
    found = compared(base, write_run(tmp_path / "a"))
    assert [column.name for column in found.columns] == ["base.json", "a"]
    values = rows(found)["exact_match/retain"]
    assert values.values[1] is None
    assert values.differences == (None,)
    assert "Not measured: 3 of 10 values." in found.notes  # and perplexity and deviation score, of the file


def test_different_models_are_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, report={"model": f"./{name}"}) for name in ("a", "b")]
    assert "Different models (./a, ./b): a difference may be theirs, not the edit's." in compared(*runs).notes
    with pytest.raises(UsageError, match=r"needs runs of one model\. Got \./a, \./b\.\nCompare each"):
        compared(*runs, against="before")


def test_numbers_that_do_not_exist_are_null(tmp_path: Path) -> None:
    broken = {"multiple_choice/retain": {"value": None, "stderr": None, "n": N, "better": "higher"}}
    run = write_run(tmp_path / "a", report={"after": broken | {"deviation_score": {**perplexity(3.0), "stderr": 0}}})
    found = as_dict(compared(run))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    one = next(line for line in found["rows"] if line["set"] == "retain" and line["metric"] == "multiple_choice")
    assert one["values"]["a"]["value"] is None
    assert one["differences"]["a"]["within_noise"] is None
    assert found["tests"] == 0


# Bad input


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    file = write_eval(tmp_path / "x.json", AFTER)
    run = write_run(tmp_path / "a")
    for paths, how, message in (
        ((), {}, r"nothing was named to compare\.\nName run folders"),
        ((file,), {}, r"there is nothing to compare .*x\.json with\.\nName another one beside it\."),
        ((file, run), {"against": "before"}, r"x\.json holds no scores from before an edit\.\nLeave --against"),
        ((run, run), {}, r"a is named twice\.\nName each run once\."),
        ((run, tmp_path / "." / "a"), {}, r"a is named twice"),
    ):
        with pytest.raises(UsageError, match=message):
            compared(*paths, **how)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.json, line 1: broken JSON"),
        (b'{"scores": {', r"x\.json, line 1: broken JSON"),
        (b"\xff\xfe{}", r"x\.json is no text: byte 0 is not UTF-8"),
        (b"[]", r"is no result of lethe eval: it has no 'scores'"),
        (b'{"scores": {}}', r"holds no score: nothing was measured"),
        (b'{"scores": 3}', r"is no result of lethe eval: it has no 'scores'"),
        (b'{"scores": {"a/b": {"value": 1}}}', r"is not as lethe eval writes it"),
        (b'{"scores": {"a/b": 3}}', r"is not as lethe eval writes it"),
        (b'{"scores": {}, "per_example": [1]}', r"is not as lethe eval writes it"),
        (b'{"scores": {}, "per_example": {"a/b": ["x"]}}', r"is not as lethe eval writes it"),
        (b"[" * 100_000, r"nested too deeply"),
    ],
)
def test_a_file_that_is_no_result_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=message):
        read(path)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"neither a run folder nor a file at .*none\.\nName run folders"):
        read(tmp_path / "none")
    run = write_run(tmp_path / "a")
    (run / "per_example.json").write_text('{"before": {}}')
    with pytest.raises(RunFolderError, match=r"per_example\.json is not as Lethe writes it\.\nDelete it"):
        read(run)
    (run / "per_example.json").write_text('{"bef')
    with pytest.raises(RunFolderError, match=r"per_example\.json, line 1: broken JSON"):
        read(run)
    (run / "report.json").unlink()
    with pytest.raises(RunFolderError, match=r"the run is not complete: .*a has no report\.json"):
        read(run)
    unmeasured = write_run(tmp_path / "b", report={"before": {}, "after": {}})
    with pytest.raises(RunFolderError, match=r"b was not measured \(--evaluate none\)\.\nMeasure it: lethe eval"):
        read(unmeasured)


# The command


def lethe(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main.main(["compare", *argv])
    out, err = capsys.readouterr()
    assert exit_.value.code == code, err
    return " ".join((out if code == 0 else err).split())


def test_the_table_says_better_worse_or_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {**AFTER, "multiple_choice/retain": hits(0.4, 2), "multiple_choice/forget": hits(0.2, 1)}
    runs = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", kept, layer=7))]
    out = lethe(capsys, *runs)
    assert "differences to a metric set good a b difference [95 % interval] multiple_choice forget lower" in out
    assert "25.0 ± 6.9 % 20.0 ± 6.4 % −5.0 [−12." in out
    assert "] within noise multiple_choice retain higher 90.0 ± 4.8 % 40.0 ± 7.8 % −50.0 [" in out
    assert "] worse, p < 0.001 perplexity retain" in out
    # Down is worse on a retain set, and what one wanted on a forget set.
    assert "−65.0 [−80.0, −50.0] better, p < 0.001" in lethe(capsys, runs[0])
    found = json.loads(lethe(capsys, *runs, "--json"))
    assert found["first"] == "a"
    assert [line["differences"]["b"]["within_noise"] for line in found["rows"][:2]] == [True, False]
    before, after = (hits(share, 2) for share in (0.9, 0.4))
    assert found["rows"][1]["differences"]["b"]["p"] == mcnemar(np.array(before), np.array(after))


def test_seeds_show_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / f"s{seed}", {**AFTER, "multiple_choice/forget": hits(share, 1)}, seed=seed))
            for seed, share in ((0, 0.2), (1, 0.4))]  # fmt: skip
    assert "s0, 2 seeds" in (out := lethe(capsys, *runs))
    # Between seeds 0.1414^2 / 2; by question the variance of eight ones, eight halves and zeros, 0.164 / 40.
    assert "30.0 ± 11.9 % (spread 14.1)" in out


def test_out_holds_the_table_and_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, layer=layer)) for name, layer in (("a", 1), ("b_$x$", 2), ("<c>", 3))]
    assert f"figure: {tmp_path / 'out' / 'compare.png'}" in lethe(capsys, *runs, "--out", str(tmp_path / "out"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"compare.json", "compare.svg", "compare.png"}
    assert json.loads(files["compare.json"]) == json.loads(lethe(capsys, *runs, "--json"))
    assert files["compare.png"].startswith(b"\x89PNG")
    texts = {text.text for text in ElementTree.fromstring(files["compare.svg"]).iter() if text.text}
    assert {"b_$x$", "<c>", "multiple choice, forget", "percentage points", "perplexity"} <= texts
    assert "is a file, and --out is a folder." in lethe(
        capsys, *runs, "--out", str(tmp_path / "out" / "compare.json"), code=2
    )
