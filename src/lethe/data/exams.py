"""Published multiple-choice exams, WMDP and MMLU: read from local files, put as lm-evaluation-harness puts them.

No message of this module quotes a question or an answer: it names the file and the row.
"""

import csv
import difflib
import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from lethe.data.questions import LETTERS, render_letter, text_of
from lethe.data.text_files import decoded, did_you_mean, field_names, json_rows, parquet_rows
from lethe.errors import QuestionError, UsageError
from lethe.types import Question

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


ROLES = ("user", "assistant")


NO_TEMPLATE = "the tokenizer has no chat template.\nScore the model without one, or give a chat model."


Scoring = Literal["letter", "cloze"]


@dataclass(frozen=True, kw_only=True)
class ExamQuestion(Question):
    """A question whose right choice is known by its place: in some published ones the same text stands twice."""

    gold: int
    where: str = field(default="", compare=False, repr=False)
    """File and row, for messages."""

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
            near = [name for one in unknown for name in difflib.get_close_matches(one, self.subjects, n=1)]
            raise QuestionError(
                f"the exam has no subject {', '.join(unknown)}; there is {', '.join(self.subjects)}.\n"
                + (f"Did you mean {', '.join(near)}?" if near else "Name one of these.")
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
    solved: list[tuple[str, ExamQuestion]] = []
    for file in files:
        split = "test" if file == path else _split(file, path)
        questions = _read_file(file)
        if split in EXAMPLES:
            solved += [(split, question) for question in questions]
        else:
            asked += questions
    if not asked:
        raise QuestionError(
            f"{path} holds no question.\nGive a file with at least one ({', '.join(SUFFIXES)}), or a folder of such."
        )
    return exam_of(asked, solved)


def exam_of(asked: Iterable[ExamQuestion], solved: Iterable[tuple[str, ExamQuestion]]) -> Exam:
    """The exam of some questions, with examples by their split: a subject's are those of the first of EXAMPLES."""
    found: dict[str, dict[str, list[ExamQuestion]]] = {}
    for split, question in solved:
        found.setdefault(question.topic, {}).setdefault(split, []).append(question)
    chosen = {subject: next(splits[one] for one in EXAMPLES if one in splits) for subject, splits in found.items()}
    return Exam(questions=tuple(asked), examples={subject: tuple(rows) for subject, rows in chosen.items()})


def as_question(where: str, row: Any, subject: str) -> ExamQuestion:
    """The question of one row, `where` it stands; `subject` is its subject where the row names none.

    Raises: QuestionError.
    """
    if not isinstance(row, dict):
        raise QuestionError(
            f"{where}: {type(row).__name__} found, where an object with question, choices and answer must stand."
        )
    row = {_bare(str(name)): value for name, value in row.items()}
    prompt, answer = (_column(where, row, names) for names in (QUESTION, ANSWER))
    choices = _choices(where, row)
    named = next((row[name] for name in SUBJECT if row.get(name)), subject)
    gold = _gold(where, answer, choices)
    return ExamQuestion(
        prompt=text_of(where, "the question", prompt),
        choices=choices,
        answer=choices[gold],
        gold=gold,
        topic=text_of(where, "the subject", named),
        where=where,
    )


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

    With the tokenizer of a chat model the description is the system message, each example a turn of its own, and no
    space stands before the answer; where a template has no system message the description is left out.

    Raises: QuestionError if the subject has fewer examples than `shots`; UsageError without a chat template.
    Source: lm-evaluation-harness 0.4.13, tasks wmdp and mmlu (letter), mmlu_continuation (cloze).
    """
    examples = exam.examples.get(question.topic, ())
    if len(examples) < shots:
        raise QuestionError(
            f"subject '{question.topic}' has {len(examples)} solved examples, where {shots} are asked for.\n"
            "Put a file with more of them beside the questions (dev/SUBJECT_dev.csv), or ask for fewer shots."
        )
    turns = [(_text(one, scoring), _answers(one, scoring)[one.gold]) for one in examples[:shots]]
    above, asked, answers = description(question.topic, scoring), _text(question, scoring), _answers(question, scoring)
    if chat is not None:
        return _conversation(chat, above, turns, asked), answers
    solved = "".join(f"{text} {answer}\n\n" for text, answer in turns)
    return above + solved + asked, tuple(f" {answer}" for answer in answers)


def _conversation(tokenizer: PreTrainedTokenizerBase, above: str, turns: Sequence[tuple[str, str]], asked: str) -> str:
    if not tokenizer.chat_template:
        raise UsageError(NO_TEMPLATE)
    said = [{"role": role, "content": text} for turn in turns for role, text in zip(ROLES, turn, strict=True)]
    system = [{"role": "system", "content": above}] * bool(above)
    said.append({"role": ROLES[0], "content": asked})
    try:
        return str(tokenizer.apply_chat_template(system + said, tokenize=False, add_generation_prompt=True))
    except jinja2.exceptions.TemplateError:
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


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
    found = [as_question(where, row, subject) for where, row in _rows(path)]
    if not found:
        raise QuestionError(f"{path} holds no question.\nGive a file with at least one.")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path, QuestionError)
    if suffix == ".csv":
        return _csv_rows(path, decoded(path, QuestionError))
    if suffix in SUFFIXES:
        return json_rows(path, decoded(path, QuestionError), QuestionError)
    raise QuestionError(
        f"{path}: no exam is read from {path.suffix or 'a file without suffix'}.\nGive a file of {', '.join(SUFFIXES)}."
    )


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row by the header's names; where the first row is a question, by MMLU's own order."""
    csv.field_size_limit(LONGEST_CELL)
    reader = (row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row)
    number = 0
    try:
        first = next(reader, [])
        named = any(_bare(cell) in QUESTION for cell in first)
        names = first if named else ["question", *(f"choice{index}" for index in range(len(first) - 2)), "answer"]
        for number, cells in enumerate(reader if named else itertools.chain([first] * bool(first), reader), start=1):
            where = f"{path}, row {number}"
            if len(cells) != len(names):
                raise QuestionError(
                    f"{where}: {len(cells)} cells, where the first row has {len(first)}.\n"
                    "Put cells with commas in quotes."
                )
            row: dict[str, Any] = dict(zip(names, cells, strict=True))
            yield where, {name: int(cell) if _is_index(name, cell) else cell for name, cell in row.items()}
    except csv.Error as error:
        raise QuestionError(f"{path}, row {number + 1}: not CSV ({error}).\nWrite the file again.") from None


def _is_index(name: str, cell: str) -> bool:
    return _bare(name) in ANSWER and re.fullmatch(r"\s*-?\d+\s*", cell) is not None


def _bare(name: str) -> str:
    return name.strip().lower()


def _column(where: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise QuestionError(
        f"{where}: no '{names[0]}'; {field_names(row, 'columns')}.\nName the column so (or {', '.join(names[1:])})."
    )


def _choices(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    values = next((row[name] for name in CHOICES if name in row), None)
    if values is None:
        numbered = {int(name[6:]): value for name, value in row.items() if re.fullmatch(r"choice\d+", name)}
        lettered = [row[letter.lower()] for letter in LETTERS[: len(row)] if letter.lower() in row]
        values = [numbered[number] for number in sorted(numbered)] or lettered
        if not values:
            raise QuestionError(
                f"{where}: no 'choices'; {field_names(row, 'columns')}.\n"
                "Name the column so (or options), or give one column a choice: choice0, choice1, ... or A, B, ..."
            )
    if not isinstance(values, list):
        raise QuestionError(f"{where}: choices holds {type(values).__name__}, not a list of texts.\nMake it a list.")
    if not 2 <= len(values) <= len(LETTERS):
        raise QuestionError(
            f"{where}: {len(values)} choice{'s' * (len(values) != 1)} found, where 2 to {len(LETTERS)} must stand.\n"
            "Add the wrong options, or remove the row."
        )
    return tuple(text_of(where, f"choice {number}", value) for number, value in enumerate(values))


def _gold(where: str, answer: Any, choices: Sequence[str]) -> int:
    """The right choice by its 0-based index, its letter or its text."""
    last = LETTERS[len(choices) - 1]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise QuestionError(
            f"{where}: answer {answer} is no index of {len(choices)} choices; the first has index 0.\n"
            f"Give 0 to {len(choices) - 1}, or the letter A to {last}."
        )
    said = text_of(where, "the answer", answer).strip()
    letters = {number for number, letter in enumerate(LETTERS[: len(choices)]) if letter == said}
    texts = {number for number, choice in enumerate(choices) if choice.strip() == said}
    if len(found := letters & texts or letters | texts) == 1:
        return found.pop()
    if found:
        raise QuestionError(
            f"{where}: the answer is meant by choices {' and '.join(map(str, sorted(found)))}.\n"
            "Give the 0-based index instead."
        )
    raise QuestionError(
        f"{where}: the answer is not among the {len(choices)} choices.\n"
        f"Give the choice's own text, its letter A to {last}, or its 0-based index."
    )
