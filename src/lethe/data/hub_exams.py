"""Where an exam is found by name: a file or folder here, else a dataset of the hub; and MMLU's groups of subjects."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lethe.data.exams import EXAMPLES, Exam, ExamQuestion, as_question, exam_of, read_exam
from lethe.errors import QuestionError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
"""`org/name`, `org/name:config`, `org/name:config:split`."""


EVERYTHING = "all"
"""Configuration that holds the subjects of all others (cais/mmlu)."""


UNUSED_SPLIT = "auxiliary_train"
"""MMLU's hundred thousand questions of other exams, of no subject."""


GROUPS: Mapping[str, tuple[str, ...]] = {
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "stem": (
        "abstract_algebra", "anatomy", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics", "high_school_biology",
        "high_school_chemistry", "high_school_computer_science", "high_school_mathematics", "high_school_physics",
        "high_school_statistics", "machine_learning",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip
"""MMLU's four groups (Hendrycks et al., arXiv 2009.03300), as lm-evaluation-harness has them."""


def find_exam(name: str) -> Exam:
    """The exam in a file or folder, or of a hub dataset `org/name[:config[:split]]` (cais/mmlu, cais/wmdp:wmdp-bio).

    Raises: QuestionError.
    """
    if Path(name).expanduser().exists() or not HUB_ID.fullmatch(name):
        return read_exam(name)
    return _hub_exam(*name.split(":"))


def groups_of(exam: Exam) -> dict[str, tuple[str, ...]]:
    """Those of MMLU's groups that the exam holds more of than one subject."""
    found = {group: tuple(name for name in exam.subjects if name in members) for group, members in GROUPS.items()}
    return {group: members for group, members in found.items() if len(members) > 1}


def _hub_exam(name: str, config: str = "", split: str = "") -> Exam:
    asked: list[ExamQuestion] = []
    solved: list[tuple[str, ExamQuestion]] = []
    for chosen, parts in _datasets(name, config).items():
        if split and split not in parts:
            raise QuestionError(f"{name}, {chosen}: no split '{split}'.\nThere is {', '.join(parts)}.")
        for part, rows in parts.items():
            questions = [
                as_question(f"{name}, {chosen}, {part}, row {number}", row, "" if chosen == EVERYTHING else chosen)
                for number, row in enumerate(rows, start=1)
            ]
            if part in EXAMPLES and part != split:
                solved += [(part, question) for question in questions]
            elif split in ("", part):
                asked += questions
    if not asked:
        raise QuestionError(f"{name} holds no question to ask, only examples.\nName the split: {name}:CONFIG:SPLIT.")
    return exam_of(asked, solved)


def _datasets(name: str, config: str) -> dict[str, dict[str, Any]]:
    """The rows of a hub dataset by configuration and split."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise QuestionError(
            f'{name}: datasets of the hub need one more package: pip install "lethe-unlearn[eval]"'
        ) from None
    try:
        configs = [config] if config else datasets.get_dataset_config_names(name)
        configs = [EVERYTHING] if EVERYTHING in configs else configs
        found = {one: datasets.load_dataset(name, one) for one in configs if one != UNUSED_SPLIT}
    except (OSError, ValueError, DatasetsError) as error:
        # The reason is left out: it may quote rows.
        raise QuestionError(
            f"no exam {name}: it is no file or folder here, and the hub does not give it ({type(error).__name__}).\n"
            "Go online (and accept its licence, if it is gated), or fetch its files and name their folder."
        ) from None
    return {
        one: {str(split): rows for split, rows in parts.items() if str(split) != UNUSED_SPLIT}
        for one, parts in found.items()
    }
