"""Reading questions, their errors, and the prompts rendered from them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lethe.data.questions import letter_answers, read_questions, render_letter, subset
from lethe.errors import InvalidValueError, QuestionError
from lethe.types import Question

MMLU = Path(__file__).parents[4] / "shared" / "data" / "mmlu"
SECRET = "SECRET"
"""Stands in the questions and answers of the files with errors, and in none of the messages."""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_rows(folder: Path, *rows: Any) -> tuple[Question, ...]:
    return read_questions(write(folder, "q.jsonl", "\n".join(map(json.dumps, rows))))


def refusal(path: str | Path) -> str:
    with pytest.raises(QuestionError) as caught:
        read_questions(path)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the cause may quote the questions"
    return str(caught.value)


# Reading


def test_free_form_and_multiple_choice_rows(tmp_path: Path) -> None:
    first = {"question": "Who?", "answer": "Ada", "accepted": ["Ada L.", "Lovelace"], "topic": "people"}
    second = {"prompt": "Q: What?\nA:", "question": "What?", "answer": "b", "choices": ["a", "b"]}
    assert read_rows(tmp_path, first, second) == (
        Question(prompt="Who?", answer="Ada", accepted=("Ada L.", "Lovelace"), topic="people"),
        Question(prompt="Q: What?\nA:", answer="b", choices=("a", "b")),
    )


def test_all_formats_give_the_same(tmp_path: Path) -> None:
    rows = [
        {"question": "a, b?", "choices": ["x\ny", 'z"'], "answer": 1},
        {"question": "c", "choices": list("de"), "answer": 0},
    ]
    csv = '\ufeffquestion,choice0,choice1,answer\r\n"a, b?","x\ny","z""",1\r\n\r\nc,d,e,0\r\n'
    expected = (
        Question(prompt="a, b?", choices=("x\ny", 'z"'), answer='z"'),
        Question(prompt="c", choices=("d", "e"), answer="d"),
    )
    lines = "\n\n".join(map(json.dumps, rows))
    assert read_questions(write(tmp_path, "q.json", json.dumps(rows, indent=1))) == expected
    assert read_questions(write(tmp_path, "l.json", lines)) == expected
    assert read_questions(str(write(tmp_path, "q.jsonl", lines.replace("\n", "\r\n")))) == expected
    assert read_questions(write(tmp_path, "q.CSV", csv)) == expected
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == expected


@pytest.mark.parametrize(
    ("answer", "right"),
    [(0, "red"), (2, "4"), ("red", "red"), (" 4\n", "4"), ("0", "0"), ("A", "red"), ("D", "B"), ("red ", "red")],
)
def test_the_answer_is_a_text_a_letter_or_an_index(tmp_path: Path, answer: Any, right: str) -> None:
    (question,) = read_rows(tmp_path, {"question": "?", "choices": ["red", "0", "4", "B"], "answer": answer})
    assert question.answer == right
    assert question.choices[question.answer_index] == right


def test_a_letter_that_is_its_own_text_is_clear(tmp_path: Path) -> None:
    (question,) = read_rows(tmp_path, {"question": "?", "choices": ["A", "C", "B"], "answer": "A"})
    assert question.answer == "A"


def test_numbers_in_a_csv_are_indices_only_where_there_are_choices(tmp_path: Path) -> None:
    with_choices = write(tmp_path, "a.csv", "question,choice1,choice0,answer,topic\n?,1,0,1,math\n?,1,0,A,\n")
    assert [(q.choices, q.answer, q.topic) for q in read_questions(with_choices)] == [
        (("0", "1"), "1", "math"),
        (("0", "1"), "0", ""),
    ]
    free_form = write(tmp_path, "b.csv", "prompt,answer\nWhen?,1945\n")
    assert read_questions(free_form) == (Question(prompt="When?", answer="1945"),)


def test_csv_choices_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    header = ",".join(f"choice{i}" for i in reversed(range(12)))
    cells = ",".join(f"c{i}" for i in reversed(range(12)))
    (question,) = read_questions(write(tmp_path, "q.csv", f"question,answer,{header}\n?,10,{cells}\n"))
    assert question.choices == tuple(f"c{i}" for i in range(12))
    assert question.answer == "c10"


def test_wrong_choices_may_repeat_but_not_the_answer(tmp_path: Path) -> None:
    (question,) = read_rows(tmp_path, {"question": "?", "choices": ["a", "a", "b"], "answer": "b"})
    assert question.answer_index == 2


@pytest.mark.skipif(not MMLU.exists(), reason="needs MMLU in ../shared/data/mmlu")
def test_mmlu_as_it_comes() -> None:
    questions = read_questions(MMLU / "test" / "virology_test.csv")
    assert len(questions) == 166
    assert questions[0] == Question(
        prompt="How many human polyomaviruses are known at present?",
        answer="100",
        choices=("100", "1", "10", "unknown"),
    )
    assert [question.answer_index for question in questions[:4]] == [0, 3, 1, 1]
    assert "row 198: choices " in refusal(MMLU / "test" / "sociology_test.csv"), "a question with two right letters"


# Errors

CHOICES = '"choices": ["SECRET", "x"]'
LINE = {
    "no question": (
        '{"text": "SECRET", "answer": "SECRET"}',
        "no 'prompt'; there is text, answer.\nName the column so (or question, input, query).",
    ),
    "no answer": (
        '{"question": "SECRET"}',
        "no 'answer'; there is question.\nName the column so (or target, label, gold, correct).",
    ),
    "nothing": ("{}", "no 'prompt'; there is none.\nName the column so (or question, input, query)."),
    "empty question": (
        '{"question": " ", "answer": "SECRET"}',
        "question is empty.\nFill it in, or remove the row.",
    ),
    "empty answer": (
        '{"question": "SECRET", "answer": "\\n"}',
        "answer is empty.\nFill it in, or remove the row.",
    ),
    "empty answer beside choices": (
        f'{{"question": "SECRET", "answer": "", {CHOICES}}}',
        "answer is empty.\nFill it in, or remove the row.",
    ),
    "question is no text": (
        '{"question": ["SECRET"], "answer": "x"}',
        "question holds list, not a text.\nMake it a string.",
    ),
    "index without choices": (
        '{"question": "SECRET", "answer": 1}',
        "answer holds int, not a text.\nMake it a string.",
    ),
    "true is no index": (
        f'{{"question": "SECRET", "answer": true, {CHOICES}}}',
        "answer holds bool, not a text.\nMake it a string.",
    ),
    "index too large": (
        f'{{"question": "SECRET", "answer": 2, {CHOICES}}}',
        "answer 2 is no index of 2 choices; the first has index 0.\nGive 0 to 1, or the letter A to B.",
    ),
    "index below zero": (
        f'{{"question": "SECRET", "answer": -1, {CHOICES}}}',
        "answer -1 is no index of 2 choices; the first has index 0.\nGive 0 to 1, or the letter A to B.",
    ),
    "answer not among the choices": (
        '{"question": "SECRET", "answer": "SECRET", "choices": ["x", "y", "z"]}',
        "answer is not among the 3 choices.\nGive the choice's own text, its letter A to C, or its 0-based index.",
    ),
    "letter too far": (
        f'{{"question": "SECRET", "answer": "C", {CHOICES}}}',
        "answer is not among the 2 choices.\nGive the choice's own text, its letter A to B, or its 0-based index.",
    ),
    "letter and text": (
        '{"question": "SECRET", "answer": "B", "choices": ["A", "O", "B"]}',
        "answer is meant by choices 1 and 2.\nGive the 0-based index instead.",
    ),
    "one choice": (
        '{"question": "SECRET", "answer": 0, "choices": ["SECRET"]}',
        "1 choice found, where 2 to 26 must stand.\nAdd the wrong options; a free-form question has no choices at all.",
    ),
    "no choice": (
        '{"question": "SECRET", "answer": "x", "choices": []}',
        "0 choices found, where 2 to 26 must stand.\n"
        "Add the wrong options; a free-form question has no choices at all.",
    ),
    "the answer stands twice": (
        '{"question": "SECRET", "answer": 2, "choices": ["SECRET", "x", "SECRET "]}',
        "choices 0 and 2 are both the answer.\nChange one of them, or remove the row.",
    ),
    "empty choice": (
        '{"question": "SECRET", "answer": 0, "choices": ["SECRET", " "]}',
        "choice 1 is empty.\nFill it in, or remove the row.",
    ),
    "choices are no list": (
        '{"question": "SECRET", "answer": 0, "choices": "SECRET"}',
        "choices holds str, not a list of texts.\nMake it a list.",
    ),
    "accepted is no list": (
        '{"question": "SECRET", "answer": "x", "accepted": "SECRET"}',
        "accepted holds str, not a list of texts.\nMake it a list.",
    ),
    "topic is no text": (
        '{"question": "SECRET", "answer": "x", "topic": 3}',
        "topic holds int, not a text.\nMake it a string.",
    ),
    "not an object": ('"SECRET"', "str found, where an object must stand.\nGive each row as names and values."),
}


@pytest.mark.parametrize("case", LINE)
def test_errors_of_a_row_name_file_line_and_fix_and_quote_nothing(tmp_path: Path, case: str) -> None:
    line, message = LINE[case]
    good = '{"question": "SECRET", "answer": "SECRET"}\n\n'
    path = write(tmp_path, "q.jsonl", good + line)
    assert refusal(path) == f"{path}, line 3: {message}"
    path = write(tmp_path, "q.json", f"[{good.strip()},\n\n\n{line}]")
    assert refusal(path) == f"{path}, row 2: {message}"


FILE: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("q.jsonl", "\n", "{path} holds no question.\nGive a file with at least one."),
    "empty array": ("q.json", "[]", "{path} holds no question.\nGive a file with at least one."),
    "empty csv": ("q.csv", "", "{path} holds no question.\nGive a file with at least one."),
    "header alone": ("q.csv", "question,answer\n", "{path} holds no question.\nGive a file with at least one."),
    "suffix": (
        "q.txt",
        "SECRET",
        "{path}: no question is read from .txt.\nGive a .jsonl, .json, .csv or .parquet file.",
    ),
    "no suffix": (
        "q",
        "SECRET",
        "{path}: no question is read from a file without suffix.\nGive a .jsonl, .json, .csv or .parquet file.",
    ),
    "broken line": (
        "q.jsonl",
        '\n{"question": "SECRET"',
        "{path}, line 2, column 22: not JSON (Expecting ',' delimiter).\nEach line must be one object.",
    ),
    "broken array": (
        "q.json",
        '[\n{"question": "SECRET"',
        "{path}, line 2, column 22: not JSON (Expecting ',' delimiter).\nThe file must be one array.",
    ),
    "bad bytes": ("q.csv", b"a\nSECRET\xff", "{path}, line 2: byte 8 is not UTF-8.\nSave the file as UTF-8."),
    "csv without header": (
        "q.csv",
        "SECRET of what?,SECRET,b,c,d,A\n" * 2,
        "{path}, row 1: no 'prompt'; there are 6 columns, not all with plain names (is the header "
        "missing?).\nName the column so (or question, input, query).",
    ),
    "csv without answers": (
        "q.csv",
        "question,choice0,choice1\nSECRET,SECRET,x\n",
        "{path}, row 1: no 'answer'; there is question, choice0, choice1.\n"
        "Name the column so (or target, label, gold, correct).",
    ),
    "commas outside quotes": (
        "q.csv",
        "question,answer\nSECRET,SECRET\nSECRET, SECRET,x\n",
        "{path}, row 2: 3 cells, where the first row has 2.\nPut cells with commas in quotes.",
    ),
    "cells missing": (
        "q.csv",
        "question,answer\nSECRET\n",
        "{path}, row 1: 1 cell, where the first row has 2.\nPut cells with commas in quotes.",
    ),
    "quote never closed": (
        "q.csv",
        'question,answer\na,b\nSECRET,"SECRET\n',
        "{path}, row 2: not CSV (unexpected end of data).\nWrite the file again.",
    ),
    "csv index": (
        "q.csv",
        "question,choice0,choice1,answer\nSECRET,SECRET,x,2\n",
        "{path}, row 1: answer 2 is no index of 2 choices; the first has index 0.\nGive 0 to 1, or the letter A to B.",
    ),
}


@pytest.mark.parametrize("case", FILE)
def test_errors_of_a_file_name_it_and_the_fix_and_quote_nothing(tmp_path: Path, case: str) -> None:
    name, content, message = FILE[case]
    path = write(tmp_path, name, content)
    assert refusal(path) == message.replace("{path}", str(path))


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "virology.csv", "")
    kinds = "Give a .jsonl, .json, .csv or .parquet file."
    assert refusal(tmp_path / "virolgy.csv") == (
        f"no question file {tmp_path}/virolgy.csv: did you mean virology.csv?\n{kinds}"
    )
    assert refusal(tmp_path / "no" / "q.json") == f"no question file {tmp_path}/no/q.json.\n{kinds}"
    assert refusal(tmp_path) == f"no question file {tmp_path}.\n{kinds}"


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "q.json", "[]")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal(path) == f"{path} cannot be read: Permission denied."


# Rendering and drawing

QUESTION = Question(prompt=" What is 1 + 1?\n", choices=("1", " 2", "3"), answer=" 2")


def test_the_letter_prompt_is_the_harness_s() -> None:
    assert render_letter(QUESTION) == "What is 1 + 1?\nA. 1\nB.  2\nC. 3\nAnswer:"
    description = "The following are multiple choice questions (with answers) about biology."
    assert render_letter(QUESTION, description=description) == f"{description}\n\n{render_letter(QUESTION)}"
    assert letter_answers(QUESTION) == (" A", " B", " C")


def test_a_subset_is_drawn_by_seed_without_replacement_and_keeps_the_order() -> None:
    questions = tuple(Question(prompt=str(i), answer="x") for i in range(100))
    drawn = subset(questions, 10, seed=3)
    numbers = [int(question.prompt) for question in drawn]
    assert drawn == subset(questions, 10, seed=3)
    assert drawn != subset(questions, 10, seed=4)
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 10
    assert numbers != list(range(10))
    assert subset(questions, 100, seed=3) == subset(questions, 999, seed=3) == questions
    with pytest.raises(InvalidValueError, match=r"^the number of questions must be at least 1\. Got 0\.$"):
        subset(questions, 0, seed=3)
