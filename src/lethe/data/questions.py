"""Multiple-choice and free-form questions: read from files, drawn by seed, rendered as lm-evaluation-harness does.

No message of this module quotes a question or an answer: it names the file and the line or row.
"""

import csv
import io
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lethe.data.text_files import decoded, did_you_mean, field_names, json_rows
from lethe.errors import InvalidValueError, QuestionError
from lethe.types import Question

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a `.jsonl`, `.json` (an array, or one object a line) or `.csv` file, in its order.

    A row has `prompt` or `question` (`prompt` where it has both), `answer`, and if wanted `choices`,
    `accepted` (further right answers), `topic`, `paraphrased_answer` and `perturbed_answer` (a list; as TOFU has them);
    a `.csv` has choices as columns choice0, choice1, ...
    `answer` is a text; with choices it may also be the letter A, B, ... or the 0-based index, which is a
    number in JSON and any whole number in a `.csv` (MMLU's form).
    Raises: QuestionError.
    """
    path = Path(path).expanduser()
    content = _content(path)
    is_csv = path.suffix.lower() == ".csv"
    rows = _csv_rows(path, content) if is_csv else json_rows(path, content, QuestionError)
    questions = tuple(_question(where, row) for where, row in rows)
    if not questions:
        raise QuestionError(f"{path} holds no question.\nGive a file with at least one.")
    return questions


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


def _question(where: str, row: Any) -> Question:
    if not isinstance(row, dict):
        raise QuestionError(
            f"{where}: {type(row).__name__} found, where an object with question and answer must stand."
        )
    prompt = next((name for name in ("prompt", "question") if name in row), None)
    if prompt is None or "answer" not in row:
        missing = "'answer'" if prompt else "'question' or 'prompt'"
        raise QuestionError(f"{where}: no {missing}; {field_names(row, 'columns')}.\nName the column so.")
    choices = _choices(where, row.get("choices"))
    return Question(
        prompt=text_of(where, prompt, row[prompt]),
        answer=_answer(where, row["answer"], choices),
        choices=choices,
        accepted=_texts(where, "accepted", row.get("accepted") or []),
        topic=_optional(where, "topic", row),
        paraphrase=_optional(where, "paraphrased_answer", row),
        perturbed=_texts(where, "perturbed_answer", row.get("perturbed_answer") or []),
    )


def text_of(where: str, name: str, value: Any) -> str:
    """A field's value, if it is a text with something in it.

    Raises: QuestionError that names the place and the field.
    """
    if not isinstance(value, str):
        raise QuestionError(f"{where}: {name} holds {type(value).__name__}, not a text.\nMake it a string.")
    if not value.strip():
        raise QuestionError(f"{where}: {name} is empty.\nFill it in, or remove the row.")
    return value


def _optional(where: str, name: str, row: dict[str, Any]) -> str:
    return text_of(where, name, row[name]) if row.get(name) else ""


def _texts(where: str, name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise QuestionError(f"{where}: {name} holds {type(values).__name__}, not a list of texts.")
    return tuple(text_of(where, f"{name} {i}", value) for i, value in enumerate(values))


def _choices(where: str, values: Any) -> tuple[str, ...]:
    if values is None:
        return ()
    choices = _texts(where, "choices", values)
    if not 2 <= len(choices) <= len(LETTERS):
        raise QuestionError(
            f"{where}: {len(choices)} choice{'s' * (len(choices) != 1)} found, where 2 to {len(LETTERS)} must stand.\n"
            "Add the wrong options, or leave the choices out for a free-form question."
        )
    return choices


def _answer(where: str, value: Any, choices: tuple[str, ...]) -> str:
    """The answer as text; one of `choices`, and only one, if there are any."""
    if not choices:
        return text_of(where, "answer", value)
    if isinstance(value, int) and not isinstance(value, bool):
        index = value
    else:
        index = _answer_index(where, text_of(where, "answer", value).strip(), choices)
    if not 0 <= index < len(choices):
        raise QuestionError(
            f"{where}: answer {index} is no index of {len(choices)} choices; the first has index 0.\n"
            f"Give 0 to {len(choices) - 1}, or the letter A to {LETTERS[len(choices) - 1]}."
        )
    same = [i for i, choice in enumerate(choices) if choice.strip() == choices[index].strip()]
    if len(same) > 1:
        raise QuestionError(
            f"{where}: choices {' and '.join(map(str, same))} are both the answer.\n"
            "Change one of them, or remove the row."
        )
    return choices[index]


def _answer_index(where: str, answer: str, choices: tuple[str, ...]) -> int:
    as_text = [i for i, choice in enumerate(choices) if choice.strip() == answer]
    as_letter = [i for i, letter in enumerate(LETTERS[: len(choices)]) if letter == answer]
    if as_text and as_letter and as_letter[0] not in as_text:
        raise QuestionError(
            f"{where}: answer is the letter of choice {as_letter[0]} and the text of choice {as_text[0]}.\n"
            "Give the 0-based index instead."
        )
    for index in as_text + as_letter:
        return index
    raise QuestionError(
        f"{where}: answer is not among the {len(choices)} choices.\n"
        f"Give the choice's own text, its letter A to {LETTERS[len(choices) - 1]}, or its 0-based index."
    )


def _content(path: Path) -> str:
    if not path.is_file():
        raise QuestionError(f"no question file {path}{did_you_mean(path)}\nGive a .jsonl, .json or .csv file.")
    if path.suffix.lower() not in (".jsonl", ".json", ".csv"):
        raise QuestionError(
            f"{path}: no question is read from {path.suffix or 'a file without suffix'}.\n"
            "Give a .jsonl, .json or .csv file."
        )
    return decoded(path, QuestionError)


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Each row with its place in the file, in the shape that a JSON row has; the header is not counted."""
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            where = f"{path}, row {number}"
            if None in row or None in row.values():
                more_or_fewer = "more" if None in row else "fewer"
                raise QuestionError(
                    f"{where}: {more_or_fewer} cells than the header.\nPut cells with commas in quotes."
                )
            names = sorted((name for name in row if re.fullmatch(r"choice\d+", name)), key=lambda name: int(name[6:]))
            parsed: dict[str, Any] = {name: cell for name, cell in row.items() if name not in names}
            if names:
                parsed["choices"] = [row[name] for name in names]
                if re.fullmatch(r"\s*-?\d+\s*", row.get("answer", "")):
                    parsed["answer"] = int(row["answer"])
            yield where, parsed
    except csv.Error as error:
        raise QuestionError(f"{path}, row {number + 1}: not CSV ({error}).") from None
