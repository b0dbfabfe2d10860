"""Prompts instead of running text: what should be refused, what should still be answered, what nobody can answer.

No message of this module quotes a prompt: it names the file and the line or row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lethe.data.corpora import in_turn
from lethe.data.questions import QuestionRow, RowForm, question_rows
from lethe.data.refusals import WANTED
from lethe.data.text_files import TABLE, decoded, did_you_mean
from lethe.errors import CorpusError, QuestionError
from lethe.types import Question

PROMPTS = RowForm(question=("prompt", "question", "instruction", "text"), needs="question")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run. An answer is empty where none was given."""

    forget: dict[str, tuple[Question, ...]]
    """By topic."""
    retain: tuple[Question, ...]
    reference: tuple[Question, ...]
    """Prompts that the model cannot answer."""

    def texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Forget prompts by topic, and retain prompts, each with its answer."""
        forget = {name: [with_answer(asked) for asked in found] for name, found in self.forget.items()}
        return forget, [with_answer(asked) for asked in self.retain]

    def questions(self) -> dict[str, tuple[Question, ...]]:
        """The prompts of each set that all have an answer; those that nobody can answer are the unknown set."""
        sets = {
            "forget": tuple(in_turn(list(self.forget.values()))),
            "retain": self.retain,
            "unknown": tuple(replace(asked, answer=WANTED[0], accepted=WANTED[1:]) for asked in self.reference),
        }
        return {name: questions for name, questions in sets.items() if all(asked.answer for asked in questions)}


def read_prompts(source: str | Path) -> tuple[Question, ...]:
    """Prompts of a `.jsonl`, `.json`, `.csv` or `.parquet` file (columns prompt, question, instruction or text; answer
    if there is one), or the lines of a `.txt` file.

    Raises: CorpusError.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise CorpusError(f"no prompts {path}{did_you_mean(path)}\nGive {TABLE}, or a .txt file.")
    if path.suffix.lower() != ".txt":
        return tuple(found.question for found in prompt_rows(path))
    lines = [line.strip() for line in decoded(path, CorpusError).splitlines() if line.strip()]
    if not lines:
        raise CorpusError(f"{path} holds no prompt.\nGive a file with at least one.")
    return tuple(Question(prompt=line, answer="") for line in lines)


def prompt_rows(path: str | Path) -> list[QuestionRow]:
    """Every row of a file of one of the formats TABLES, with its prompt.

    Raises: CorpusError.
    """
    try:
        return question_rows(path, PROMPTS)
    except QuestionError as error:
        raise CorpusError(str(error)) from None


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Question]) -> tuple[Question, ...]:
    """The prompts in the model's chat template, up to where its answer begins; as they are if it has none.

    BOS is left out: the tokenizer adds it.
    """
    if not tokenizer.chat_template:
        return tuple(prompts)

    def one(asked: Question) -> Question:
        chat = [{"role": "user", "content": asked.prompt}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return replace(asked, prompt=text.removeprefix(str(tokenizer.bos_token or "")))

    return tuple(one(asked) for asked in prompts)


def with_answer(asked: Question) -> str:
    """Prompt and answer as one text."""
    space = "" if asked.prompt[-1:].isspace() or not asked.answer else " "
    return f"{asked.prompt}{space}{asked.answer}"


def check_apart(prompts: Prompts, *, allow: bool) -> None:
    """Refuse forget prompts that also stand among the retain or reference prompts, white space aside.

    Raises: CorpusError with their count and row numbers, unless `allow`.
    """
    sides = {"retain": prompts.retain, "reference": prompts.reference}
    for side, others in sides.items():
        known = {" ".join(asked.prompt.split()) for asked in others}
        for name, found in prompts.forget.items():
            rows = [row for row, asked in enumerate(found, start=1) if " ".join(asked.prompt.split()) in known]
            if rows and not allow:
                places = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
                raise CorpusError(
                    f"{len(rows)} of {len(found)} forget prompts of {name!r} stand among the {side} prompts too: "
                    f"rows {places}.\nRemove them from one side, or pass --allow-overlap."
                )
