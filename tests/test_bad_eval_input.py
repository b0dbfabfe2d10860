"""What `lethe eval` answers to files and arguments it cannot use: one error that names file, row and fix."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lethe.cli import main
from lethe.suites import world

GOOD = {"question": "Which?", "choices": ["one", "two"], "answer": 1}
SOLVED = {"question": "What is it?", "answer": "a stone"}


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths are relative, the hub is out of reach, and transformers talks again after each test."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace.parent / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    root = tmp_path_factory.mktemp("bad") / "here"
    root.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        _models(foreign_model)
        _exams()
        _sets()
    return root


def _models(foreign_model: Path) -> None:
    shutil.copytree(foreign_model, "tiny")
    for name in ("no-tokenizer", "nan", "no-pad", "other-words"):
        shutil.copytree("tiny", name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("no-tokenizer", name).unlink()
    weights = load_file("nan/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, "nan/model.safetensors", metadata={"format": "pt"})
    path = Path("no-pad/tokenizer_config.json")
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"})
    )
    path = Path("other-words/tokenizer.json")
    content = json.loads(path.read_text())
    longest = next(word for word in content["model"]["vocab"] if word.isalpha() and len(word) == 1)
    content["model"]["vocab"] = {
        ("\u00fe" if word == longest else word): number for word, number in content["model"]["vocab"].items()
    }
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        few = LlamaConfig(
            vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(few).save_pretrained("few-words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.MODEL_FOLDER / name, "few-words")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("")


def rows(name: str, *found: Any) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in found))


def _exams() -> None:
    def other(name: str, **changes: Any) -> None:
        row = {**GOOD, **changes}
        rows(f"{name}.jsonl", GOOD, {key: value for key, value in row.items() if value != "absent"})

    rows("good.jsonl", GOOD)
    other("no-question", question="absent", text="Which?")
    other("no-choices", choices="absent")
    other("no-answer", answer="absent")
    other("index", answer=2)
    other("no-option", choices=[])
    other("one-option", choices=["one"])
    other("blank-option", choices=["one", " "])
    other("twice", choices=["one", "one"], answer="one")
    other("not-there", answer="three")
    other("number", question=3)
    other("null", answer=None)
    other("text-choices", choices="one, two")
    rows("mixed.jsonl", GOOD, {"input": "Which?", "label": "A", "A": "one", "B": "two"}, {"body": "x", "id": 3})
    rows("list.jsonl", [1, 2])
    rows("long.jsonl", GOOD, {"question": "Which?", "choices": ["one", "two " * 80], "answer": 0})
    Path("broken.jsonl").write_text(json.dumps(GOOD) + '\n{"question": "Wh')
    Path("broken.json").write_text(f"[{json.dumps(GOOD)},\n")
    Path("bytes.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "\xff"}\n')
    Path("empty.jsonl").write_text("")
    Path("empty.csv").write_text("question,choice0,choice1,answer\n")
    Path("quote.csv").write_text('question,choice0,choice1,answer\nWhich?,one,two,A\n"Which?,one,two,A\n')
    Path("cells.csv").write_text("question,choice0,choice1,answer\nWhich, then?,one,two,A\n")
    Path("huge.csv").write_text(f"question,choice0,choice1,answer\n{'x' * 10_000_001},one,two,A\n")
    Path("none.parquet").write_text("PAR1")
    Path("exam.docx").write_text("x")
    Path("nothing").mkdir()
    Path("bom.jsonl").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    rows("shots/dev/x.jsonl", GOOD)
    rows("shots/x_test.jsonl", GOOD)
    Path("tasks").mkdir()
    rows("half.jsonl", {**GOOD, "choices": ["one", "two \ud800"]})
    Path("digits.jsonl").write_text(json.dumps(GOOD) + '\n{"question": "Which?", "answer": ' + "1" * 5000 + "}\n")
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    os.mkfifo("pipe")
    Path("link").symlink_to("good.jsonl")


def _sets() -> None:
    rows("asked.jsonl", SOLVED)
    rows("asked-column.jsonl", SOLVED, {"question": "What is it?", "reply": "a stone"})
    rows("asked-twice.jsonl", {"question": "Which?", "choices": ["one", "one"], "answer": "one"})
    rows("asked-index.jsonl", {**GOOD, "answer": -1})
    rows("forget.jsonl", {"text": "A red  stone."}, {"text": "A blue stone."})
    rows("seen.jsonl", {"text": "Never seen."}, {"text": "A red stone."})
    Path("own").mkdir()
    Path("tofu").mkdir()
    rows("tofu/forget05_perturbed.json", SOLVED)


Lethe = Callable[[str], tuple[object, str, str]]


@pytest.fixture
def lethe(capsys: pytest.CaptureFixture[str]) -> Lethe:
    """Runs `lethe eval` in this process: exit code, stdout, stderr."""

    def run(words: str) -> tuple[object, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.main(["eval", *words.split()])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run


REFUSED = {
    "exam missing": (
        "tiny --exam god.jsonl",
        "no exam god.jsonl: did you mean good.jsonl?\nGive a .jsonl, .json, .csv or .parquet file, or a folder.",
    ),
    "exam folder missing": (
        "tiny --exam ./nowhere/x",
        "no exam nowhere/x.\nGive a .jsonl, .json, .csv or .parquet file, or a folder.",
    ),
    "hub offline": (
        "tiny --exam org/none",
        "no exam org/none: it is no file or folder here, and the hub does not give it (ConnectionError).\n"
        "Go online (and accept its licence, if it is gated), or fetch its files and name their folder.",
    ),
    "no question column": (
        "tiny --exam no-question.jsonl",
        "no-question.jsonl, line 2: no 'question'; there is choices, answer, text.\n"
        "Name the column so (or prompt, input, query).",
    ),
    "no choices column": (
        "tiny --exam no-choices.jsonl",
        "no-choices.jsonl, line 2: no 'choices'; there is question, answer.\n"
        "Name the column so (or options), or give one column a choice: choice0, choice1, ... or A, B, ...",
    ),
    "no answer column": (
        "tiny --exam no-answer.jsonl",
        "no-answer.jsonl, line 2: no 'answer'; there is question, choices.\n"
        "Name the column so (or target, label, gold, correct).",
    ),
    "answer out of range": (
        "tiny --exam index.jsonl",
        "index.jsonl, line 2: answer 2 is no index of 2 choices; the first has index 0.\n"
        "Give 0 to 1, or the letter A to B.",
    ),
    "no choice": (
        "tiny --exam no-option.jsonl",
        "no-option.jsonl, line 2: 0 choices found, where 2 to 26 must stand.\n"
        "Add the wrong options; a free-form question has no choices at all.",
    ),
    "one choice": (
        "tiny --exam one-option.jsonl",
        "one-option.jsonl, line 2: 1 choice found, where 2 to 26 must stand.\n"
        "Add the wrong options; a free-form question has no choices at all.",
    ),
    "blank choice": (
        "tiny --exam blank-option.jsonl",
        "blank-option.jsonl, line 2: choice 1 is empty.\nFill it in, or remove the row.",
    ),
    "answer twice": (
        "tiny --exam twice.jsonl",
        "twice.jsonl, line 2: answer is meant by choices 0 and 1.\nGive the 0-based index instead.",
    ),
    "answer not among the choices": (
        "tiny --exam not-there.jsonl",
        "not-there.jsonl, line 2: answer is not among the 2 choices.\n"
        "Give the choice's own text, its letter A to B, or its 0-based index.",
    ),
    "question is a number": (
        "tiny --exam number.jsonl",
        "number.jsonl, line 2: question holds int, not a text.\nMake it a string.",
    ),
    "answer is null": (
        "tiny --exam null.jsonl",
        "null.jsonl, line 2: answer holds NoneType, not a text.\nMake it a string.",
    ),
    "choices are a text": (
        "tiny --exam text-choices.jsonl",
        "text-choices.jsonl, line 2: choices holds str, not a list of texts.\nMake it a list.",
    ),
    "mixed schemas": (
        "tiny --exam mixed.jsonl",
        "mixed.jsonl, line 3: no 'question'; there is body, id.\nName the column so (or prompt, input, query).",
    ),
    "row is a list": (
        "tiny --exam list.jsonl",
        "list.jsonl, line 1: list found, where an object must stand.\nGive each row as names and values.",
    ),
    "truncated JSON lines": (
        "tiny --exam broken.jsonl",
        "broken.jsonl, line 2, column 14: not JSON (Unterminated string starting at).\nEach line must be one object.",
    ),
    "truncated JSON array": (
        "tiny --exam broken.json",
        "broken.json, line 2, column 1: not JSON (Expecting value).\nThe file must be one array.",
    ),
    "invalid UTF-8": (
        "tiny --exam bytes.jsonl",
        "bytes.jsonl, line 2: byte 77 is not UTF-8.\nSave the file as UTF-8.",
    ),
    "empty file": (
        "tiny --exam empty.jsonl",
        "empty.jsonl holds no question.\nGive a file with at least one.",
    ),
    "header only": (
        "tiny --exam empty.csv",
        "empty.csv holds no question.\nGive a file with at least one.",
    ),
    "quote never closed": (
        "tiny --exam quote.csv",
        "quote.csv, row 2: not CSV (unexpected end of data).\nWrite the file again.",
    ),
    "more cells": (
        "tiny --exam cells.csv",
        "cells.csv, row 1: 5 cells, where the first row has 4.\nPut cells with commas in quotes.",
    ),
    "huge row": (
        "tiny --exam huge.csv",
        "huge.csv, row 1: not CSV (field larger than field limit (10000000)).\nWrite the file again.",
    ),
    "no parquet": (
        "tiny --exam none.parquet",
        "none.parquet is no parquet file, or a damaged one.\nFetch it again.",
    ),
    "other file": (
        "tiny --exam exam.docx",
        "exam.docx: no exam is read from .docx.\nGive a .jsonl, .json, .csv or .parquet file.",
    ),
    "folder without an exam": (
        "tiny --exam nothing",
        "nothing holds no question.\n"
        "Give a .jsonl, .json, .csv or .parquet file with at least one, or a folder of such.",
    ),
    "unknown subject": (
        "tiny --exam good.jsonl --subjects goood",
        "the exam has no subject goood; there is good.\nDid you mean good?",
    ),
    "too many shots": (
        "tiny --exam shots --shots 2",
        "subject 'x' has 1 solved examples, where 2 are asked for.\n"
        "Put a file with more of them beside the questions (dev/SUBJECT_dev.csv), or ask for fewer shots.",
    ),
    "shots below 0": (
        "tiny --exam good.jsonl --shots -1",
        "'shots' must be at least 0. Got -1.",
    ),
    "limit 0": (
        "tiny --exam good.jsonl --limit 0",
        "'limit' must be at least 1. Got 0.",
    ),
    "chat without a template": (
        "tiny --exam good.jsonl --chat",
        "the tokenizer has no chat template.\nScore the model without one, or give a chat model.",
    ),
    "harness chat without a template": (
        "tiny --harness x --include tasks --chat",
        "the tokenizer has no chat template.\nScore the model without one, or give a chat model.",
    ),
    "answer beyond the context": (
        "tiny --exam long.jsonl --scoring cloze",
        "long.jsonl, line 2: an answer has 81 tokens, and the model reads 64.\n"
        "Remove the question, or take a model with a longer context.",
    ),
    "subjects without an exam": (
        "tiny --subjects x",
        "--subjects does nothing without --exam.\nPass --exam, or leave --subjects out.",
    ),
    "shuffle without an exam": (
        "tiny --shuffle 0",
        "--shuffle does nothing without --exam.\nPass --exam, or leave --shuffle out.",
    ),
    "include without the harness": (
        "tiny --include tasks",
        "--include does nothing without --harness.\nPass --harness, or leave --include out.",
    ),
    "chat without anything": (
        "tiny --chat",
        "--chat does nothing without --exam, --harness or --suite.\n"
        "Pass --exam, --harness or --suite, or leave --chat out.",
    ),
    "include missing": (
        "tiny --harness x --include nowhere",
        "no folder nowhere.\nGive the folder that holds the task files (.yaml).",
    ),
    "batch size 0": (
        "tiny --harness x --batch-size 0",
        "'batch_size' must be at least 1. Got 0.",
    ),
    "nothing to measure": (
        "tiny",
        "there is nothing to measure tiny on.\nPass --forget-questions, --retain-questions, --forget or --retain.",
    ),
    "question file column": (
        "tiny --forget-questions asked-column.jsonl",
        "asked-column.jsonl, line 2: no 'answer'; there is question, reply.\n"
        "Name the column so (or target, label, gold, correct).",
    ),
    "question answer twice": (
        "tiny --forget-questions asked-twice.jsonl",
        "asked-twice.jsonl, line 1: choices 0 and 1 are both the answer.\nChange one of them, or remove the row.",
    ),
    "question index": (
        "tiny --forget-questions asked-index.jsonl",
        "asked-index.jsonl, line 1: answer -1 is no index of 2 choices; the first has index 0.\n"
        "Give 0 to 1, or the letter A to B.",
    ),
    "unknown suite": (
        "tiny --suite tofo --data tofu",
        "there is no suite 'tofo'. Did you mean 'tofu'?\nSuites: builtin, muse, tofu. See `lethe ls suites`.",
    ),
    "suite without data": (
        "tiny --suite tofu",
        "--suite tofu needs the folder of its files.\nPass --data DIR.",
    ),
    "holdout missing": (
        "tiny --forget forget.jsonl --holdout sen.jsonl",
        "no corpus sen.jsonl: did you mean seen.jsonl?\n"
        "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset as name:config:split.",
    ),
    "holdout seen": (
        "tiny --forget forget.jsonl --holdout seen.jsonl",
        "seen.jsonl: 1 of 2 texts also stand in the forget corpora, first row 2.\n"
        "A holdout must be text that the model never saw: remove them.",
    ),
    "nli missing": (
        "tiny --forget-questions asked.jsonl --nli nowhere",
        "there is no model folder nowhere, which --nli names.\n"
        "Pass the folder of one in Hugging Face's format, or leave --nli out.",
    ),
    "encoder missing": (
        "tiny --forget-questions asked.jsonl --encoder nowhere",
        "there is no model folder nowhere, which --encoder names.\n"
        "Pass the folder of one in Hugging Face's format, or leave --encoder out.",
    ),
    "retain-only missing": (
        "tiny --forget-questions asked.jsonl --retain-only ./nowhere",
        "there is no model folder ./nowhere. Pass a folder, or a hub id such as org/name.",
    ),
    "retain-only no model": (
        "tiny --forget-questions asked.jsonl --retain-only nothing",
        "nothing has no config.json, so it is not a Hugging Face model folder.\nName one that has.",
    ),
    "retain-only is a run": (
        "tiny --forget-questions asked.jsonl --retain-only run",
        "run is a run folder, and --retain-only needs a model that was trained without the forget set.\n"
        "Name the folder of such a model; an edited one has seen it.",
    ),
    "retain-only of other words": (
        "tiny --forget-questions asked.jsonl --retain-only other-words",
        "the retain-only model other-words has another vocabulary (2047 tokens) than the one that is measured (2048).\n"
        "Take one that was trained from the same base.",
    ),
    "no tokenizer": (
        "no-tokenizer --exam good.jsonl",
        "no-tokenizer has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt, spiece.model, "
        "tekken.json, *.tiktoken is there.\n"
        "Copy the tokenizer files of the base model into it.",
    ),
    "tokenizer of another model": (
        "few-words --exam good.jsonl",
        "the tokenizer of few-words has 2048 tokens, and the model knows 100: it belongs to another model.\n"
        "Copy the tokenizer files of the base model into its folder.",
    ),
    "half a character": (
        "tiny --exam half.jsonl",
        "half.jsonl, line 1 holds half a surrogate pair (\\ud800 to \\udfff).\nRemove it.",
    ),
    "number of 5000 digits": (
        "tiny --exam digits.jsonl",
        "digits.jsonl, line 2: JSON that cannot be read: a number of thousands of digits, or brackets nested as deep.\n"
        "Write the row anew.",
    ),
    "nested too deep": (
        "tiny --exam deep.json",
        "deep.json: JSON that cannot be read: a number of thousands of digits, or brackets nested as deep.\n"
        "Write the row anew.",
    ),
    "no name of an exam": (
        "tiny --exam=",
        "--exam names nothing.\nGive a file, a folder or a hub dataset.",
    ),
    "no name of a task": (
        "tiny --harness ,",
        "--harness names no task.\nGive at least one, as in --harness wmdp,mmlu.",
    ),
    "batch size without the harness": (
        "tiny --exam good.jsonl --batch-size 8",
        "--batch-size does nothing without --harness.\nPass --harness, or leave --batch-size out.",
    ),
    "cache or none": (
        "tiny --exam good.jsonl --cache kept --no-cache",
        "--cache and --no-cache contradict each other.\nLeave one of them out.",
    ),
    "sets beside a suite": (
        "tiny --suite tofu --data tofu --forget forget.jsonl --split dev",
        "--suite brings its own sets, so --forget, --split would do nothing.\n"
        "Measure the suite and your own sets by two commands.",
    ),
    "suite in no folder": (
        "tiny --suite tofu --data tofo",
        "no folder tofo: did you mean tofu?\n"
        "Give one with the files of locuslab/TOFU on the Hugging Face hub; MIT licence.",
    ),
    "holdout without texts": (
        "tiny --forget-questions asked.jsonl --holdout seen.jsonl",
        "--holdout does nothing without texts to forget, which it is compared with.\n"
        "Pass --forget FILE, or leave --holdout out.",
    ),
    "keywords without corpora": (
        "tiny --retain-questions good.jsonl --keywords stone",
        "--keywords does nothing without both corpora and questions with choices on a set to keep.\n"
        "Pass --forget, --retain and --retain-questions, or leave --keywords out.",
    ),
    "out is what is read": (
        "tiny --exam good.jsonl --out good.jsonl",
        "good.jsonl is read by this very command, and would be overwritten.\nName another file.",
    ),
    "text is what is read": (
        "tiny --forget-questions asked.jsonl --out a.json --keep-text ./asked.jsonl",
        "asked.jsonl is read by this very command, and would be overwritten.\nName another file.",
    ),
    "out and text in one file": (
        "tiny --exam good.jsonl --out a.json --keep-text a.json",
        "--out and --keep-text both name a.json.\nName two files.",
    ),
    "out is a pipe": (
        "tiny --exam good.jsonl --out pipe",
        "pipe is a link, a device or a pipe, and would be replaced by a file.\nName another file.",
    ),
    "text is a link": (
        "tiny --exam good.jsonl --out a.json --keep-text link",
        "link is a link, a device or a pipe, and would be replaced by a file.\nName another file.",
    ),
    "out in no folder": (
        "tiny --exam good.jsonl --out nowhere/a.json",
        "nowhere/a.json cannot be written: there is no folder nowhere.\nMake it, or name another file.",
    ),
    "out is a folder": (
        "tiny --exam good.jsonl --out nothing",
        "nothing is a folder.\nName a file.",
    ),
    "text in no folder": (
        "tiny --exam good.jsonl --out a.json --keep-text nowhere/a.jsonl",
        "nowhere/a.jsonl cannot be written: there is no folder nowhere.\nMake it, or name another file.",
    ),
}
"""Command line, and the one error that answers it."""

OTHERS_WORDS = {
    "unknown split": (
        "tiny --suite tofu:forgot05 --data tofu",
        "TOFU's splits are forget01, forget05 and forget10. Got 'forgot05'.",
    ),
    "suite without files": (
        "tiny --suite tofu:forget10 --data tofu",
        "no forget10_perturbed.json in tofu: did you mean forget05_perturbed.json?",
    ),
    "suite file incomplete": (
        "tiny --suite tofu:forget05 --data tofu",
        "tofu/forget05_perturbed.json, question 1: no 'perturbed_answer', which the truth ratio needs.",
    ),
    "data missing": ("tiny --data owm", "no folder owm: did you mean own?"),
    "data empty": (
        "tiny --data own",
        "own holds neither forget.jsonl nor forget/*.jsonl, retain.jsonl or questions.jsonl.",
    ),
}
"""Refused by a suite or by the reader of own data; their own tests have the whole text."""

BAR = re.compile(r"measure.* \d+/\d+ ")


def refusal(words: str, lethe: Lethe) -> tuple[object, str]:
    """Exit code and error of a command that prints no result and leaves no file."""
    written = "" if "--out" in words else " --out out.json --keep-text text.jsonl"
    before = sorted(Path().rglob("*"))
    code, out, err = lethe(words + written)
    assert out == ""
    assert sorted(Path().rglob("*")) == before
    bars, _, error = err.partition("lethe: error: ")
    assert all(BAR.match(line) for line in bars.splitlines()), bars
    return code, error


@pytest.mark.parametrize(("words", "text"), REFUSED.values(), ids=list(REFUSED))
def test_one_error_that_says_what_to_do(words: str, text: str, lethe: Lethe) -> None:
    assert refusal(words, lethe) == (2, f"{text}\n")


@pytest.mark.parametrize(("words", "text"), OTHERS_WORDS.values(), ids=list(OTHERS_WORDS))
def test_what_suites_and_own_data_refuse(words: str, text: str, lethe: Lethe) -> None:
    code, error = refusal(words, lethe)
    assert (code, error.splitlines()[0]) == (2, text)


@pytest.mark.parametrize("asked", ["--exam good.jsonl", "--forget-questions asked.jsonl"])
def test_weights_that_are_no_numbers(asked: str, lethe: Lethe) -> None:
    code, error = refusal(f"nan {asked}", lethe)
    assert code == 1
    assert re.match(r"the model's output is NaN or infinite on \d of \d rows, so it cannot be scored\.\n", error)


def test_a_cache_that_is_a_file(lethe: Lethe) -> None:
    text = "good.jsonl could not be written: File exists.\nName a path that you may write to.\n"
    assert refusal("tiny --exam good.jsonl --cache good.jsonl", lethe) == (1, text)


def test_no_text_of_a_question_is_quoted(lethe: Lethe) -> None:
    for words, text in REFUSED.values():
        assert not any(said in text for said in ("Which", "a stone", "A red")), words


@pytest.mark.parametrize("words", ["tiny --exam bom.jsonl", "no-pad --exam good.jsonl", "tiny --exam shots --shots 1"])
def test_what_looks_bad_and_works(words: str, lethe: Lethe) -> None:
    code, out, _ = lethe(f"{words} --json --no-cache")
    assert code == 0
    assert json.loads(out)["scores"]["exam_accuracy/all"]["n"] == 1
