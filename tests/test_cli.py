"""The `lethe` command as a user meets it: help, spellings, one JSON object on stdout, replay, export, revert."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lethe.cli import console, main
from lethe.methods.adaptive_rmu import AdaptiveRMU
from lethe.model.loading import load_model
from lethe.model.patch import Patch
from lethe.solvers.optimizers.adamw import AdamW
from lethe.suites import world
from lethe.suites.builtin import Builtin

SHORT = "--layer 2 --steps 4 --max-length 24 --lr 1e-3"
FOREIGN = f"unlearn rmu --model tiny --forget forget.jsonl --retain retain.txt {SHORT}"
BUILTIN = "unlearn adaptive-rmu --steps 2 --limit 4"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    """A folder with a tiny model, corpora, and a complete run of each kind: `foreign` and `own`."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(foreign_model, root / "tiny")
    rows = ({"text": f"The red stone number {i} burns in water."} for i in range(24))
    (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "retain.txt").write_text("\n\n".join(f"A calm river of {i} boats." for i in range(24)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("lethe.evaluation.eval_sets.TEXTS", 4)
        for command in (f"{FOREIGN} --out foreign", f"{BUILTIN} --out own"):
            with pytest.raises(SystemExit, match=r"^0$"):
                main.main(command.split())
    return root


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("lethe.evaluation.eval_sets.TEXTS", 4)
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


Lethe = Callable[..., str]


@pytest.fixture
def lethe(capsys: pytest.CaptureFixture[str]) -> Lethe:
    """Runs a command that must succeed, and returns its stdout; `lethe.err` is its stderr."""

    def run(command: str, *more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.main([*command.split(), *more])
        out, run.err = capsys.readouterr()  # type: ignore[attr-defined]
        assert exit_.value.code in (0, None), run.err  # type: ignore[attr-defined]
        return out

    return run


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# Help


@pytest.mark.parametrize("command", [*main.COMMANDS, "unlearn rmu", "unlearn adaptive-rmu", "unlearn own/config.yaml"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_ends_with_examples(command: str, flag: str, lethe: Lethe) -> None:
    out = lethe(f"{command} {flag}")
    examples = main.COMMANDS[command.split()[0]].examples
    assert out.endswith("\nExamples:\n" + "".join(f"  {line}\n" for line in examples))
    assert lethe.err == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["", "--help", "-h", "help"])
def test_help_of_all_names_every_command(command: str, lethe: Lethe) -> None:
    out = lethe(command)
    for name, one in main.COMMANDS.items():
        assert f"\n  {name} " in out
        for example in one.examples:
            assert f"  {example}\n" in out


def test_the_version_is_a_line_of_its_own(lethe: Lethe) -> None:
    assert lethe("--version") == "0.1.0\n"


@pytest.mark.parametrize("command", main.COMMANDS)
def test_examples_use_flags_that_exist(command: str, lethe: Lethe) -> None:
    # What comes first decides which settings these commands have.
    first = {"unlearn": "adaptive-rmu", "sweep": "adaptive-rmu", "analyze": "layers", "data": "rank"}.get(command, "")
    options, _, _ = lethe(f"{command} {first} --help").partition("Examples:")
    for example in main.COMMANDS[command].examples:
        words = example.split()
        assert words[:2] == ["lethe", command]
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", options)


# Spelling


@pytest.mark.parametrize("spelling", ["--batch-size 3", "--batch_size 3", "--batch-size=3", "--batch_size=3"])
def test_hyphen_and_underscore_are_alike(spelling: str, lethe: Lethe) -> None:
    assert json.loads(lethe(f"{FOREIGN} {spelling} --dry-run --json"))["batching"]["batch_size"] == 3


def test_methods_are_spelt_either_way(lethe: Lethe) -> None:
    settings = [json.loads(lethe(f"unlearn {name} --dry-run --json")) for name in ("adaptive-rmu", "adaptive_rmu")]
    assert settings[0]["method"] == settings[1]["method"]


@pytest.mark.parametrize("model", ["--model tiny", "--model=tiny"])
def test_defaults_are_those_that_suit_the_model(model: str, lethe: Lethe) -> None:
    own = json.loads(lethe("unlearn adaptive-rmu --dry-run --json"))
    foreign = json.loads(lethe(f"unlearn adaptive-rmu {model} --layer 2 --dry-run --json"))
    sections = {"layer": "run", "steps": "solver", "lr": "solver", "batch_size": "batching", "max_length": "batching"}
    for name, value in {"layer": 5, "steps": 100, "batch_size": 8, "max_length": [128], "lr": 1e-2}.items():
        assert own[sections[name]][name] == value
    assert own["method"] == {"name": "adaptive-rmu", **vars(AdaptiveRMU(**Builtin.suits_methods["adaptive-rmu"]))}
    for name, value in {"steps": 150, "batch_size": 4, "max_length": [512], "lr": None}.items():
        assert foreign[sections[name]][name] == value
    assert (foreign["solver"]["optimizer"], AdamW().lr) == ("adamw", 5e-5), "no rate of its own is the optimizer's"
    assert foreign["method"] == {"name": "adaptive-rmu", **vars(AdaptiveRMU())}


@pytest.mark.parametrize("solver", ["--solver ridge", "--solver=ridge", "--solver gradient", "--solver=gradient"])
def test_a_solver_has_flags_of_its_own(solver: str, lethe: Lethe) -> None:
    options, _, _ = lethe(f"unlearn rmu {solver} --help").partition("Examples:")
    is_ridge = "ridge" in solver
    for flag in ("--lam", "--no-keep-sums"):
        assert bool(re.search(rf"{flag}\b", options)) == is_ridge
    for flag in ("--lr", "--steps", "--accumulate", "--no-fp32-masters"):
        assert bool(re.search(rf"{flag}\b", options)) == (not is_ridge)


def test_a_method_of_another_solver_can_be_trained_step_by_step(lethe: Lethe) -> None:
    found = json.loads(lethe("unlearn lunar --dry-run --json"))
    assert found["solver"]["name"] == "ridge"
    command = "unlearn lunar --solver gradient --lr 1e-2 --steps 2 --evaluate none --out lunar"
    assert json.loads(lethe(f"{command} --dry-run --json"))["solver"] == {
        "name": "gradient", "steps": 2, "accumulate": 1, "optimizer": "adamw", "lr": 1e-2, "warm_up": 0, "decay": 0.0,
        "fp32_masters": True,
    }  # fmt: skip
    assert json.loads(lethe(f"{command} --json"))["method"]["name"] == "lunar"
    assert len(json.loads(Path("lunar/report.json").read_text())["history"]) == 2
    shutil.rmtree("lunar")


def test_a_config_keeps_the_flags_of_its_solver(lethe: Lethe) -> None:
    lethe(f"{FOREIGN.replace(' --steps 4', '').replace(' --lr 1e-3', '')} --solver ridge --lam 2 --out closed")
    found = json.loads(lethe("unlearn closed/config.yaml --lam 3 --out again --dry-run --json"))
    assert found["solver"] == {"name": "ridge", "lam": 3.0, "keep_sums": True}
    found = json.loads(lethe("unlearn closed/config.yaml --solver gradient --lr 2 --dry-run --json"))
    assert (found["solver"]["name"], found["solver"]["lr"]) == ("gradient", 2.0)
    shutil.rmtree("closed")


def test_the_last_solver_wins(lethe: Lethe) -> None:
    found = json.loads(lethe("unlearn rmu --solver gradient --solver=ridge --lam 1 --dry-run --json"))
    assert found["solver"] == {"name": "ridge", "lam": 1.0, "keep_sums": True}


# One JSON object, or one table


def only_progress(err: str) -> bool:
    """Bars, and what would have had to be given for more metrics."""
    told = r"(unlearn|measure).* \d+/\d+ |not measured: \w+ \(needs --"
    return all(re.match(told, line) for line in err.splitlines() if line.strip())


COMMANDS_WITH_JSON = {
    "unlearn": (f"{FOREIGN} --out fresh", {"folder", "command", "model", "method", "before", "after", "patch"}),
    "dry run": (f"{FOREIGN} --dry-run", {"format", "method", "run", "plan"}),
    "eval of a run": ("eval foreign", {"model", "scores"}),
    "eval of a model": ("eval builtin --limit 4", {"model", "scores"}),
    "check": ("check tiny --layer 2", {"model_type", "d_model", "trained"}),
    "ls methods": ("ls methods", {"methods"}),
    "ls metrics": ("ls metrics", {"metrics"}),
    "ls optimizers": ("ls optimizers", {"optimizers"}),
    "ls runs": ("ls runs .", {"runs"}),
    "diff": ("diff tiny tiny", {"differences"}),
}


@pytest.mark.parametrize(("command", "keys"), COMMANDS_WITH_JSON.values(), ids=list(COMMANDS_WITH_JSON))
def test_stdout_is_one_json_object(command: str, keys: set[str], lethe: Lethe) -> None:
    found = json.loads(lethe(f"{command} --json"))
    assert isinstance(found, dict)
    assert keys <= found.keys()
    assert only_progress(lethe.err)  # type: ignore[attr-defined]
    shutil.rmtree("fresh", ignore_errors=True)


def test_demo_prints_the_same_as_its_report(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Builtin, "suits", {**Builtin.suits, "steps": 2, "limit": 4})
    found = json.loads(lethe("demo --out demo --json"))
    report = json.loads(Path("demo/report.json").read_text())
    assert (found["before"], found["after"]) == (report["before"], report["after"])
    assert {"multiple_choice/forget", "exact_match/retain", "perplexity/retain"} <= found["after"].keys()
    assert only_progress(lethe.err)  # type: ignore[attr-defined]
    table = lethe("demo --out demo").splitlines()
    assert table[0] == "adaptive-rmu on builtin, layer 5"
    assert table[-1] == "report: demo/report.html"
    assert lethe.err == "demo holds this run already, complete.\n"  # type: ignore[attr-defined]


def test_a_complete_run_is_shown_again_and_nothing_is_written(lethe: Lethe) -> None:
    before = {path: sha256(path) for path in Path("foreign").iterdir()}
    first = lethe(f"{FOREIGN} --out foreign")
    assert first == lethe(f"{FOREIGN} --out foreign")
    assert first.startswith("rmu on tiny, layer 2\n")
    assert {path: sha256(path) for path in Path("foreign").iterdir()} == before


def test_a_dry_run_touches_nothing(lethe: Lethe) -> None:
    before = sorted(Path().rglob("*"))
    out = lethe(f"{FOREIGN} --out nowhere --dry-run")
    assert "layers loaded for training" in out
    assert "3 of 4" in out
    assert "model.layers.2.mlp.down_proj.weight 16 x 24" in out
    assert sorted(Path().rglob("*")) == before


def test_runs_are_listed_with_their_scores(lethe: Lethe) -> None:
    rows = {row["run"]: row for row in json.loads(lethe("ls runs . --json"))["runs"]}
    assert rows["foreign"]["method"] == "rmu"
    assert rows["own"]["forget"].endswith("%")


def test_names_with_brackets_come_out_whole_and_on_one_line(lethe: Lethe) -> None:
    folder = Path("[bold]a" + 60 * "x", ":smile:")
    shutil.copytree("foreign", folder)
    try:
        assert lethe("report", str(folder)) == f"{folder}/report.html\n"
        assert f"\n{folder} " in lethe("ls runs", str(folder.parent))
    finally:
        shutil.rmtree(folder.parent)


# Replay, export, revert


def test_a_config_replays_to_the_same_patch(lethe: Lethe) -> None:
    lethe("unlearn foreign/config.yaml --out replayed")
    assert sha256("replayed/patch.safetensors") == sha256("foreign/patch.safetensors")
    shutil.rmtree("replayed")


@pytest.mark.parametrize(("run", "base"), [("foreign", "tiny"), ("own", str(world.MODEL_FOLDER))])
def test_an_export_is_the_patched_model_and_reverts_to_its_base(
    run: str, base: str, lethe: Lethe, tmp_path: Path
) -> None:
    exported, reverted = tmp_path / "exported", tmp_path / "reverted"
    assert lethe(f"export {run} --to {exported}") == f"{exported}\n"
    model = load_model(base)
    Patch.load(f"{run}/patch.safetensors").apply_in_memory(model)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(exported)(input_ids=ids).logits
        assert torch.equal(plain, model(input_ids=ids).logits)
        assert not torch.equal(plain, load_model(base)(input_ids=ids).logits)

    assert lethe(f"revert {exported} --to {reverted}") == f"{reverted}\n"
    assert sha256(reverted / "model.safetensors") == sha256(Path(base, "model.safetensors"))
    assert "No tensor differs." in lethe(f"diff {base} {reverted}")


def test_apply_writes_what_export_writes(lethe: Lethe, tmp_path: Path) -> None:
    lethe(f"export foreign --to {tmp_path / 'a'}")
    lethe(f"apply foreign/patch.safetensors tiny --to {tmp_path / 'b'}")
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
    rows: list[dict[str, Any]] = json.loads(lethe(f"diff tiny {tmp_path / 'a'} --json"))["differences"]
    assert [row["name"] for row in rows] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert all(row["kind"] == "changed" and row["relative_norm"] > 0 for row in rows)


def test_eval_of_a_run_repeats_its_scores(lethe: Lethe) -> None:
    report = json.loads(Path("own/report.json").read_text())
    found = json.loads(lethe("eval own --json"))["scores"]
    for name in ("multiple_choice/forget", "exact_match/retain", "perplexity/retain"):
        assert found[name]["value"] == pytest.approx(report["after"][name]["value"], abs=1e-9)


def test_several_runs_are_compared_on_one_page(lethe: Lethe, tmp_path: Path) -> None:
    assert lethe(f"report foreign own --out {tmp_path / 'c.html'}") == f"{tmp_path / 'c.html'}\n"
    assert (tmp_path / "c.html").stat().st_size > 1000


# A method of one's own, and the config alone

SHRINK = '''
from dataclasses import dataclass
from typing import ClassVar

import lethe

@dataclass(frozen=True, kw_only=True)
class Shrink(lethe.SteeringMethod):
    """Steer forget activations towards zero."""

    source: ClassVar[str] = "a test"

    share: float = 0.1
    """Share of the untouched activation that stays."""

    def prepare(self, layers, topic, rng):
        return {}

    def forget_target(self, frozen, state):
        return self.share * frozen.h
'''
OWN = FOREIGN.replace("unlearn rmu", "unlearn own_method.py:Shrink") + " --evaluate none"


@pytest.fixture
def own_method() -> Iterator[None]:
    Path("own_method.py").write_text(SHRINK)
    yield
    for path in ("shrunk", "again", "swept"):
        shutil.rmtree(path, ignore_errors=True)
    Path("own_method.py").unlink(missing_ok=True)


def test_print_config_prints_what_the_run_writes(lethe: Lethe) -> None:
    before = sorted(Path().rglob("*"))
    assert lethe(f"{FOREIGN} --out foreign --print-config") == Path("foreign/config.yaml").read_text()
    assert lethe("unlearn own/config.yaml --print-config") == Path("own/config.yaml").read_text()
    assert sorted(Path().rglob("*")) == before


def test_a_method_of_ones_own_is_named_by_its_file(own_method: None, lethe: Lethe) -> None:
    help_ = lethe("unlearn own_method.py:Shrink --help")
    assert "Steer forget activations towards zero." in help_
    assert "Share of the untouched activation that stays." in " ".join(help_.replace("│", " ").split())
    lethe(f"{OWN} --share 0.2 --out shrunk")
    report = json.loads(Path("shrunk/report.json").read_text())
    assert report["method"]["name"] == "own_method.py:Shrink"
    assert report["method"]["fields"]["share"] == 0.2
    assert "name: own_method.py:Shrink\n" in Path("shrunk/config.yaml").read_text()
    # Again, from its config, with the file named: the same bytes.
    lethe("unlearn shrunk/config.yaml --method own_method.py:Shrink --out again")
    assert sha256("again/patch.safetensors") == sha256("shrunk/patch.safetensors")
    assert "shrunk" in lethe("ls runs .")


def test_a_config_alone_makes_nobody_run_a_file(
    own_method: None, lethe: Lethe, capsys: pytest.CaptureFixture[str]
) -> None:
    lethe(f"{OWN} --out shrunk")
    Path("own_method.py").write_text("raise SystemExit(9)")
    sys.modules.pop("own_method.py")
    with pytest.raises(SystemExit, match=r"^2$"):
        main.main(["unlearn", "shrunk/config.yaml", "--out", "again"])
    assert capsys.readouterr().err == (
        "lethe: error: shrunk/config.yaml names a method in a file of its own, own_method.py:Shrink, and a config "
        "alone never makes Lethe run a file.\n"
        "If you trust that file, name it: lethe unlearn shrunk/config.yaml --method "
        "own_method.py:Shrink\n"
    )
    Path("own_method.py").unlink()
    with pytest.raises(SystemExit, match=r"^2$"):
        main.main(["unlearn", "shrunk/config.yaml", "--method", "own_method.py:Shrink", "--out", "again"])
    assert "there is no file own_method.py." in capsys.readouterr().err
    # What only reads the edit needs no method.
    assert json.loads(lethe("eval shrunk --retain retain.txt --json"))["scores"]


def test_a_sweep_takes_a_method_of_ones_own(own_method: None, lethe: Lethe) -> None:
    flags = FOREIGN.partition("--model")[2]
    found = json.loads(
        lethe(f"sweep own_method.py:Shrink --model {flags} --evaluate none --grid share=0.1,0.2 --out swept --json")
    )
    assert found["folder"] == "swept"
    assert len(list(Path("swept/cells").glob("*/patch.safetensors"))) == 2


def test_a_setting_that_is_called_like_another_flag_is_refused(
    own_method: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own_method.py").write_text(SHRINK.replace("share", "finalists"))
    sys.modules.pop("own_method.py", None)
    with pytest.raises(SystemExit, match=r"^2$"):
        main.main(["sweep", "own_method.py:Shrink", "--help"])
    assert "the setting 'finalists' of own_method.py:Shrink is called like another flag" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "argv", "expected"), [
    ("--model", ["--model", "a", "--layer", "2"], ("a", ["--layer", "2"])),
    ("--model", ["--model=a", "x", "--model", "b"], ("b", ["x"])),
    ("--model", ["--model"], (None, ["--model"])),
    ("--layer", ["--layers-from", "x"], (None, ["--layers-from", "x"])),
])  # fmt: skip
def test_a_flag_that_decides_defaults_is_read_first(flag: str, argv: list[str], expected: Any) -> None:
    assert console.taken(flag, argv) == expected
