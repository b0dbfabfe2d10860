"""Rows of files as questions, by one set of column names and errors; drawn by seed, rendered as the harness does.

No message of this module quotes a question or an answer: it names the file and the line or row.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lethe.data.text_files import TABLE, TABLES, did_you_mean, field_names, table_rows
from lethe.errors import InvalidValueError, QuestionError
from lethe.types import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


ANSWER = ("answer", "target", "label", "gold", "correct")


CHOICES = ("choices", "options", "endings")


TOPIC = ("subject", "topic", "category", "edge")
"""Columns that say what a question is about; PISTOL's has the edge between two entities."""


@dataclass(frozen=True, kw_only=True)
class RowForm:
    """What a row of one kind of file must hold, and the names of its columns, the first one there being taken."""

    question: tuple[str, ...]
    needs: Literal["question", "answer", "choices"]
    """At least this: the question alone, whose choices are not read; an answer, too; or an answer among choices."""


# A prompt as the model reads it goes before the bare question; an exam, which has a prompt of its own, wants that.
QUESTIONS = RowForm(question=("prompt", "question", "input", "query"), needs="answer")


EXAM = RowForm(question=("question", "prompt", "input", "query"), needs="choices")


class QuestionRow(NamedTuple):
    """A question with what it was read from."""

    where: str
    """File and row."""
    row: Mapping[str, Any]
    """As it stands in the file."""
    question: Question


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a `.jsonl`, `.json` (an array, or one object a line), `.csv` or `.parquet` file, in its order.

    A row has `prompt` or `question` (`prompt` where it has both), `answer`, and if wanted `choices`,
    `accepted` (further right answers), `topic`, `paraphrased_answer` and `perturbed_answer` (a list; as TOFU has them);
    choices may also be columns choice0, choice1, ... or A, B, ...
    `answer` is a text; with choices it may also be the letter A, B, ... or the 0-based index, which is a
    number in JSON and any whole number in a `.csv` (MMLU's form).
    Raises: QuestionError.
    """
    return tuple(found.question for found in question_rows(path, QUESTIONS))


def question_rows(path: str | Path, form: RowForm) -> list[QuestionRow]:
    """Every row of a file of one of the formats TABLES, with its question.

    Raises: QuestionError, also if there is none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise QuestionError(f"no question file {path}{did_you_mean(path)}\nGive {TABLE}.")
    if path.suffix.lower() not in TABLES:
        raise QuestionError(
            f"{path}: no question is read from {path.suffix or 'a file without suffix'}.\nGive {TABLE}."
        )
    rows = [QuestionRow(where, row, question_of(where, row, form)[0]) for where, row in question_table(path)]
    if not rows:
        raise QuestionError(f"{path} holds no question.\nGive a file with at least one.")
    return rows


def question_table(
    path: Path, columns: Callable[[Sequence[str]], Sequence[str] | None] | None = None
) -> Iterator[tuple[str, Any]]:
    """`table_rows`; beside columns with choices, a whole number as answer in a `.csv` is an index.

    Raises: QuestionError.
    """
    for where, row in table_rows(path, QuestionError, columns):
        if path.suffix.lower() == ".csv" and _choice_columns(_bare(name) for name in row):
            for name, cell in row.items():
                if _bare(name) in ANSWER and re.fullmatch(r"\s*-?\d{1,9}\s*", cell):
                    row[name] = int(cell)
        yield where, row


def question_of(where: str, row: Any, form: RowForm, topic: str = "") -> tuple[Question, int]:
    """The question of one row and the place of the right choice, 0 without choices.

    `topic` is what it is about where the row does not say it.
    Raises: QuestionError that names the place `where` it stands and the column.
    """
    _require_object(where, row)
    columns = {_bare(str(name)): value for name, value in row.items()}
    prompt = text_in(where, columns, form.question)
    choices = () if form.needs == "question" else _choices(where, columns, form.needs == "choices")
    answer, gold = _answer(where, columns, form, choices)
    about, named = next(((name, columns[name]) for name in TOPIC if columns.get(name)), (TOPIC[0], topic))
    more = columns if form.needs == "answer" else {}
    question = Question(
        prompt=prompt,
        answer=answer,
        choices=choices,
        accepted=_texts(where, "accepted", more.get("accepted") or []),
        topic=_text(where, about, named) if named or form.needs == "choices" else "",
        paraphrase=text_in(where, more, ("paraphrased_answer",)) if more.get("paraphrased_answer") else "",
        perturbed=_texts(where, "perturbed_answer", more.get("perturbed_answer") or []),
    )
    return question, gold


def text_in(where: str, row: Any, names: Sequence[str]) -> str:
    """The text in the first of these columns that a row has.

    Raises: QuestionError if it is no object, has none of them, or holds no text or an empty one.
    """
    _require_object(where, row)
    name = _column(where, row, names)
    return _text(where, name, row[name])


def render_letter(question: Question, *, description: str = "") -> str:
    """The zero-shot prompt whose next token is scored as " A", " B", ...: the harness's MMLU and WMDP text.

    `description` is the line above it, such as "The following are multiple choice questions (with answers)
    about biology."
    Source: EleutherAI/lm-evaluation-harness, tasks wmdp and mmlu.
    """
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{description}\n\n" * bool(description) + f"{question.prompt.strip()}\n{options}Answer:"


def letter_answers(question: Question) -> tuple[str, ...]:
    """What each choice is scored by after `render_letter`: its letter, with the space before it."""
    return tuple(f" {letter}" for letter in LETTERS[: len(question.choices)])


def subset(questions: Sequence[Question], n: int, seed: int) -> tuple[Question, ...]:
    """`n` questions drawn without replacement, in their own order; all of them if there are no more than `n`."""
    if n < 1:
        raise InvalidValueError(f"the number of questions must be at least 1. Got {n}.")
    drawn = random.Random(seed).sample(range(len(questions)), min(n, len(questions)))
    return tuple(questions[i] for i in sorted(drawn))


def _require_object(where: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise QuestionError(
            f"{where}: {type(row).__name__} found, where an object must stand.\nGive each row as names and values."
        )


def _bare(name: str) -> str:
    return name.strip().lower()


def _column(where: str, row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if name in row:
            return name
    others = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise QuestionError(f"{where}: no '{names[0]}'; {field_names(row, 'columns')}.\nName the column so{others}.")


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise QuestionError(f"{where}: {name} holds {type(value).__name__}, not a text.\nMake it a string.")
    if not value.strip():
        raise QuestionError(f"{where}: {name} is empty.\nFill it in, or remove the row.")
    return value


def _texts(where: str, name: str, values: Any, each: str = "") -> tuple[str, ...]:
    if not isinstance(values, list):
        raise QuestionError(f"{where}: {name} holds {type(values).__name__}, not a list of texts.\nMake it a list.")
    return tuple(_text(where, f"{each or name} {i}", value) for i, value in enumerate(values))


def _choices(where: str, row: Mapping[str, Any], is_required: bool) -> tuple[str, ...]:
    values = next((row[name] for name in CHOICES if row.get(name) is not None), None)
    if values is None:
        values = [row[name] for name in _choice_columns(row)] or None
    if values is None and not is_required:
        return ()
    if values is None:
        raise QuestionError(
            f"{where}: no 'choices'; {field_names(row, 'columns')}.\n"
            "Name the column so (or options), or give one column a choice: choice0, choice1, ... or A, B, ..."
        )
    choices = _texts(where, "choices", values, "choice")
    if not 2 <= len(choices) <= len(LETTERS):
        raise QuestionError(
            f"{where}: {len(choices)} choice{'s' * (len(choices) != 1)} found, where 2 to {len(LETTERS)} must stand.\n"
            "Add the wrong options; a free-form question has no choices at all."
        )
    return choices


def _choice_columns(names: Iterable[str]) -> list[str]:
    """Columns with one choice each, in order: choice0, choice1, ... or else A, B, ..., which are two at least."""
    names = set(names)
    numbered = sorted((name for name in names if re.fullmatch(r"choice\d+", name)), key=lambda name: int(name[6:]))
    lettered = list(itertools.takewhile(names.__contains__, LETTERS.lower()))
    return numbered or (lettered if len(lettered) > 1 else [])


def _answer(where: str, row: Mapping[str, Any], form: RowForm, choices: Sequence[str]) -> tuple[str, int]:
    """The answer as text, and its place among the choices if there are any."""
    if form.needs == "question":
        text = row.get("answer", "")
        return (text, 0) if isinstance(text, str) and not text.strip() else (_text(where, "answer", text), 0)
    name = _column(where, row, ANSWER)
    if not choices:
        return _text(where, name, row[name]), 0
    place = _place(where, name, row[name], choices, is_unique=form.needs == "choices")
    same = [number for number, choice in enumerate(choices) if choice.strip() == choices[place].strip()]
    # Published exams hold such rows; there the place counts.
    if len(same) > 1 and form.needs == "answer":
        raise QuestionError(
            f"{where}: choices {' and '.join(map(str, same))} are both the answer.\n"
            "Change one of them, or remove the row."
        )
    return choices[place], place


def _place(where: str, name: str, answer: Any, choices: Sequence[str], *, is_unique: bool) -> int:
    """The right choice by its 0-based index, its letter or its text, which need not be unique."""
    last = LETTERS[len(choices) - 1]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise QuestionError(
            f"{where}: {name} {answer} is no index of {len(choices)} choices; the first has index 0.\n"
            f"Give 0 to {len(choices) - 1}, or the letter A to {last}."
        )
    said = _text(where, name, answer).strip()
    letters = {number for number, letter in enumerate(LETTERS[: len(choices)]) if letter == said}
    texts = {number for number, choice in enumerate(choices) if choice.strip() == said}
    meant = letters & texts or letters | texts
    if not meant:
        raise QuestionError(
            f"{where}: {name} is not among the {len(choices)} choices.\n"
            f"Give the choice's own text, its letter A to {last}, or its 0-based index."
        )
    if len(meant) > 1 and (letters or is_unique):
        raise QuestionError(
            f"{where}: {name} is meant by choices {' and '.join(map(str, sorted(meant)))}.\n"
            "Give the 0-based index instead."
        )
    return min(meant)
