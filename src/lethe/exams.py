"""Published multiple-choice exams, WMDP and MMLU: read from local files, put as lm-evaluation-harness puts them.

No message of this module quotes a question or an answer: it names the file and the row.
"""

import csv
import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from lethe.questions import LETTERS, render_letter
from lethe.textfiles import decoded, did_you_mean, field_names, json_rows
from lethe.types import Question, QuestionError, UsageError

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
QUESTION = ("question", "prompt", "input", "query")
ANSWER = ("answer", "target", "label", "gold", "correct")
CHOICES = ("choices", "options", "endings")
SUBJECT = ("subject", "topic", "category")
EXAMPLES = ("dev", "val", "validation", "train", "auxiliary_train")
"""Splits whose questions are examples for few-shot prompts; the first one that a subject has is taken."""
LONGEST_CELL = 10_000_000
"""Characters of a CSV cell that are still read; a quote never closed makes one cell of the rest of the file."""
WRITTEN_OUT = {"wmdp_bio": "biology", "wmdp_cyber": "cybersecurity", "wmdp_chem": "chemistry"}
"""Subjects whose name in the harness's description differs from that of their file."""

Scoring = Literal["letter", "cloze"]
Kind = TypeVar("Kind", bound=Question)


@dataclass(frozen=True, kw_only=True)
class ExamQuestion(Question):
    """A question whose right choice is known by its place: in some published ones the same text stands twice."""

    gold: int

    @property
    def answer_index(self) -> int:
        """Position of the answer among the choices."""
        return self.gold


@dataclass(frozen=True, kw_only=True)
class Exam:
    """The questions of one benchmark, with their subject as topic."""

    questions: tuple[ExamQuestion, ...]
    examples: Mapping[str, tuple[ExamQuestion, ...]] = field(default_factory=dict)
    """Solved questions of each subject, for few-shot prompts; the first ones are used."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """Every subject, in the order of the questions."""
        return tuple(dict.fromkeys(question.topic for question in self.questions))

    def only(self, subjects: Sequence[str]) -> "Exam":
        """The same exam on some of its subjects.

        Raises: QuestionError for a subject that it does not have.
        """
        unknown = [subject for subject in subjects if subject not in self.subjects]
        if unknown:
            raise QuestionError(
                f"the exam has no subject {', '.join(unknown)}; there is {', '.join(self.subjects)}.\n"
                "Name one of these."
            )
        return replace(self, questions=tuple(one for one in self.questions if one.topic in subjects))


def read_exam(path: str | Path) -> Exam:
    """The exam in a file, or in a folder of files: .csv (with a header or MMLU's own without), .jsonl, .json, .parquet.

    Columns are known by name: question (prompt, input), choices (options; or choice0, choice1, ...; or A, B, ...),
    answer (target, label, gold) as 0-based index, letter or text, and subject (topic, category). Where a file names no
    subject, it is the file's name without its split: `virology_test.csv`. Of a folder, files of the splits dev, val
    and train, by name or subfolder, hold the examples for few-shot prompts.

    Raises: QuestionError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise QuestionError(f"no exam {path}{did_you_mean(path)}\nGive a file ({', '.join(SUFFIXES)}) or a folder.")
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
    asked: list[ExamQuestion] = []
    examples: dict[str, dict[str, list[ExamQuestion]]] = {}
    for file in files:
        split = "test" if file == path else _split(file, path)
        questions = _read_file(file)
        if split in EXAMPLES:
            for question in questions:
                examples.setdefault(question.topic, {}).setdefault(split, []).append(question)
        else:
            asked += questions
    if not asked:
        raise QuestionError(
            f"{path} holds no question.\nGive a file with at least one ({', '.join(SUFFIXES)}), or a folder of such."
        )
    chosen = {subject: next(found[one] for one in EXAMPLES if one in found) for subject, found in examples.items()}
    return Exam(questions=tuple(asked), examples={subject: tuple(found) for subject, found in chosen.items()})


def shuffled(questions: Sequence[ExamQuestion], seed: int) -> tuple[ExamQuestion, ...]:
    """The same questions with their choices in an order drawn by seed and question, to see what letters alone do."""
    found = []
    for number, question in enumerate(questions):
        order = list(range(len(question.choices)))
        random.Random(f"{seed} {number} {question.prompt}").shuffle(order)
        choices = tuple(question.choices[index] for index in order)
        found.append(replace(question, choices=choices, gold=order.index(question.gold)))
    return tuple(found)


def description(subject: str, scoring: Scoring = "letter") -> str:
    """The line above a subject's questions: none where a question has no subject."""
    if not subject:
        return ""
    name = WRITTEN_OUT.get(subject.lower().replace("-", "_"), " ".join(subject.split("_")))
    kind = "multiple choice questions" if scoring == "letter" else "questions"
    return f"The following are {kind} (with answers) about {name}.\n\n"


def render(
    exam: Exam,
    question: ExamQuestion,
    *,
    shots: int = 0,
    scoring: Scoring = "letter",
    chat: PreTrainedTokenizerBase | None = None,
) -> tuple[str, tuple[str, ...]]:
    """What the model reads, and what may follow: the letters, or with cloze scoring each choice's text.

    With the tokenizer of a chat model the description is the system message, everything else one message of the user,
    and nothing stands before the answer; where a template has no system message the description is left out.

    Raises: QuestionError if the subject has fewer examples than `shots`; UsageError without a chat template.
    Source: lm-evaluation-harness 0.4.13, tasks wmdp and mmlu (letter), mmlu_continuation (cloze).
    """
    examples = exam.examples.get(question.topic, ())
    if len(examples) < shots:
        raise QuestionError(
            f"subject '{question.topic}' has {len(examples)} solved examples, where {shots} are asked for.\n"
            "Put a file with more of them beside the questions (dev/SUBJECT_dev.csv), or ask for fewer shots."
        )
    solved = "".join(
        f"{_text(one, scoring)} {_answers(one, scoring)[one.gold]}\n\n" for one in examples[:shots]
    )
    said, above = solved + _text(question, scoring), description(question.topic, scoring)
    answers = _answers(question, scoring)
    if chat is None:
        return above + said, tuple(f" {answer}" for answer in answers)
    return _chat(chat, above, said), answers


def _chat(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> str:
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template.\nScore the model without one, or give a chat model.")
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]
    settings = {"tokenize": False, "add_generation_prompt": True, "continue_final_message": False}
    try:
        return str(tokenizer.apply_chat_template(messages, **settings))
    except jinja2.exceptions.TemplateError:
        return str(tokenizer.apply_chat_template(messages[-1:], **settings))


def _text(question: Question, scoring: Scoring) -> str:
    return render_letter(question) if scoring == "letter" else f"Question: {question.prompt.strip()}\nAnswer:"


def _answers(question: Question, scoring: Scoring) -> tuple[str, ...]:
    return tuple(LETTERS[: len(question.choices)]) if scoring == "letter" else question.choices


# Files


def _split(file: Path, folder: Path) -> str:
    """`dev` of dev/virology_dev.csv, of virology_dev.csv and of virology/dev-00000-of-00001.parquet."""
    parts = [part.lower() for part in file.relative_to(folder).parent.parts]
    words = re.split(r"[_\-.]", file.stem.lower())
    return next((split for split in EXAMPLES if split in parts or split in (words[0], words[-1])), "test")


def _subject(file: Path) -> str:
    """`virology` of virology_test.csv; of a file that is named by its split alone, the name of its folder."""
    bare = re.sub(r"-\d+-of-\d+$", "", file.stem)
    bare = re.sub(rf"[_\-.]?({'|'.join(('test', *EXAMPLES))})$", "", bare, flags=re.IGNORECASE)
    return bare or file.parent.name


def _read_file(path: Path) -> list[ExamQuestion]:
    subject = _subject(path)
    found = [_question(where, row, subject) for where, row in _rows(path)]
    if not found:
        raise QuestionError(f"{path} holds no question.\nGive a file with at least one.")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".csv":
        return _csv_rows(path, decoded(path, QuestionError))
    if suffix in SUFFIXES:
        return json_rows(path, decoded(path, QuestionError), QuestionError)
    raise QuestionError(
        f"{path}: no exam is read from {path.suffix or 'a file without suffix'}.\n"
        f"Give a file of {', '.join(SUFFIXES)}."
    )


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise QuestionError(
            f'{path}: parquet files need one more package: pip install "lethe-unlearn[eval]"'
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise QuestionError(f"{path} is no parquet file, or a damaged one.\nFetch it again.") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row by the header's names; where the first row is a question, by MMLU's own order."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    names: list[str] = []
    number = 0
    try:
        for number, cells in enumerate((row for row in reader if row), start=1):
            if not names:
                names = _header(cells)
                if cells == names:
                    continue
            has_header = not names[0].startswith("\0")
            where = f"{path}, row {number - has_header}"
            if len(cells) != len(names):
                raise QuestionError(
                    f"{where}: {len(cells)} cells, where the first row has {len(names)}.\n"
                    "Put cells with commas in quotes."
                )
            yield where, dict(zip([name.removeprefix("\0") for name in names], cells, strict=True))
    except csv.Error as error:
        raise QuestionError(f"{path}, row {number + 1}: not CSV ({error}).\nWrite the file again.") from None
