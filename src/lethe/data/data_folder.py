"""A folder with a user's own data: what should be forgotten, what should stay, and questions on both.

    forget.jsonl      what should be forgotten; with a field `topic`, one topic for each of its values
    forget/NAME.jsonl instead of it: one file for each topic
    retain.jsonl      what should stay
    questions.jsonl   questions; a field `set` says of which set: forget (default), adjacent or retain

Each part may be missing where something else is named in its place. No message of this module quotes a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from lethe.data.corpora import read_texts, text_rows
from lethe.data.prompts import prompt_rows, with_answer
from lethe.data.questions import QUESTIONS, question_rows
from lethe.data.text_files import TABLES, did_you_mean
from lethe.errors import CorpusError, QuestionError
from lethe.types import Question, SetName

Found = TypeVar("Found")


SETS = tuple(name for name in get_args(SetName) if name != "unknown")
"""Values of a question's field `set`."""


LONGEST_TOPIC = 60
"""Characters of a topic's name: it stands in logs and reports, so it must not be a text."""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """The files of a folder of own data; what is not there is empty or None."""

    folder: Path
    forget: tuple[Path, ...] = ()
    retain: Path | None = None
    questions: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text of a corpus that is not blank."""

    number: int
    """Line of a `.jsonl` file, else row, counted from 1."""
    text: str
    topic: str
    """What its field `topic` says; empty without."""


def find(folder: str | Path) -> OwnData:
    """The files of a folder.

    Raises: CorpusError if it is no folder, holds none of them, or holds forget corpora twice.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CorpusError(f"no folder {folder}{did_you_mean(folder)}\nGive one with forget.jsonl and retain.jsonl.")
    single = folder / "forget.jsonl"
    several = tuple(sorted((folder / "forget").glob("*.jsonl")))
    if single.is_file() and several:
        raise CorpusError(f"{folder} holds forget.jsonl and forget/ with {len(several)} .jsonl.\nKeep one of the two.")
    retain, questions = (
        path if path.is_file() else None for path in (folder / "retain.jsonl", folder / "questions.jsonl")
    )
    found = OwnData(
        folder=folder, forget=(single,) if single.is_file() else several, retain=retain, questions=questions
    )
    if not (found.forget or retain or questions):
        raise CorpusError(
            f"{folder} holds neither forget.jsonl nor forget/*.jsonl, retain.jsonl or questions.jsonl.\n"
            "Name the files so, or name each by its own flag: --forget, --retain, --forget-questions."
        )
    return found


def read_rows(source: str | Path, text_field: str = "text") -> tuple[Row, ...]:
    """The texts of any corpus that a run can read, with their places and, of a file that `is_table`, their topics.

    Raises: CorpusError.
    """
    texts = read_texts(source, text_field=text_field)
    path = Path(source).expanduser()
    if not is_table(path):
        return tuple(Row(number=number, text=text, topic="") for number, text in enumerate(texts, start=1))
    return tuple(
        Row(number=place(where), text=text, topic=_topic(where, row))
        for where, row, text in text_rows(path, text_field)
        if text.strip()
    )


def read_prompt_rows(source: str | Path) -> tuple[Row, ...]:
    """The prompts of a file that `is_table`, each with its answer as one text, with their places and topics.

    Raises: CorpusError.
    """
    return tuple(
        Row(number=place(where), text=with_answer(prompt), topic=_topic(where, row))
        for where, row, prompt in prompt_rows(source)
    )


def blank_rows(source: str | Path, text_field: str = "text") -> tuple[int, ...]:
    """Places of the rows that `read_rows` leaves out; none for a corpus that it cannot tell of.

    Raises: CorpusError.
    """
    path = Path(source).expanduser()
    if not is_table(path):
        return ()
    return tuple(place(where) for where, _, text in text_rows(path, text_field) if not text.strip())


def is_table(path: Path) -> bool:
    """Whether this is a file whose rows have named columns."""
    return path.is_file() and path.suffix.lower() in TABLES


def forget_texts(folder: str | Path, *, text_field: str = "text", raw_lines: bool = False) -> dict[str, list[str]]:
    """Forget texts by topic; with `raw_lines` the lines of the files themselves, as published.

    Raises: CorpusError.
    """
    found: dict[str, list[str]] = {}
    for path in _required(find(folder).forget, folder, "forget"):
        if raw_lines:
            _add(found, path.stem, read_texts(path, text_field=text_field, raw_lines=True))
            continue
        for row in read_rows(path, text_field):
            _add(found, row.topic or path.stem, [row.text])
    return found


def forget_prompts(folder: str | Path) -> dict[str, tuple[Question, ...]]:
    """Forget prompts by topic, for methods that read prompts.

    Raises: CorpusError.
    """
    found: dict[str, list[Question]] = {}
    for path in _required(find(folder).forget, folder, "forget"):
        for where, row, prompt in prompt_rows(path):
            _add(found, _topic(where, row) or path.stem, [prompt])
    return {topic: tuple(questions) for topic, questions in found.items()}


def retain_file(folder: str | Path) -> Path:
    """The retain corpus.

    Raises: CorpusError if there is none.
    """
    return _required(tuple(filter(None, [find(folder).retain])), folder, "retain")[0]


def questions(folder: str | Path) -> dict[str, tuple[Question, ...]]:
    """The questions by set; none where the folder has no questions.

    Raises: QuestionError, CorpusError.
    """
    path = find(folder).questions
    return {} if path is None else questions_by_set(path)


def questions_by_set(path: Path) -> dict[str, tuple[Question, ...]]:
    """The questions of a file with a field `set`, by its value.

    Raises: QuestionError.
    """
    found: dict[str, list[Question]] = {}
    for where, row, question in question_rows(path, QUESTIONS):
        name = row.get("set", "forget")
        if name not in SETS:
            raise QuestionError(f"{where}: no set of this name.\n'set' is {', '.join(SETS)}, or left out for forget.")
        _add(found, name, [question])
    return {name: tuple(found[name]) for name in SETS if name in found}


def place(where: str) -> int:
    """The number of a line or row at the end of its place in a file."""
    return int(where.rpartition(" ")[2])


def _topic(where: str, row: Mapping[str, Any]) -> str:
    topic = row.get("topic")
    if topic is None or topic == "":
        return ""
    if not isinstance(topic, str) or len(topic) > LONGEST_TOPIC or not topic.isprintable():
        raise CorpusError(
            f"{where}: field 'topic' is no name of at most {LONGEST_TOPIC} characters.\n"
            "Names of topics stand in reports: give a short one, or leave the field out."
        )
    return topic


def _add(found: dict[str, list[Found]], name: str, rows: Sequence[Found]) -> None:
    found.setdefault(name, []).extend(rows)


def _required(paths: tuple[Path, ...], folder: str | Path, side: str) -> tuple[Path, ...]:
    if not paths:
        either = "forget.jsonl and no forget/*.jsonl" if side == "forget" else f"{side}.jsonl"
        raise CorpusError(f"{folder} holds no {either}.\nAdd it, or pass --{side} FILE.")
    return paths
