"""Exams from local files of every shape, their errors, and the prompts made of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lethe.data.exams import Exam, ExamQuestion, description, read_exam, render, shuffled
from lethe.errors import QuestionError, UsageError

MMLU = Path(__file__).parents[4] / "shared" / "data" / "mmlu"
SECRET = "SECRET"
"""Stands in questions and answers of the files with errors, and in none of the messages."""

ROWS: list[dict[str, Any]] = [
    {"question": "a, b?", "choices": ["x", "y", "z", "w"], "answer": 1},
    {"question": "c?", "choices": ["1", "0", "3", "2"], "answer": 0},
]
OWN = '"a, b?",x,y,z,w,B\nc?,1,0,3,2,A\n'


def question(prompt: str, choices: tuple[str, ...], gold: int, topic: str) -> ExamQuestion:
    return ExamQuestion(prompt=prompt, choices=choices, answer=choices[gold], gold=gold, topic=topic)


def expected(topic: str) -> tuple[ExamQuestion, ...]:
    return (question("a, b?", ("x", "y", "z", "w"), 1, topic), question("c?", ("1", "0", "3", "2"), 0, topic))


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


SHAPES = {
    "MMLU's own, without header": ("virology_test.csv", OWN),
    "with header": ("virology_test.csv", "question,choice0,choice1,choice2,choice3,answer\n" + OWN),
    "letters as header, BOM, CRLF": (
        "virology.csv",
        ("\ufeffPrompt,A,B,C,D,Answer\n" + OWN).replace("\n", "\r\n"),
    ),
    "indices, other order": (
        "virology-test.csv",
        'answer,choice3,choice2,choice1,choice0,question\n1,w,z,y,x,"a, b?"\n0,2,3,0,1,c?\n',
    ),
    "JSON lines": ("virology_test.jsonl", "\n\n".join(map(json.dumps, ROWS))),
    "JSON array": ("virology.json", json.dumps(ROWS, indent=1)),
    "other names": (
        "any.jsonl",
        "\n".join(
            json.dumps({"input": r["question"], "options": r["choices"], "target": "ABCD"[r["answer"]],
                        "subject": "virology"})
            for r in ROWS
        ),
    ),
    "answers as texts": (
        "virology.jsonl",
        "\n".join(json.dumps({**row, "answer": row["choices"][row["answer"]]}) for row in ROWS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_any_shape(tmp_path: Path, shape: str) -> None:
    assert read_exam(write(tmp_path, *SHAPES[shape])) == Exam(questions=expected("virology"))


@pytest.mark.parametrize("name", ["wmdp-bio/test-00000-of-00001.parquet", "wmdp-bio.parquet"])
def test_parquet(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, "")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_exam(path).questions == expected("wmdp-bio")
    assert read_exam(str(tmp_path)).questions == expected("wmdp-bio")


def test_a_folder_has_its_examples_by_name_or_subfolder(tmp_path: Path) -> None:
    write(tmp_path, "test/virology_test.csv", OWN)
    write(tmp_path, "anatomy_test.csv", OWN)
    write(tmp_path, "dev/virology_dev.csv", "d?,p,q,r,s,D\n")
    write(tmp_path, "val/virology_val.csv", OWN)
    write(tmp_path, "anatomy/validation-00000-of-00001.jsonl", json.dumps(ROWS[0]))
    write(tmp_path, "README.md", "not read")
    exam = read_exam(tmp_path)
    assert exam.questions == expected("anatomy") + expected("virology")
    assert exam.subjects == ("anatomy", "virology")
    assert exam.examples == {
        "virology": (question("d?", ("p", "q", "r", "s"), 3, "virology"),),
        "anatomy": expected("anatomy")[:1],
    }
    assert exam.only(["virology"]).questions == expected("virology")
    with pytest.raises(QuestionError, match=r"^the exam has no subject virolgy; there is anatomy, virology\.\n"):
        exam.only(["virolgy"])


def test_a_right_answer_whose_text_stands_twice_is_known_by_its_place(tmp_path: Path) -> None:
    (found,) = read_exam(write(tmp_path, "x.csv", "q?,same,same,other,last,B\n")).questions
    assert (found.gold, found.answer_index, found.answer) == (1, 1, "same")


@pytest.mark.skipif(not MMLU.exists(), reason="needs MMLU in ../shared/data/mmlu")
def test_mmlu_as_it_comes() -> None:
    exam = read_exam(MMLU)
    assert (len(exam.questions), len(exam.subjects)) == (14042, 57)
    assert {len(found) for found in exam.examples.values()} == {5}
    assert sum(len({*one.choices}) < 4 for one in exam.questions) > 0, "published with equal choices"


# Errors

CHOICES = '"choices": ["SECRET", "x"]'
BAD_ROW = {
    "no question": (f'{{"text": "SECRET", {CHOICES}, "answer": 0}}', "no 'question'; there is text, choices, answer."),
    "no answer": (f'{{"question": "SECRET", {CHOICES}}}', "no 'answer'; there is question, choices."),
    "no choices": ('{"question": "SECRET", "answer": 0}', "no 'choices'; there is question, answer."),
    "names that look like text": ('{"SECRET of what": 1}', "no 'question'; there are 1 columns, not all with plain"),
    "empty question": (f'{{"question": " ", {CHOICES}, "answer": 0}}', "question is empty."),
    "question is no text": (f'{{"question": 3, {CHOICES}, "answer": 0}}', "question holds int, not a text."),
    "choices are no list": ('{"question": "q", "choices": "SECRET", "answer": 0}', "choices holds str, not a list"),
    "empty choices": ('{"question": "q", "choices": [], "answer": 0}', "0 choices found, where 2 to 26 must stand."),
    "one choice": ('{"question": "q", "choices": ["SECRET"], "answer": 0}', "1 choice found, where 2 to 26 must"),
    "empty choice": ('{"question": "q", "choices": ["SECRET", ""], "answer": 0}', "choice 1 is empty."),
    "choice is null": ('{"question": "q", "choices": ["SECRET", null], "answer": 0}', "choice 1 holds NoneType"),
    "index too large": (f'{{"question": "q", {CHOICES}, "answer": 2}}', "answer 2 is no index of 2 choices; the first"),
    "index below zero": (f'{{"question": "q", {CHOICES}, "answer": -1}}', "answer -1 is no index of 2 choices"),
    "true": (f'{{"question": "q", {CHOICES}, "answer": true}}', "answer holds bool, not a text."),
    "letter too far": (f'{{"question": "q", {CHOICES}, "answer": "C"}}', "answer is not among the 2 choices."),
    "text twice": (
        '{"question": "q", "choices": ["SECRET", "SECRET", "x"], "answer": "SECRET"}',
        "answer is meant by choices 0 and 1.\nGive the 0-based index instead.",
    ),
    "letter and text": (
        '{"question": "q", "choices": ["B", "x", "SECRET"], "answer": "B"}',
        "answer is meant by choices 0 and 1.\nGive the 0-based index instead.",
    ),
    "subject is no text": (f'{{"question": "q", {CHOICES}, "answer": 0, "subject": 3}}', "subject holds int"),
    "no object": ('["SECRET"]', "list found, where an object must stand."),
}


def refusal(path: Path) -> str:
    with pytest.raises(QuestionError) as caught:
        read_exam(path)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the cause may quote the questions"
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_ROW)
def test_errors_of_a_row_name_file_line_and_fix_and_quote_nothing(tmp_path: Path, case: str) -> None:
    line, message = BAD_ROW[case]
    path = write(tmp_path, "q.jsonl", json.dumps(ROWS[0]) + "\n\n" + line)
    said = refusal(path)
    assert said.startswith(f"{path}, line 3: {message}")
    assert "\n" in said, "what to do"


BAD_FILE: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("q.csv", "", "{path} holds no question."),
    "header alone": ("q.csv", "question,A,B,answer\n", "{path} holds no question."),
    "suffix": ("q.txt", SECRET, "{path}: no exam is read from .txt.\n"),
    "broken JSON": ("q.jsonl", '{"question": "SECRET"', "{path}, line 1, column 22: not JSON"),
    "bad bytes": ("q.csv", b"a\nSECRET\xff", "{path}, line 2: byte 8 is not UTF-8.\n"),
    "no parquet": ("q.parquet", SECRET, "{path} is no parquet file, or a damaged one.\n"),
    "more cells": (
        "q.csv",
        "q,a,b,c,d,A\nSECRET, SECRET,a,b,c,d,A\n",
        "{path}, row 2: 7 cells, where the first row has 6",
    ),
    "fewer cells": ("q.csv", "question,A,B,answer\nSECRET,a,A\n", "{path}, row 1: 3 cells, where the first row has 4"),
    "quote never closed": (
        "q.csv",
        'q,a,b,A\nSECRET,"SECRET,b,A\n',
        "{path}, row 2: not CSV (unexpected end of data).",
    ),
    "huge row": (
        "q.csv",
        "q,a,b,A\n" + "x" * 10_000_001 + ",a,b,A\n",
        "{path}, row 2: not CSV (field larger than field",
    ),
    "letter of the header-less form": (
        "q.csv",
        "SECRET,a,b,E\n",
        "{path}, row 1: answer is not among the 2 choices.",
    ),
    "csv index": ("q.csv", "question,A,B,answer\nSECRET,a,b,2\n", "{path}, row 1: answer 2 is no index of 2 choices"),
    "header of other words": (
        "q.csv",
        "SECRET text,b\nx,y\n",
        "{path}, row 1: no 'choices'; there is question, answer.",
    ),
}


@pytest.mark.parametrize("case", BAD_FILE)
def test_errors_of_a_file_name_it_and_quote_nothing(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILE[case]
    path = write(tmp_path, name, content)
    assert refusal(path).startswith(message.replace("{path}", str(path)))


def test_a_missing_or_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mmlu").mkdir()
    assert refusal(tmp_path / "mmul").startswith(
        f"no exam {tmp_path}/mmul: did you mean mmlu?\nGive a .jsonl, .json, .csv or .parquet file, or a folder."
    )
    assert refusal(tmp_path / "mmlu").startswith(f"{tmp_path}/mmlu holds no question.\n")
    write(tmp_path, "mmlu/dev/virology_dev.csv", OWN)
    assert refusal(tmp_path / "mmlu").startswith(f"{tmp_path}/mmlu holds no question.\n"), "examples alone"


# Prompts

EXAM = Exam(
    questions=(question(" Where?\n", ("here", " there"), 1, "high_school_biology"),),
    examples={"high_school_biology": (question("When?", ("now", "then", "never"), 2, "high_school_biology"),)},
)
ABOUT = "The following are multiple choice questions (with answers) about high school biology.\n\n"


def test_the_prompt_is_the_harness_s() -> None:
    (asked,) = EXAM.questions
    assert render(EXAM, asked) == (f"{ABOUT}Where?\nA. here\nB.  there\nAnswer:", (" A", " B"))
    assert render(EXAM, asked, shots=1) == (
        f"{ABOUT}When?\nA. now\nB. then\nC. never\nAnswer: C\n\nWhere?\nA. here\nB.  there\nAnswer:",
        (" A", " B"),
    )
    assert render(EXAM, asked, shots=1, scoring="cloze") == (
        "The following are questions (with answers) about high school biology.\n\n"
        "Question: When?\nAnswer: never\n\nQuestion: Where?\nAnswer:",
        (" here", "  there"),
    )
    with pytest.raises(QuestionError, match=r"^subject 'high_school_biology' has 1 solved examples, where 2 are"):
        render(EXAM, asked, shots=2)


def test_subjects_of_wmdp_are_written_out() -> None:
    for name, words in (
        ("wmdp-bio", "biology"),
        ("wmdp_cyber", "cybersecurity"),
        ("world_religions", "world religions"),
    ):
        assert description(name) == f"The following are multiple choice questions (with answers) about {words}.\n\n"
    assert description("") == ""


def test_with_a_chat_template_the_description_is_the_system_message() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ SYSTEM }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    (asked,) = EXAM.questions
    with pytest.raises(UsageError, match=r"^the tokenizer has no chat template\.\n"):
        render(EXAM, asked, chat=chat)
    chat.chat_template = template.replace("{{ SYSTEM }}", "")
    solved, asked_for = "When?\nA. now\nB. then\nC. never\nAnswer:", "Where?\nA. here\nB.  there\nAnswer:"
    said = f"[user]{solved}[assistant]C[user]{asked_for}[assistant]"
    assert render(EXAM, asked, shots=1, chat=chat) == (f"[system]{ABOUT}{said}", ("A", "B"))
    chat.chat_template = template.replace("{{ SYSTEM }}", "{{ raise_exception('no system message') }}")
    assert render(EXAM, asked, shots=1, chat=chat) == (said, ("A", "B"))


def test_shuffling_moves_the_choices_and_keeps_the_answer() -> None:
    before = tuple(question(f"q{n}", ("a", "b", "a", "d"), 2, "x") for n in range(40))
    after = shuffled(before, seed=1)
    assert after == shuffled(before, seed=1) != shuffled(before, seed=2)
    assert {one.gold for one in after} == {0, 1, 2, 3}
    for old, new in zip(before, after, strict=True):
        assert (new.prompt, new.answer, new.choices[new.gold]) == (old.prompt, "a", "a")
        assert sorted(new.choices) == sorted(old.choices)
