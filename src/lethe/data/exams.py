"""Published multiple-choice exams, WMDP and MMLU: read from local files, put as lm-evaluation-harness puts them.

No message of this module quotes a question or an answer: it names the file and the row.
"""

import difflib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from lethe.data.questions import EXAM, LETTERS, question_of, question_table, render_letter
from lethe.data.text_files import TABLE, TABLES, did_you_mean
from lethe.errors import QuestionError, UsageError
from lethe.types import Question

EXAMPLES = ("dev", "val", "validation", "train", "auxiliary_train")
"""Splits whose questions are examples for few-shot prompts; the first one that a subject has is taken."""


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
        raise QuestionError(f"no exam {path}{did_you_mean(path)}\nGive {TABLE}, or a folder.")
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.suffix.lower() in TABLES)
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
        raise QuestionError(f"{path} holds no question.\nGive {TABLE} with at least one, or a folder of such.")
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
    question, gold = question_of(where, row, EXAM, subject)
    return ExamQuestion(
        prompt=question.prompt,
        choices=question.choices,
        answer=question.answer,
        gold=gold,
        topic=question.topic,
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
    if path.suffix.lower() not in TABLES:
        raise QuestionError(f"{path}: no exam is read from {path.suffix or 'a file without suffix'}.\nGive {TABLE}.")
    found = [as_question(where, row, subject) for where, row in question_table(path, _mmlu_columns)]
    if not found:
        raise QuestionError(f"{path} holds no question.\nGive a file with at least one.")
    return found


def _mmlu_columns(first: Sequence[str]) -> list[str] | None:
    """MMLU's own order of columns, where the first row of a `.csv` is a question and no header."""
    if any(cell.strip().lower() in EXAM.question for cell in first):
        return None
    return ["question", *(f"choice{index}" for index in range(len(first) - 2)), "answer"]
