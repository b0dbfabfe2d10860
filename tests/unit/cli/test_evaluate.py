"""`lethe eval`: what it asks, prints, keeps and writes."""

import dataclasses
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from lethe import LoadedModel, evaluate, load_model, load_tokenizer, metrics
from lethe.cli import main
from lethe.data.exams import Exam, ExamQuestion, read_exam
from lethe.data.hub_exams import GROUPS, find_exam, groups_of
from lethe.data.prompt_corpora import PromptCorpora
from lethe.data.prompts import Prompts
from lethe.data.settings import DataSettings
from lethe.errors import QuestionError, UsageError
from lethe.evaluation import eval_sets, measure_target
from lethe.evaluation.exam import Marks, sit
from lethe.evaluation.harness import task_data, write_tasks
from lethe.evaluation.measure import Metrics
from lethe.evaluation.results import measured_on
from lethe.evaluation.score_cache import ScoreCache
from lethe.evaluation.settings import EvalSettings
from lethe.metrics.entailment import Entailment
from lethe.runs import model_or_run as targets
from lethe.runs.model_or_run import Target
from lethe.suites import world
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question, Scores

SUBJECTS = ("anatomy", "astronomy", "virology")
SECRET = "Zorblax"
"""Stands in every question and corpus: it must not turn up anywhere it was not asked for."""
UNLEARN = (
    "unlearn rmu --model tiny --forget forget.jsonl --retain retain.txt --layer 2 --steps 4 --lr 0.1 --max-length 24 "
    "--evaluate none --out run"
)
EXAM = "eval tiny --exam exam --shots 1"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, foreign_model: Path) -> Path:
    """A tiny model, a finished run on it, an exam of three subjects, questions and corpora."""
    root = tmp_path_factory.mktemp("eval") / "here"
    (root / "exam" / "dev").mkdir(parents=True)
    shutil.copytree(foreign_model, root / "tiny")
    for number, subject in enumerate(SUBJECTS):
        rows = [
            {"question": f"{SECRET} {i}?", "choices": ["red", "blue", "a stone", "none"], "answer": (i + number) % 4}
            for i in range(6)
        ]
        for name, part in (("exam/dev", rows[:1]), ("exam", rows[1:])):
            (root / name / f"{subject}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    asked = ({"question": f"What is {SECRET} {i}?", "answer": "a stone"} for i in range(3))
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    texts = ({"text": f"The red {SECRET} number {i} burns in water."} for i in range(16))
    (root / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (root / "retain.txt").write_text("\n\n".join(f"A calm river of {i} boats." for i in range(16)))
    (root / "unseen.txt").write_text("\n\n".join(f"A green bird of {i} songs." for i in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with pytest.raises(SystemExit, match=r"^0$"):
            main.main(UNLEARN.split())
    return root


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lethe.evaluation.eval_sets.TEXTS", 4)
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


Lethe = Callable[..., tuple[str, str]]


@pytest.fixture
def lethe(capsys: pytest.CaptureFixture[str]) -> Lethe:
    """Runs a command that must succeed: its stdout and stderr."""

    def run(command: str) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main.main(command.split())
        out, err = capsys.readouterr()
        assert exit_.value.code == 0, err
        return out, err

    return run


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(name, called)


def tiny() -> LoadedModel:
    return LoadedModel(model=load_model("tiny"), tokenizer=load_tokenizer("tiny"))


# An exam


@pytest.mark.parametrize("scoring", ["letter", "cloze"])
def test_an_exam_gives_what_python_gives(scoring: Any, lethe: Lethe) -> None:
    found = json.loads(lethe(f"{EXAM} --scoring {scoring} --shuffle 3 --json")[0])
    exam = read_exam("exam")
    marks = sit(tiny(), exam, shots=1, scoring=scoring)
    other = sit(tiny(), measure_target.shuffled_exam(exam, 3), shots=1, scoring=scoring)
    for suffix, one in (("", marks), ("_shuffled", other)):
        expected = one.scores({"stem": ("anatomy", "astronomy")})
        names = {f"exam_accuracy{suffix}/{name or 'all'}": score.summary() for name, score in expected.items()}
        assert {name: found["scores"][name] for name in names} == names
        about = found[f"exam{suffix}"]
        assert (about["top_share"], about["entropy_bits"]) == (one.top_share(), one.entropy())
        assert (about["questions"], about["choices"], about["biases"]) == (15, 4, list(one.biases()))
    drop = found["scores"]["exam_shuffle_drop/all"]
    assert drop["value"] == pytest.approx(sum(marks.hits) / 15 - sum(other.hits) / 15)
    assert len(found["scores"]) == 2 * 5 + 1


def test_the_table_says_what_keeps_an_accuracy_from_being_knowledge(
    lethe: Lethe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_c(subject: LoadedModel, exam: Exam, **_: object) -> Marks:
        count = len(exam.questions)
        return Marks(questions=exam.questions, log_likelihoods=((0.0,) * 4,) * count, picked=(2,) * count, cut=1)

    monkeypatch.setattr(measure_target, "sit", always_c)
    lines = lethe(EXAM)[0].splitlines()
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["exam_accuracy", name] for name in ("all", "anatomy", "astronomy", "virology", "stem")
    ]
    assert lines[6:] == [
        "exam: the most frequent letter is picked in 100.0 % of 15 questions; entropy 0.00 of 2.00 bits.",
        "exam: C is picked in 100 % of the questions and right in 27 %: the accuracy shows a preference for a letter.",
        "exam: 3 of 15 prompts are beyond the model's context and lost their beginning, as in the harness: "
        "these questions were not put in full.",
    ]


def test_a_prompt_beyond_the_context_is_counted() -> None:
    long = ExamQuestion(prompt="word " * 80, choices=("a", "b"), answer="a", gold=0, topic="x")
    exam = Exam(questions=(long, dataclasses.replace(long, prompt="Which?")))
    assert sit(tiny(), exam).cut == 1


def test_subjects_and_limit_choose_questions(lethe: Lethe) -> None:
    found = json.loads(lethe(f"{EXAM} --subjects virology anatomy --limit 2 --json")[0])["scores"]
    assert {name: score["n"] for name, score in found.items()} == {
        "exam_accuracy/all": 4, "exam_accuracy/anatomy": 2, "exam_accuracy/virology": 2,
    }  # fmt: skip


def test_mmlu_has_four_groups_of_its_57_subjects() -> None:
    names = [name for members in GROUPS.values() for name in members]
    assert (len(GROUPS), len(names), len(set(names))) == (4, 57, 57)
    assert groups_of(read_exam("exam")) == {"stem": ("anatomy", "astronomy")}


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets: lethe-unlearn[eval]")
def test_an_exam_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"question": "q?", "choices": ["x", "y"], "answer": 1}
    parts = {
        ("org/wmdp", "wmdp-bio"): {"test": [row, row]},
        ("org/wmdp", "wmdp-cyber"): {"test": [row]},
        ("org/mmlu", "all"): {
            "test": [{**row, "subject": "virology"}], "dev": [{**row, "subject": "virology"}],
            "validation": [{**row, "subject": "virology"}] * 2, "auxiliary_train": [{**row, "subject": ""}],
        },
    }  # fmt: skip
    names = {"org/wmdp": ["wmdp-bio", "wmdp-cyber"], "org/mmlu": ["virology", "all", "auxiliary_train"]}
    monkeypatch.setattr("datasets.get_dataset_config_names", names.__getitem__)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: parts[name, config])
    assert [question.topic for question in find_exam("org/wmdp").questions] == ["wmdp-bio"] * 2 + ["wmdp-cyber"]
    assert [question.topic for question in find_exam("org/wmdp:wmdp-cyber").questions] == ["wmdp-cyber"]
    mmlu = find_exam("org/mmlu")
    assert (len(mmlu.questions), len(mmlu.examples["virology"])) == (1, 1)
    assert len(find_exam("org/mmlu:all:validation").questions) == 2
    with pytest.raises(QuestionError, match=r"^org/mmlu, all: no split 'tset'\.\nThere is test, dev, validation\.$"):
        find_exam("org/mmlu:all:tset")
    parts["org/wmdp", "wmdp-cyber"] = {"test": [{**row, "answer": 2}]}
    with pytest.raises(QuestionError, match=r"^org/wmdp, wmdp-cyber, test, row 1: answer 2 is no index"):
        find_exam("org/wmdp")


# What was measured before


def test_a_second_call_does_not_even_load_the_model(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [f"{EXAM} --json", "eval tiny --forget-questions asked.jsonl --retain retain.txt --json"]
    first = [lethe(command) for command in commands]
    forbid(monkeypatch, "lethe.evaluation.lazy_model.load_model")
    for command, (out, err) in zip(commands, first, strict=True):
        assert "measured before" not in err
        again, said = lethe(command)
        assert json.loads(again) == json.loads(out)
        count = 3 if "exam" in command else 2
        assert f"measured before: {count}/{count} parts, read from {os.environ['XDG_CACHE_HOME']}/lethe/scores" in said
        # What is new is asked for alone.
    with pytest.raises(AssertionError, match="load_model was called"):
        lethe(f"{EXAM} --shots 0")


@pytest.mark.parametrize(
    "change",
    [
        "--shots 0", "--scoring cloze", "--dtype bfloat16", "--no-cache", "--limit 4", "edited weights",
        "a run on the model", "another question", "another example", "another tokenizer",
    ],
)  # fmt: skip
def test_what_else_is_asked_is_measured(
    change: str, lethe: Lethe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "exam", "run"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    asked: list[int] = []
    command = "eval tiny --exam exam --subjects virology --shots 1"

    def counted(subject: LoadedModel, exam: Exam, **settings: Any) -> Marks:
        asked.append(len(exam.questions))
        return sit(subject, exam, **settings)

    monkeypatch.setattr(measure_target, "sit", counted)
    lethe(command)
    lethe(command)
    assert len(asked) == 1
    if change == "edited weights":
        model = load_model("tiny")
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        model.save_pretrained("tiny")
    elif change == "a run on the model":
        command = command.replace("tiny", "run")
    elif change.startswith("another"):
        path = {
            "question": "exam/virology.jsonl", "example": "exam/dev/virology.jsonl", "tokenizer": "tiny/tokenizer.json"
        }[change.split()[1]]  # fmt: skip
        text = Path(path).read_text()
        Path(path).write_text(text + "\n" if "tokenizer" in path else text.replace("red", "green", 1))
    else:
        command = f"{command} {change}"
    lethe(command)
    assert len(asked) == 2


def test_sets_depend_on_the_retain_only_model(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def measure(subject: LoadedModel, sets: list[EvalSet], metrics: Metrics, **_: int) -> dict[str, Scores]:
        seen.append(subject.retain_only is not None)
        return {f"m/{sets[0].name}": Scores(value=1.0, stderr=0.0, n=1, better="higher")}

    monkeypatch.setattr("lethe.evaluation.measure.measure", measure)
    command = "eval tiny --forget-questions asked.jsonl"
    for words in (command, f"{command} --retain-only tiny", command, f"{command} --retain-only tiny"):
        lethe(words)
    assert seen == [False, False, True, True], "two sets each, both times once"


def test_a_cache_directory_out_of_reach_costs_a_warning(
    lethe: Lethe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written, so scores are not kept; name another folder with --cache." in lethe(EXAM)[1]


# What is written


def written(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_no_text_is_written_unless_asked_for(lethe: Lethe, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    printed, _ = lethe(
        f"{EXAM} --forget-questions asked.jsonl --forget forget.jsonl --retain retain.txt --holdout unseen.txt "
        f"--shuffle 0 --out {out}"
    )
    assert printed.splitlines()[-1] == f"scores: {out}"
    found = json.loads(out.read_text())
    assert found["per_example"].keys() == found["scores"].keys()
    assert len(found["per_example"]["exam_accuracy/all"]) == 15
    assert {"exam_accuracy/virology", "perplexity/forget", "exact_match/forget"} <= found["scores"].keys()
    files = list(written(tmp_path))
    assert len(files) > 5, "the cache has entries"
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_text_goes_to_a_file_that_only_its_owner_can_read(lethe: Lethe, tmp_path: Path) -> None:
    kept = tmp_path / "texts.jsonl"
    kept.write_text("there before")
    kept.chmod(0o666)
    umask = os.umask(0)
    try:
        out, err = lethe(f"{EXAM} --forget-questions asked.jsonl --keep-text {kept} --out {tmp_path / 'a.json'} --json")
    finally:
        os.umask(umask)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert f"prompts and answers: {kept} (only you can read it)" in err
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row.get("exam", row.get("set")) for row in rows] == [name for name in SUBJECTS for _ in range(5)] + [
        "forget"
    ] * 3
    assert all(SECRET in row["prompt"] for row in rows)
    picked = [row["picked"] == row["gold"] for row in rows[:15]]
    assert sum(picked) / 15 == pytest.approx(json.loads(out)["scores"]["exam_accuracy/all"]["value"])
    assert {"prompt", "gold", "answer", "set"} == rows[-1].keys()
    assert [path for path in written(tmp_path) if SECRET.encode() in path.read_bytes()] == [kept]


def test_a_text_file_that_cannot_be_renamed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lethe.errors import SaveError
    from lethe.system.atomic_files import write_private

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(SaveError, match="could not be written"):
        write_private(tmp_path / "texts.jsonl", [{"prompt": SECRET}])
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan(lethe: Lethe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = float("nan")
    score = Scores(value=0.5, stderr=nothing, n=2, better="higher", per_example=(nothing, 1.0))
    monkeypatch.setattr("lethe.evaluation.measure.measure", lambda *_, **__: {"m/forget": score})
    out, _ = lethe(f"eval tiny --forget-questions asked.jsonl --json --out {tmp_path / 'a.json'}")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(out, parse_constant=refuse)["scores"]["m/forget"]["stderr"] is None
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["per_example"] == {"m/forget": [None, 1.0]}


def test_a_hash_tells_which_scores_are_of_the_same_questions(lethe: Lethe, tmp_path: Path) -> None:
    def hashes(command: str) -> dict[str, str]:
        lethe(f"{command} --no-cache --out {tmp_path / 'a.json'}")
        content = json.loads((tmp_path / "a.json").read_text())
        assert content["measured_on"].keys() == content["scores"].keys()
        assert content["settings"] == {**content["settings"], "exam": "exam", "shots": 1}
        assert content["environment"]["device"] == "cpu"
        assert content["weights"] == {"model": None, "patch": None, "dtype": "torch.float32", "device": "cpu"}
        return content["measured_on"]

    command = f"{EXAM} --shuffle 1 --forget-questions asked.jsonl"
    first, again = hashes(command), hashes(command.replace("tiny", "run"))
    ours = [name for name in first if name.startswith("exam_accuracy") or name == "exact_match/forget"]
    assert len(ours) == 11
    assert len({first[name] for name in ours}) == 11
    assert all(first[name] == again[name] for name in ours if name.startswith("exam"))
    # The run brings its own corpora to the set, too.
    assert first["exact_match/forget"] != again["exact_match/forget"]
    few = hashes(f"{command} --limit 2")
    assert not [name for name in ours if few[name] == first[name]]


def test_a_hash_of_questions_is_of_what_is_asked() -> None:
    data = EvalSet(name="forget", role="forget", questions=(Question(prompt="q", answer="a"),))
    names = ["m/forget", "both"]
    first = measured_on(names, [data])
    assert measured_on(names, [dataclasses.replace(data, role="keep")]) == first
    assert measured_on(names, [dataclasses.replace(data, texts=("t",))])["m/forget"] != first["m/forget"]
    assert measured_on(["both"], [data, dataclasses.replace(data, name="retain")])["both"] != first["both"]


# Sets


@dataclass(frozen=True, kw_only=True)
class Stub:
    """A suite."""

    source: ClassVar[str] = "nowhere"
    data: ClassVar[str] = "nowhere"
    split: str = "half"

    def sets(self, folder: Path) -> tuple[EvalSet, ...]:
        """Two sets that tell what they were made of."""
        question = Question(prompt=f"{self.split} {folder}?", answer="a stone")
        return (
            EvalSet(
                name="forget",
                role="forget",
                questions=(question, question),
                texts=("A red stone.",),
                passages=(("A red", "stone."), ("A blue", "stone.")),
            ),
            EvalSet(name="world_facts", role="keep", questions=(question,)),
        )


def test_a_suite_brings_its_own_sets(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "load", lambda name, shelf: Stub)
    Path("somewhere").mkdir(exist_ok=True)
    given = {"data": Path("somewhere"), "limit": 1, "holdout": Path("unseen.txt"), "nli": Path("tiny"), "samples": 2}
    target = Target("tiny", given, suite="stub:whole")
    forget, facts = target.sets()
    assert [question.prompt for question in forget.questions] == ["whole somewhere?"]
    assert forget.passages == (("A red", "stone."),)
    assert (forget.holdout[0], len(forget.holdout), facts.holdout) == ("A green bird of 0 songs.", 4, ())
    assert (target.metrics([forget, facts])["entailment"], target.samples) == (Entailment(nli=Path("tiny")), 2)
    (first, *_) = Target("run", {"data": Path("somewhere")}, suite="stub").sets()
    assert first.questions[0].prompt == "half somewhere?"
    found = json.loads(lethe("eval run --suite stub:whole --data somewhere --json")[0])
    assert {"exact_match/forget", "exact_match/world_facts", "perplexity/forget"} <= found["scores"].keys()
    assert found["scores"]["exact_match/forget"]["n"] == 2
    with pytest.raises(UsageError, match=r"^--suite stub is put in its own form"):
        Target("tiny", {"data": Path("somewhere")}, suite="stub", chat=True).sets()


def test_a_suite_is_put_in_the_chat_template(tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree("tiny", chat)
    settings = json.loads((chat / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ bos_token }}{% for one in messages %}<{{ one.role }}> {{ one.content }}\n{% endfor %}"
    )
    settings["chat_template"] += "{{ '<assistant>\n' }}"
    (chat / "tokenizer_config.json").write_text(json.dumps(settings))
    row = {"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It was Ann.", "perturbed_answer": ["Bob."]}
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        (tmp_path / f"{name}_perturbed.json").write_text(json.dumps(row))
    given = {"data": tmp_path}
    prompts = {one.questions[0].prompt for one in Target(str(chat), given, suite="TOFU:forget10", chat=True).sets()}
    # BOS is the tokenizer's own.
    assert prompts == {"<user> Who?\n<assistant>\n"}
    assert Target(str(chat), given, suite="tofu").sets()[0].questions[0].prompt == "Question: Who?\nAnswer:"
    with pytest.raises(UsageError, match="no chat template"):
        Target("tiny", given, suite="tofu", chat=True).sets()


def test_what_a_flag_would_let_measure_is_told(lethe: Lethe, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = lethe("eval tiny --forget forget.jsonl --forget-questions asked.jsonl --json")
    assert json.loads(out)["not_measured"] == {
        "membership": "--holdout", "priv_leak": "--holdout and --retain-only", "entailment": "--nli",
    }  # fmt: skip
    line = "not measured: membership (needs --holdout), priv_leak (needs --holdout and --retain-only), entailment"
    assert line in " ".join(err.split())
    out, err = lethe("eval tiny --forget forget.jsonl --holdout unseen.txt --retain-only tiny --json")
    assert (json.loads(out)["not_measured"], "not measured" in err) == ({}, False)
    assert "priv_leak/forget" in json.loads(out)["scores"]
    tofu = EvalSet(name="forget", role="forget", questions=(Question(prompt="q", answer="a", perturbed=("b",)),))
    wanted = {"forget_quality": "--retain-only", "entailment": "--nli"}
    assert measure_target.not_measured([tofu], retain_only=False, nli=False) == wanted
    known = {name.replace("-", "_") for name in discover(metrics)}
    assert {"membership", *wanted} <= known


def test_a_text_field_is_that_of_the_holdout_too(tmp_path: Path) -> None:
    for name in ("forget", "holdout"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": f"A text to {name}."}))
    given = {"forget": (str(tmp_path / "forget.jsonl"),), "holdout": tmp_path / "holdout.jsonl", "text_field": "body"}
    (forget,) = [data for data in Target("tiny", given).sets() if data.name == "forget"]
    assert (forget.texts, forget.holdout) == (("A text to forget.",), ("A text to holdout.",))


def test_prompts_of_ones_own_are_questions_of_the_built_in_model() -> None:
    own = Question(prompt="What is it?", answer="a stone", topic="mine")
    asked = Prompts(forget={"mine": (own,)}, retain=(dataclasses.replace(own, prompt="Who?"),), reference=())
    corpora = PromptCorpora(prompts=asked, tokenizer=load_tokenizer(world.MODEL_FOLDER))
    found = {data.name: data for data in eval_sets.sets("builtin", DataSettings(), EvalSettings(limit=3), corpora)}
    assert found["forget"].questions == (own,)
    assert len(found["retain"].questions) == 3, "its own exam"


def test_holdout_and_nli_reach_the_sets_of_a_model() -> None:
    target = Target("tiny", {"forget": ("forget.jsonl",), "holdout": Path("unseen.txt"), "nli": Path("tiny")})
    forget = next(data for data in target.sets() if data.name == "forget")
    retain = next(data for data in target.sets() if data.name == "retain")
    assert (len(forget.holdout), retain.holdout) == (4, ())
    assert target.metrics([forget, retain])["entailment"] == Entailment(nli=Path("tiny"))


def test_own_data_takes_the_place_of_what_a_run_was_made_with(tmp_path: Path) -> None:
    shutil.copy("forget.jsonl", tmp_path)
    with (tmp_path / "forget.jsonl").open("a") as file:
        file.write('{"text": "Only here."}\n')
    target = Target("run", {"data": tmp_path})
    assert (target.config.data.forget, target.config.data.retain) == (("builtin",), "retain.txt")
    assert Target("run", {}).config.data.forget == ("forget.jsonl",)


def test_the_edit_is_applied_and_the_model_is_loaded_late(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("run", {}, retain_only="tiny")
    edited, other = target.model.loaded.model, target.model.loaded.retain_only
    assert other is not None
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(edited.get_parameter(name), other.model.get_parameter(name))
    assert torch.equal(target.model.loaded.originals[name], other.model.get_parameter(name))
    forbid(monkeypatch, "lethe.evaluation.lazy_model.load_model")
    with pytest.raises(AssertionError, match="load_model was called"):
        _ = Target("run", {}).model.loaded


def test_metrics_are_measured_beside_an_exam_only_where_sets_are_named(
    lethe: Lethe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(name.startswith("exam") for name in json.loads(lethe(f"{EXAM} --json")[0])["scores"])
    both = json.loads(lethe(f"{EXAM} --forget-questions asked.jsonl --json")[0])["scores"]
    assert {"exam_accuracy/all", "exact_match/forget"} <= both.keys()


# The harness


def test_harness_tasks_are_measured_once(lethe: Lethe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def run(subject: LoadedModel, tasks: list[str], **settings: Any) -> dict[str, Scores]:
        calls.append((tasks, settings))
        score = Scores(value=0.25, stderr=0.1, n=4, better="higher", per_example=(0.0, 1.0))
        return {f"{tasks[0]}/acc": score, f"{tasks[0]}/exact_match/strict": score}

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text("task: own")
    monkeypatch.setattr("lethe.evaluation.harness.find_tasks", lambda tasks, include: "manager")
    monkeypatch.setattr("lethe.evaluation.harness.run_harness", run)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    include = f"--include {tmp_path / 'tasks'}"
    command = f"eval tiny --harness own,wmdp {include} --batch-size 3 --shots 2 --limit 4 --json"
    found = json.loads(lethe(command)[0])["scores"]
    assert list(found) == [
        f"harness_{metric}/{task}" for task in ("own", "wmdp") for metric in ("acc", "exact_match_strict")
    ]
    assert [tasks for tasks, _ in calls] == [["own"], ["wmdp"]]
    assert calls[0][1] == {
        "batch_size": 3, "shots": 2, "limit": 4, "chat": False, "include": (tmp_path / "tasks",), "manager": "manager",
    }  # fmt: skip
    assert json.loads(lethe(command)[0])["scores"] == found
    assert len(calls) == 2
    (tmp_path / "tasks" / "own.yaml").write_text("task: own # changed")
    lethe(command)
    assert len(calls) == 4


def test_data_that_task_files_name_counts(tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    outside.write_text("{}")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "a.yaml").write_text(f"dataset_kwargs: {{data_files: {{test: '{outside}'}}}}")
    (tasks / "own.py").write_text("")
    assert task_data([tasks]) == sorted([outside, tasks / "a.yaml", tasks / "own.py"])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: lethe-unlearn[eval]")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself_leaves_no_copy_of_local_data(
    lethe: Lethe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "copies"))
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", read_exam("exam").only(["virology"]), "local")
    load = datasets.load_dataset
    found = json.loads(lethe(f"eval tiny --harness local --include {tmp_path / 'tasks'} --shots 0 --json")[0])["scores"]
    assert datasets.load_dataset is load
    own = json.loads(lethe("eval tiny --exam exam --subjects virology --json")[0])["scores"]
    assert found["harness_acc/local_virology"]["value"] == pytest.approx(own["exam_accuracy/virology"]["value"])
    assert not list(written(tmp_path / "copies"))


def test_a_cache_entry_gives_back_the_same_scores() -> None:
    score = Scores(
        value=0.1 + 0.2, stderr=float("nan"), n=3, better="lower", per_example=(1.0, 0.1), chance=0.25, by_layer=(2.0,)
    )
    rows = json.loads(json.dumps(measure_target._as_rows({"a/b": score})))
    (back,) = measure_target._as_scores(rows).values()
    assert repr(back) == repr(score)
    assert ScoreCache(None, pytest.fail).once({}, lambda: rows) is rows


# From Python


def test_what_the_command_prints_python_returns(lethe: Lethe) -> None:
    questions = Path("asked.jsonl")
    found = evaluate("run", forget_questions=questions, exam="exam", subjects=["anatomy"], shuffle=3, limit=2)
    words = "eval run --forget-questions asked.jsonl --exam exam --subjects anatomy --shuffle 3 --limit 2 --json"
    printed = json.loads(lethe(words)[0])
    assert {"exam_accuracy/all", "exam_accuracy_shuffled/all", "exact_match/forget"} <= found.scores.keys()
    assert found.scores.keys() == printed["scores"].keys()
    for name, one in found.scores.items():
        if math.isfinite(one.value):
            assert (one.value, one.n) == (printed["scores"][name]["value"], printed["scores"][name]["n"]), name
        else:
            assert printed["scores"][name]["value"] is None, name
    assert found.not_measured == printed["not_measured"]
    assert json.loads(json.dumps(found.about)) == {name: printed[name] for name in ("exam", "exam_shuffled")}
    assert found.measured_on.keys() <= found.scores.keys()
    assert found.texts == ()
    asked = evaluate("tiny", forget_questions=questions, keep_text=True)
    assert SECRET in json.dumps(asked.texts)
    assert SECRET not in repr(asked)
