"""What `lethe` answers to input it cannot use: the right exit code, one clear error on stderr, nothing left behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from lethe.cli import main
from lethe.model.slice import LayerSlice

UNLEARN = (
    "unlearn rmu --model tiny --forget forget.jsonl --retain retain.txt --layer 2 --steps 4 --max-length 24 "
    "--evaluate none --out out"
)
"""A command that works; a flag given again wins."""
CLOSED = UNLEARN.replace("--steps 4 ", "")
"""The same for solvers without steps."""

KINDS = "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset as name:config:split."
ONE_TEXT = "Give a corpus with at least one text."
OTHER_OUT = "Choose another --out."


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths in commands and messages are relative; transformers talks again after each test."""
    monkeypatch.chdir(workplace)
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    shutil.rmtree("out", ignore_errors=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    """A folder with a tiny model and its broken relatives, corpora, questions, a complete run and damaged ones."""
    root = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        _models(foreign_model)
        _texts()
        _runs()
    return root


def _models(foreign_model: Path) -> None:
    shutil.copytree(foreign_model, "tiny")

    def relative(name: str, *without: str, **settings: Any) -> Path:
        folder = Path(shutil.copytree("tiny", name))
        for file in without:
            (folder / file).unlink()
        if settings:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return folder

    relative("no-config", "config.json")
    (relative("pickled", "model.safetensors") / "pytorch_model.bin").write_bytes(b"no pickle at all")
    relative("no-weights", "model.safetensors")
    relative("remote", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    cut = relative("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    shards = relative("shards")
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    names = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    relative("unknown-type", model_type="lama")
    relative("t5", model_type="t5", is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"])
    (relative("adapter", "config.json") / "adapter_config.json").write_text("{}")
    relative("no-tokenizer", "tokenizer.json", "tokenizer_config.json")
    (relative("bad-tokenizer") / "tokenizer.json").write_text("{}")
    (relative("bad-config") / "config.json").write_text("{oops")
    relative("other-width", hidden_size=32)


def _texts() -> None:
    def rows(name: str, *rows: dict[str, Any]) -> None:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows("asked.jsonl", {"question": "Who is Skarn?", "answer": "x"}, {"question": "Who is Lo?", "answer": "y"})
    rows("retain.jsonl", {"question": "Who is Ann?", "answer": "z"})
    rows("forget.jsonl", *({"text": f"The red stone number {i} burns in water."} for i in range(64)))
    Path("retain.txt").write_text("\n\n".join(f"A calm river of {i} boats." for i in range(64)))
    Path("empty.jsonl").write_text("")
    rows("body.jsonl", {"body": "x", "id": 3})
    Path("broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    Path("bytes.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    rows("blank.jsonl", *3 * [{"text": " "}])
    rows("numbers.jsonl", {"text": 3})
    rows("three.jsonl", *3 * [{"text": "one two"}])
    Path("letter.docx").write_text("x")
    Path("nothing").mkdir()
    rows("answer.jsonl", {"question": "a?", "choices": ["x", "y"], "answer": 7})
    Path("question.jsonl").write_text('{"question": "a?"\n')
    Path("[bold]x.jsonl").write_text("")


def _runs() -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main.main(f"{UNLEARN} --out done".split())

    def relative(name: str, *without: str) -> Path:
        folder = Path(shutil.copytree("done", name))
        for file in without:
            (folder / file).unlink()
        return folder

    def rewrite(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    rewrite(relative("newer") / "config.yaml", "format: 2", "format: 9")
    rewrite(Path("newer/report.json"), '"format": 2', '"format": 9')
    rewrite(relative("misspelt") / "config.yaml", "  steps:", "  stpes:")
    rewrite(relative("misnamed") / "config.yaml", "name: rmu", "name: rnu")
    (relative("bad-report") / "report.json").write_text("{")
    relative("half", "report.json", "patch.safetensors")
    content = Path("done/patch.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(content[:-40])
    Path("flipped.safetensors").write_bytes(content[:-8] + bytes([content[-8] ^ 255]) + content[-7:])


class Answer:
    """What a command wrote, and its exit code."""

    def __init__(self, code: object, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    def assert_refusal(self, code: int, text: str) -> None:
        """Exactly one error, this one, after the bars that a run may have shown."""
        assert (self.code, self.out) == (code, "")
        bars, _, error = self.err.partition("lethe: error: ")
        assert error == f"{text}\n"
        assert all(re.match(r"(unlearn|measure).* \d+/\d+ ", line) for line in bars.splitlines())


Lethe = Callable[..., Answer]


@pytest.fixture
def lethe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lethe:
    """Runs a command in this process, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(command: str, *more: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.main([*command.split(), *more])
        return Answer(exit_.value.code, *capsys.readouterr())

    return run


REFUSED = {
    # Noise and closed forms
    "nu negative": ("--nu -0.1", "'nu' must be a number of 0 or more. Got -0.1."),
    "lam negative": ("--solver ridge --lam -1", "'lam' must be a number of 0 or more. Got -1.0."),
    "nu in closed form": (
        "--solver ridge --nu 0.1",
        "'nu' must be 0 for --solver ridge: noise of mean zero does not move the optimum of least squares. Got 0.1.\n"
        "Pass --solver gradient to train with noise.",
    ),
    "no run to be on": ("--on nowhere", "nowhere is not a run folder.\nGive the folder that was passed as --out."),
    "on a run without sums": (
        "--solver ridge --lam 1 --on done",
        "done kept no sums, so no request can be added to it or withdrawn in closed form.\n"
        "Make it with --solver ridge (and without --no-keep-sums), or pass --solver gradient.",
    ),
    "withdraw without a run": (
        "--withdraw a",
        "'withdraw' needs --on RUN and --solver ridge: it takes a request out of that run.",
    ),
    "no layer search": (
        "--layers-from nowhere.json",
        "nowhere.json is no layer search.\nMake one: lethe layers MODEL --out nowhere.json",
    ),
    # Models
    "model missing": (
        "--model tny",
        "tny is not a local folder, not in the cache, and the hub cannot be reached.\nDid you mean tiny?\n"
        "Go online, or pass the folder of a downloaded model.",
    ),
    "model folder missing": (
        "--model ./nowhere/m",
        "there is no model folder ./nowhere/m. Pass a folder, or a hub id such as org/name.",
    ),
    "hub id offline": (
        "--model org/none",
        "org/none is not a local folder, not in the cache, and the hub cannot be reached.\n"
        "Go online, or pass the folder of a downloaded model.",
    ),
    "model is a file": (
        "--model retain.txt",
        "retain.txt is a file. Pass the folder that holds config.json and the weights.",
    ),
    "no config": (
        "--model no-config",
        "no-config has no config.json, so it is not a Hugging Face model folder.\nName one that has.",
    ),
    "broken config": (
        "--model bad-config",
        "bad-config/config.json cannot be read as JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "pickles": (
        "--model pickled",
        "pickled holds only pickled weights (pytorch_model.bin); a pickle can run code, so it is not read.\n"
        "Convert it to safetensors: https://huggingface.co/spaces/safetensors/convert",
    ),
    "no weights": (
        "--model no-weights",
        "no-weights has no weights: neither model.safetensors nor model.safetensors.index.json is there.\n"
        "Download the model again.",
    ),
    "remote code": (
        "--model remote",
        "remote/config.json asks to run code shipped with the model (auto_map), which Lethe never does.\n"
        "If transformers knows the model type itself, remove auto_map from a local copy.",
    ),
    "corrupt weights": (
        "--model cut",
        "cut/model.safetensors is corrupt or cut short: "
        "Error while deserializing header: incomplete metadata, file not fully covered\n"
        "Download it again, or copy it completely.",
    ),
    "missing shard": (
        "--model shards",
        "shards lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names.\n"
        "Download the model again.",
    ),
    "unknown type": (
        "--model unknown-type",
        f"unknown-type/config.json: transformers {transformers.__version__} knows no model_type 'lama'. "
        "The nearest is 'llama'.\nUpgrade transformers if the model is newer.",
    ),
    "encoder and decoder": (
        "--model t5",
        "t5 is not a causal language model: T5ForConditionalGeneration.\n"
        "Lethe needs a decoder-only one, with its head.",
    ),
    "adapter": (
        "--model adapter",
        "adapter is an adapter, not a model.\nMerge it into its base model and save that.",
    ),
    "no tokenizer": (
        "--model no-tokenizer",
        "no-tokenizer has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model, "
        "tekken.json, *.tiktoken is there.\nCopy the tokenizer files of the base model into it.",
    ),
    "broken tokenizer": (
        "--model bad-tokenizer",
        "the tokenizer in bad-tokenizer cannot be read (KeyError: 'added_tokens').\n"
        "Copy the tokenizer files of the base model into it.",
    ),
    "config of other weights": (
        "--model other-width",
        "other-width: lm_head.weight is stored as (2048, 16) but used as (2048, 32).\n"
        "Its config.json belongs to other weights, or its layers cannot be loaded in part.",
    ),
    # Settings
    "layer too high": ("--layer 9", "'layer' must be in [0, 3] for tiny, which has 4 layers. Got 9."),
    "layer negative": ("--layer -1", "'layer' must be 0 or more. Got -1."),
    "trained after l": (
        "--train-layers 3",
        "'train_layers' must lie in [0, 2]: a layer after --layer 2 cannot change its output. Got 3.",
    ),
    "unknown module": (
        "--train-modules mlp.dwn_proj",
        "layer 0 has no matrix named mlp.dwn_proj.\nLayer 0 has: mlp.down_proj, mlp.gate_proj, mlp.up_proj, "
        "self_attn.k_proj, self_attn.o_proj, self_attn.q_proj, self_attn.v_proj. "
        "Pass one of these to --train-modules.",
    ),
    "steps": ("--steps 0", "'steps' must be at least 1. Got 0."),
    "lr zero": ("--lr 0", "'lr' must be a positive number. Got 0.0."),
    "lr negative": ("--lr -1", "'lr' must be a positive number. Got -1.0."),
    "lr nan": ("--lr nan", "'lr' must be a positive number. Got nan."),
    "solver": (
        "--solver rigde",
        "there is no solver 'rigde'. Did you mean 'ridge'?\nSolvers: gradient, pooled, ridge. See `lethe ls solvers`.",
    ),
    "batch size": ("--batch-size 0", "'batch_size' must be at least 1. Got 0."),
    "limit": ("--limit 0", "'limit' must be at least 1. Got 0."),
    "seed": ("--seed -1", "'seed' must be in [0, 2^63). Got -1."),
    "max length short": ("--max-length 1", "'max_length' must be 2 or more. Got 1."),
    "max length count": (
        "--max-length 24 12 12 10",
        "'max_length' needs one number, or 2 for 1 topic and the retain corpus. Got 4.",
    ),
    "device": ("--device tpu9", "'device' must be one that this machine has. Got tpu9; found {devices}."),
    # Corpora
    "corpus missing": ("--forget forgt.jsonl", f"no corpus forgt.jsonl: did you mean forget.jsonl?\n{KINDS}"),
    "corpus folder missing": ("--retain no/r.txt", f"no corpus no/r.txt: there is no folder no.\n{KINDS}"),
    "corpus empty": ("--forget empty.jsonl", f"empty.jsonl: no rows.\n{ONE_TEXT}"),
    "brackets are no markup": ("--forget [bold]x.jsonl", f"[bold]x.jsonl: no rows.\n{ONE_TEXT}"),
    "field missing": (
        "--forget body.jsonl",
        "body.jsonl, line 1: no field 'text'; there is body, id.\nPass --text-field with the one that holds the text.",
    ),
    "broken JSON": (
        "--forget broken.jsonl",
        "broken.jsonl, line 2, column 10: not JSON (Expecting value).\nEach line must be one object.",
    ),
    "undecodable": ("--forget bytes.jsonl", "bytes.jsonl, line 2: byte 24 is not UTF-8.\nSave the file as UTF-8."),
    "blank rows": ("--forget blank.jsonl", f"blank.jsonl: all 3 rows blank.\n{ONE_TEXT}"),
    "no text": (
        "--forget numbers.jsonl",
        "numbers.jsonl, line 1: field 'text' holds int, not a text.\n"
        "Make it a string, or pass --text-field with another field.",
    ),
    "less than a batch": (
        "--forget three.jsonl",
        "forget corpus 'three' gives 3 rows, fewer than one batch of 4.\nAdd texts, or lower --batch-size.",
    ),
    "too few rows": (
        "--steps 100",
        "forget corpus 'forget' gives 16 batches of 4 (64 rows); 100 steps over 1 topic need 100.\n"
        "Lower --steps to 16, or pass --epochs 7 to repeat it.",
    ),
    "suffix": ("--forget letter.docx", f"letter.docx: no corpus is read from .docx.\n{KINDS}"),
    "empty folder": (
        "--forget nothing",
        "nothing is no dataset folder (EmptyDatasetError).\n"
        "It must come from save_to_disk, or hold parquet, jsonl or csv files with equal columns.",
    ),
    "overlap": (
        "--retain three.jsonl --forget three.jsonl",
        "3 forget texts found in the retain corpus too: 'three' rows 1, 2, 3.\n"
        "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap.",
    ),
    "built-in corpus": (
        "--forget builtin",
        "the built-in corpora tell of a made-up world that tiny does not know.\nPass --forget FILE.",
    ),
    # Questions
    "questions missing": (
        "--forget-questions answr.jsonl",
        "no question file answr.jsonl: did you mean answer.jsonl?\nGive a .jsonl, .json, .csv or .parquet file.",
    ),
    "questions broken": (
        "--retain-questions question.jsonl",
        "question.jsonl, line 1, column 18: not JSON (Expecting ',' delimiter).\nEach line must be one object.",
    ),
    "answer out of range": (
        "--retain-questions answer.jsonl",
        "answer.jsonl, line 1: answer 7 is no index of 2 choices; the first has index 0.\n"
        "Give 0 to 1, or the letter A to B.",
    ),
    # Run folders
    "out is a file": ("--out retain.txt", f"retain.txt exists and is no run folder.\n{OTHER_OUT}"),
    "out is no run": ("--out tiny", f"tiny exists and is no run folder.\n{OTHER_OUT}"),
    "out is another run": (
        "--out done --seed 3",
        "done holds another run: seed is 0 there and 3 here.\nChoose another --out, or delete the folder.",
    ),
    "complete, unreadable": (
        "--out bad-report",
        "bad-report/report.json, line 1: broken JSON (Expecting property name enclosed in double quotes).\n"
        "Delete it and run the same command again to write it anew.",
    ),
}


@pytest.mark.parametrize(("flags", "text"), REFUSED.values(), ids=list(REFUSED))
def test_unlearn_refuses(flags: str, text: str, lethe: Lethe) -> None:
    before = sorted(map(str, Path().rglob("*")))
    devices = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    command = CLOSED if "--solver ridge" in flags else UNLEARN
    lethe(f"{command} {flags}").assert_refusal(2, text.replace("{devices}", devices))
    assert sorted(map(str, Path().rglob("*"))) == before


NO_RUN = "Give the folder that was passed as --out."
NEWER = "format 9{} this one reads 2).\nUpgrade: pip install --upgrade lethe-unlearn"
RESUME = "Run the same command again to resume"

OTHERS = {
    "lunar without reference prompts": (
        "unlearn lunar --model tiny --forget asked.jsonl --retain retain.jsonl --reference xyz --layer 2 --out out",
        "no prompts xyz.\nGive a .jsonl, .json, .csv or .parquet file, or a .txt file.",
    ),
    "lunar on a base model": (
        "unlearn lunar --model tiny --forget asked.jsonl --retain retain.jsonl --layer 2 --out out",
        "the model refuses 0 % of 64 reference prompts, so nothing in it says that it cannot answer "
        "(10 % are needed).\nA base model has no such region: take a chat model, or pass --reference FILE with "
        "questions that it declines, "
        "or --refusals FILE with how it does so.",
    ),
    "lunar that forgets what it keeps": (
        "unlearn lunar --model tiny --forget asked.jsonl --retain asked.jsonl --layer 2 --out out",
        "2 of 2 forget prompts of 'asked' stand among the retain prompts too: rows 1, 2.\n"
        "Remove them from one side, or pass --allow-overlap.",
    ),
    "lunar on texts": (
        "unlearn lunar --model tiny --forget body.jsonl --retain retain.jsonl --layer 2 --out out",
        "body.jsonl, line 1: no 'prompt'; there is body, id.\n"
        "Name the column so (or question, instruction, text).",
    ),
    "withdraw from a run without sums": (
        "withdraw done a --out out",
        "'withdraw' needs --on RUN and --solver ridge: it takes a request out of that run.",
    ),
    "layers of a base model": (
        "layers tiny --forget asked.jsonl --retain retain.jsonl --out out.json",
        "the model refuses 0 % of 64 reference prompts, so nothing in it says that it cannot answer "
        "(10 % are needed).\nA base model has no such region: take a chat model, or pass --reference FILE with "
        "questions that it declines, "
        "or --refusals FILE with how it does so.",
    ),
    "unknown analysis": (
        "analyze alingment tiny",
        "there is no analysis 'alingment'. Did you mean 'alignment'?\n"
        "Analyses: accuracy, alignment, forget-norm, layers, max-logit, noise-sensitivity, "
        "prompt-independence, token-gradient, all. See `lethe ls analyses`.",
    ),
    "unknown command": (
        "unlern rmu",
        "there is no command 'unlern'. Did you mean 'unlearn'?\n"
        "Commands: demo, unlearn, sweep, advise, layers, withdraw, eval, data, analyze, check, ls, report, "
        "compare, export, apply, revert, diff, completion.",
    ),
    "unknown method": (
        "unlearn adaptive-rnu",
        "there is no method 'adaptive-rnu'. Did you mean 'adaptive-rmu'?\n"
        "Methods: adaptive-rmu, finetune, grad-diff, lunar, rmu, rsv. See `lethe ls methods`.",
    ),
    "method forgotten": (
        "unlearn --model tiny",
        "the method comes before --model: lethe unlearn METHOD --model ...\nSee `lethe ls methods`.",
    ),
    "corpora forgotten": (
        "unlearn rmu --model tiny --layer 2 --out out",
        "the built-in corpora tell of a made-up world that tiny does not know.\nPass --forget and --retain FILE.",
    ),
    "newer config": (
        "unlearn newer/config.yaml --out out",
        f"newer/config.yaml was written by a newer Lethe (0.1.0; {NEWER.format(',')}",
    ),
    "unknown key": (
        "unlearn misspelt/config.yaml --out out",
        "misspelt/config.yaml: solver: Gradient has no setting 'stpes'. Did you mean 'steps'?",
    ),
    "unknown method in config": (
        "unlearn misnamed/config.yaml --out out",
        "there is no method 'rnu'. Did you mean 'rmu'?\n"
        "Methods: adaptive-rmu, finetune, grad-diff, lunar, rmu, rsv. See `lethe ls methods`.",
    ),
    "config missing": (
        "unlearn nowhere/config.yaml",
        "cannot read nowhere/config.yaml: No such file or directory.\nName the config.yaml of a run folder.",
    ),
    "layer of a dry run": (
        f"{UNLEARN} --layer 4 --dry-run",
        "'layer' must be in [0, 3] for tiny, which has 4 layers. Got 4.",
    ),
    "demo into a file": ("demo --out retain.txt", f"retain.txt exists and is no run folder.\n{OTHER_OUT}"),
    "eval of nothing": (
        "eval tiny",
        "there is nothing to measure tiny on.\nPass --forget-questions, --retain-questions, --forget or --retain.",
    ),
    "eval of a missing run": (
        "eval ./dome",
        "there is no model folder ./dome.\nDid you mean done?",
    ),
    "eval of an incomplete run": ("eval half", f"the run in half is not complete.\n{RESUME} it."),
    "check layer": ("check tiny --layer 8", "'layer' must be in [0, 3] for tiny, which has 4 layers. Got 8."),
    "list": (
        "ls modells",
        "there is no list 'modells'. Did you mean 'methods'? "
        "Lists: methods, metrics, analyses, suites, solvers, optimizers, runs.",
    ),
    "report of nothing": ("report", "no run was named.\nName one or more run folders: lethe report runs/a runs/b"),
    "report of a missing run": ("report nowhere", f"there is no run folder at nowhere.\n{NO_RUN}"),
    "report of a model": (
        "report tiny",
        f"tiny is not a run folder: it has neither report.json nor config.yaml.\n{NO_RUN}",
    ),
    "report of an incomplete run": ("report half", f"the run is not complete: half has no report.json.\n{RESUME}."),
    "report of a newer run": (
        "report newer",
        f"newer/report.json was written by a newer Lethe ({NEWER.format(';')}",
    ),
    "report damaged": (
        "report done bad-report --out out",
        "bad-report/report.json, line 1: broken JSON (Expecting property name enclosed in double quotes).\n"
        "Delete it and run the same command again to write it anew.",
    ),
    "export of no run": ("export tiny --to out", f"tiny is not a run folder.\n{NO_RUN}"),
    "export of an incomplete run": ("export half --to out", f"the run in half is not complete.\n{RESUME} it."),
    "patch missing": (
        "apply nowhere tiny --to out",
        "there is no patch file nowhere.\nName the patch.safetensors of a run.",
    ),
    "patch corrupt": (
        "apply flipped.safetensors tiny --to out",
        "flipped.safetensors is corrupt: model.layers.2.mlp.down_proj.weight differs from its hash.\n"
        "Make or copy the patch again.",
    ),
    "patch cut short": (
        "apply cut.safetensors tiny --to out",
        "cut.safetensors is corrupt or cut short: "
        "Error while deserializing header: incomplete metadata, file not fully covered\nMake or copy the patch again.",
    ),
    "no patch": (
        "apply tiny/model.safetensors tiny --to out",
        "tiny/model.safetensors is a safetensors file, but not a patch of Lethe.\nName the patch.safetensors of a run.",
    ),
    "wrong base": (
        "apply done/patch.safetensors other-base --to out",
        "model.layers.0.mlp.down_proj.weight in other-base is not the tensor that the patch was made for.\n"
        "It was made with rmu for tiny: pass that model, unedited.",
    ),
    "revert of no export": (
        "revert tiny --to out",
        "tiny cannot be reverted: without lethe/originals.safetensors it is not an export of Lethe.\n"
        "Name a folder that `lethe export` or `lethe apply` wrote.",
    ),
    "diff of a missing folder": (
        "diff tiny ./tinny",
        "there is no model folder ./tinny.\nDid you mean tiny?",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("command", "text"), OTHERS.values(), ids=list(OTHERS))
def test_other_commands_refuse(command: str, text: str, lethe: Lethe, other_base: None) -> None:
    before = sorted(map(str, Path().rglob("*")))
    lethe(command).assert_refusal(2, text)
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.fixture(scope="module")
def other_base(workplace: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(workplace / "tiny")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(workplace / "other-base")


USAGE = {
    "misspelt flag": (
        f"{UNLEARN} --stpes 4",
        ["Unrecognized options: --stpes, 4", "Perhaps you meant:", "--steps INT"],
    ),
    "misspelt flag of a command": ("demo --sed 1", ["Unrecognized options: --sed, 1", "--seed INT"]),
    "flag of another solver": (f"{CLOSED} --solver ridge --lr 1", ["Unrecognized options: --lr, 1"]),
    "flag of a solver that was not chosen": (f"{UNLEARN} --lam 1", ["Unrecognized options: --lam, 1"]),
    "flag of another solver in a sweep": (
        "sweep rmu --solver ridge --lr 1 --grid layer=1,2",
        ["Unrecognized options: --lr, 1"],
    ),
    "solver without a name": (f"{UNLEARN} --solver", ["Missing value for argument '--solver'"]),
    "type": (f"{UNLEARN} --steps abc", ["Error parsing --steps", "'abc'", "--steps INT"]),
    "choice": (f"{UNLEARN} --dtype int8", ["invalid choice 'int8' for argument '--dtype'", "'bfloat16'"]),
    "value missing": (f"{UNLEARN} --layer", ["Missing value for argument '--layer'"]),
    "surplus": (f"{UNLEARN} --retain retain.txt b.txt", ["Unrecognized options: b.txt"]),
    "argument missing": ("export done", ["Missing from lethe export", "--to PATH"]),
}


@pytest.mark.parametrize(("command", "texts"), USAGE.values(), ids=list(USAGE))
def test_wrong_flags_are_answered_with_the_right_ones(command: str, texts: list[str], lethe: Lethe) -> None:
    answer = lethe(command)
    assert (answer.code, answer.out) == (2, "")
    said = " ".join(answer.err.replace("│", " ").split())
    for text in [*texts, "--help"]:
        assert text in said
    assert "Traceback" not in said
    assert not Path("out").exists()


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layers_train_fewer_matrices(layer: int, lethe: Lethe) -> None:
    assert lethe(f"{UNLEARN} --layer {layer}").code == 0
    report = json.loads(Path("out/report.json").read_text())
    assert report["patch"]["tensors"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(layer + 1)]


def test_a_complete_run_is_shown_again(lethe: Lethe) -> None:
    answer = lethe(f"{UNLEARN} --out done")
    assert answer.code == 0
    assert "report: done/report.html\n" in answer.out
    assert answer.err == "done holds this run already, complete.\n"


# What may fail while a run works


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_path_under_a_file_cannot_be_written(lethe: Lethe) -> None:
    lethe(f"{UNLEARN} --out retain.txt/a").assert_refusal(
        1, f"retain.txt/a could not be written: {os.strerror(errno.ENOTDIR)}.\nName a path that you may write to."
    )
    assert lethe("export done --to retain.txt/a").code == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder_cannot_be_written(lethe: Lethe, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    out = tmp_path / "closed" / "a"
    lethe(f"{UNLEARN} --out {out}").assert_refusal(
        1, f"{out} could not be written: {os.strerror(errno.EACCES)}.\nName a path that you may write to."
    )


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (UNLEARN, "out/config.yaml"),
        ("export done --to out", "out"),
        ("apply done/patch.safetensors tiny --to out", "out"),
        ("report done done --out out", "out"),
    ],
    ids=["unlearn", "export", "apply", "report"],
)
def test_a_full_disk_leaves_nothing(command: str, path: str, lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    there = sorted(map(str, Path().rglob("*")))
    monkeypatch.setattr(os, "replace", no_space)
    why = f"could not be written: {os.strerror(errno.ENOSPC)}.\nFree some space, or name another disk."
    lethe(command).assert_refusal(1, f"{path} {why}")
    assert sorted(map(str, Path().rglob("*"))) == there


def test_a_disk_that_fills_up_later_keeps_the_checkpoint(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full_for_the_patch(source: Any, target: Any) -> None:
        no_space() if Path(target).name == "patch.safetensors" else replace(source, target)

    monkeypatch.setattr(os, "replace", full_for_the_patch)
    lethe(UNLEARN).assert_refusal(
        1,
        f"out/patch.safetensors could not be written: {os.strerror(errno.ENOSPC)}.\n"
        "Free some space, or name another disk.",
    )
    assert sorted(p.name for p in Path("out").iterdir()) == ["checkpoint.safetensors", "config.yaml", "history.jsonl"]
    monkeypatch.setattr(os, "replace", replace)
    assert lethe(UNLEARN).code == 0
    assert Path("out/patch.safetensors").read_bytes() == Path("done/patch.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (
            UNLEARN,
            "with layers 0..2, 4 rows of up to 24 tokens.\n"
            "Lower --batch-size (and raise --accumulate), --max-length or --layer, or pass --dtype bfloat16; "
            "--evaluate none spares loading the whole model.",
        ),
        ("check tiny --layer 2", "with layers 0..2.\nLower --layer."),
        ("eval tiny --retain retain.txt", "with tiny loaded whole.\nPass --dtype bfloat16."),
    ],
    ids=["unlearn", "check", "eval"],
)
def test_out_of_memory_says_what_to_lower(
    command: str, text: str, lethe: Lethe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(LayerSlice, "record", fail)
    monkeypatch.setattr("lethe.evaluation.measure.measure", fail)
    lethe(command).assert_refusal(1, f"out of memory {text}")
    assert not Path("out").exists()


def test_a_run_that_diverges_at_once_leaves_nothing(lethe: Lethe) -> None:
    lethe(f"{UNLEARN} --lr 1e30").assert_refusal(
        1,
        "training diverged at step 1: forget loss inf, retain loss inf, gradient norm nan.\n"
        "The weights of step 0 were kept. Lower --lr (now 1e+30), --alpha or the target's length.",
    )
    assert not Path("out").exists()


def test_a_run_that_diverges_later_keeps_its_checkpoint(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    after_step(monkeypatch, 12, lambda measures: {**measures, "forget_loss": float("nan")})
    answer = lethe(f"{UNLEARN} --steps 16")
    assert (answer.code, answer.out) == (1, "")
    assert "training diverged at step 12: forget loss nan" in answer.err
    assert "The weights of step 10 were kept." in answer.err
    assert sorted(p.name for p in Path("out").iterdir()) == ["checkpoint.safetensors", "config.yaml", "history.jsonl"]


def test_an_interrupted_run_goes_on(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    assert lethe(f"{UNLEARN} --steps 16 --out through").code == 0
    with monkeypatch.context() as patch:
        after_step(patch, 12, interrupt)
        answer = lethe(f"{UNLEARN} --steps 16")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.endswith("lethe: interrupted. The same command goes on from the last checkpoint.\n")
    assert sorted(p.name for p in Path("out").iterdir()) == ["checkpoint.safetensors", "config.yaml", "history.jsonl"]
    assert lethe(f"{UNLEARN} --steps 16").code == 0
    assert Path("out/patch.safetensors").read_bytes() == Path("through/patch.safetensors").read_bytes()
    shutil.rmtree("through")


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Any], Any]) -> None:
    """Make `act` see, and change, what is measured at one step."""
    from lethe.solvers.gradient import _Training

    measures, calls = _Training.measures, iter(range(10**6))

    def measured(*args: Any) -> Any:
        found = measures(*args)
        return act(found) if next(calls) == step else found

    monkeypatch.setattr(_Training, "measures", measured)


# Through the installed command


def test_a_process_of_its_own_says_the_same() -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lethe.cli.main", *UNLEARN.split(), "--model", "pickled"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"lethe: error: {REFUSED['pickles'][1]}\n"
