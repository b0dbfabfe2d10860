"""TOFU: made-up authors that a model was fine-tuned on, some of them to be forgotten."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from lethe.data.questions import read_questions
from lethe.data.text_files import TABLES, did_you_mean
from lethe.errors import InvalidValueError, QuestionError
from lethe.types import EvalSet, Question


@dataclass(frozen=True, kw_only=True)
class TOFU:
    """Probability, ROUGE and truth ratio on four sets, model utility, and forget quality with a retain-only model.

    Sets: forget (the split's authors), retain (400 questions about the others), real_authors and world_facts. Files,
    as on the hub: forget10_perturbed.json, retain_perturbed.json, real_authors_perturbed.json and
    world_facts_perturbed.json, each an object a line. Answers are generated up to a newline and twice the right one's
    length, where TOFU takes 200 tokens. The retain-only model of forget10 is fine-tuned on retain90.
    """

    source: ClassVar[str] = "Maini et al., TOFU (2024), arXiv 2401.06121"
    data: ClassVar[str] = "locuslab/TOFU on the Hugging Face hub; MIT licence"

    split: str = "forget10"
    """What is forgotten: forget01, forget05 or forget10, by the share of authors in per cent."""
    template: str = "Question: {question}\nAnswer:"
    """What the model reads, as it was fine-tuned: TOFU's own form for models without a chat format."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"forget\d+", self.split):
            raise InvalidValueError(f"TOFU's splits are forget01, forget05 and forget10. Got '{self.split}'.")
        if "{question}" not in self.template:
            raise InvalidValueError("TOFU's template must hold {question}, where the question goes. It does not.")

    def sets(self, folder: Path) -> tuple[EvalSet, ...]:
        """Forget, retain, real authors and world facts.

        Raises: QuestionError if a file is missing, is no question file, or lacks the wrong answers or paraphrases.
        """
        files = {
            "forget": f"{self.split}_perturbed",
            "retain": "retain_perturbed",
            "real_authors": "real_authors_perturbed",
            "world_facts": "world_facts_perturbed",
        }
        return tuple(
            EvalSet(
                name=name,
                role="forget" if name == "forget" else "keep",
                questions=self._read(folder, stem, name in ("forget", "retain")),
            )
            for name, stem in files.items()
        )

    def _read(self, folder: Path, stem: str, has_paraphrases: bool) -> tuple[Question, ...]:
        path = next((path for suffix in TABLES if (path := folder / f"{stem}{suffix}").is_file()), None)
        if path is None:
            raise QuestionError(
                f"no {stem}.json in {folder}{did_you_mean(folder / f'{stem}.json')}\n"
                f"TOFU's '{self.split}' reads it: take it from {self.data}."
            )
        found = read_questions(path)
        for number, question in enumerate(found, start=1):
            missing = "perturbed_answer" if not question.perturbed else "paraphrased_answer"
            if not question.perturbed or (has_paraphrases and not question.paraphrase):
                raise QuestionError(
                    f"{path}, question {number}: no '{missing}', which the truth ratio needs.\n"
                    f"Take the file from {self.data}, or fill the column in."
                )
        return tuple(
            replace(question, prompt=self.template.replace("{question}", question.prompt)) for question in found
        )
