"""MUSE: news articles or books that a model was trained on, and whether it still knows them."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lethe.data.questions import text_in
from lethe.data.text_files import TABLES, table_rows
from lethe.errors import InvalidValueError, QuestionError
from lethe.types import EvalSet, Question

SPLITS = ("news", "books")


SUFFIXES = (*TABLES, "-00000-of-00001.parquet")


FORM = "Question: {}\nAnswer:"


@dataclass(frozen=True, kw_only=True)
class MUSE:
    """Verbatim and knowledge memorisation, and privacy leakage with a retain-only model.

    Sets: forget (questions, passages, texts and held-out ones) and retain (questions). Files, as on the hub and as
    written by muse_bench's load_data.py (.parquet, .json or .jsonl): knowmem/forget_qa and retain_qa (retain2_qa),
    each with its solved examples in ..._icl; verbmem/forget; privleak/forget and holdout. They are looked for in the
    folder, or in its subfolder news or books.
    """

    source: ClassVar[str] = "Shi et al., MUSE (2024), arXiv 2407.06460"
    data: ClassVar[str] = "muse-bench/MUSE-News and muse-bench/MUSE-Books on the Hugging Face hub; CC BY 4.0"

    split: str = "news"
    """Which corpus: news or books."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InvalidValueError(f"MUSE's splits are news and books. Got '{self.split}'.")

    def sets(self, folder: Path) -> tuple[EvalSet, ...]:
        """Forget and retain.

        Raises: QuestionError if a file is missing, damaged, or lacks a column.
        """
        inside = (folder / self.split, folder / f"MUSE-{self.split.capitalize()}", folder)
        root = next((path for path in inside if path.is_dir()), folder)
        verbatim = _columns(self._find(root / "verbmem", "forget"), "prompt", "gt")
        private = {name: _columns(self._find(root / "privleak", name), "text") for name in ("forget", "holdout")}
        return (
            EvalSet(
                name="forget",
                role="forget",
                questions=self._questions(root, "forget_qa"),
                passages=tuple((start, rest) for start, rest in verbatim),
                texts=tuple(text for (text,) in private["forget"]),
                holdout=tuple(text for (text,) in private["holdout"]),
            ),
            EvalSet(name="retain", role="keep", questions=self._questions(root, "retain_qa", "retain2_qa")),
        )

    def _questions(self, root: Path, *names: str) -> tuple[Question, ...]:
        path = self._find(root / "knowmem", *names)
        solved = _columns(self._find(root / "knowmem", *(f"{name}_icl" for name in names)), "question", "answer")
        above = "".join(f"{FORM.format(question)} {answer}\n\n" for question, answer in solved)
        return tuple(
            Question(prompt=above + FORM.format(question), answer=answer)
            for question, answer in _columns(path, "question", "answer")
        )

    def _find(self, folder: Path, *names: str) -> Path:
        for name in names:
            for suffix in SUFFIXES:
                if (path := folder / f"{name}{suffix}").is_file():
                    return path
        raise QuestionError(
            f"no {' or '.join(names)} ({', '.join(SUFFIXES)}) in {folder}.\n"
            f"MUSE's '{self.split}' reads it: take it from {self.data}."
        )


def _columns(path: Path, *names: str) -> list[tuple[str, ...]]:
    """The texts of some columns, row by row; a row that is a text alone is the only column."""
    rows = [
        (where, {names[0]: row} if isinstance(row, str) and len(names) == 1 else row)
        for where, row in table_rows(path, QuestionError)
    ]
    if not rows:
        raise QuestionError(f"{path} holds no row.\nFetch the file again.")
    return [tuple(text_in(where, row, (name,)) for name in names) for where, row in rows]
