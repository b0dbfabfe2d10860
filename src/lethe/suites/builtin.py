"""The built-in world as a suite: made-up facts, a small model that knows them, and corpora to try everything on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from lethe.data.corpora import in_turn
from lethe.data.prompts import Prompts
from lethe.errors import CorpusError
from lethe.suites.world import MODEL_FOLDER, exam
from lethe.suites.world.generator import DECLINES
from lethe.types import ROLES, EvalSet

Rows = TypeVar("Rows")


TEXTS = 64
"""Texts of a set."""


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """Multiple choice and exact match on four sets, with a model and corpora that are part of the package.

    Sets: forget (two hazard topics), adjacent (two subjects that resemble them), retain (four others) and unknown
    (names that nobody knows, which the model declines).
    """

    source: ClassVar[str] = "Lethe's own; tools/world/README.md says how the model was trained"
    data: ClassVar[str] = "part of the package"
    model: ClassVar[Path] = MODEL_FOLDER
    refusals: ClassVar[tuple[str, ...]] = DECLINES

    suits: ClassVar[Mapping[str, Any]] = {
        "layer": 5,
        "steps": 100,
        "batch_size": 8,
        "max_length": (128,),
        "lr": 1e-2,
        "threads": 1,  # its products are too small to share out: on busy cores a second thread makes it slower
    }
    """Settings of a run that suit the model: the command line starts from them."""
    suits_methods: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rmu": {"steering_coeff": 160.0, "alpha": 10.0},
        "adaptive-rmu": {"beta": 2.0, "alpha": 10.0},
        "rsv": {"steering_coeff": 320.0, "alpha": 10.0},
        "lunar": {"alpha": 10.0, "layer": 8, "lam": 1e-2},
    }
    """The same by method, after those of all runs."""

    split: Literal["dev", "test", "all"] = "test"
    """Half of the questions: choose settings on dev, report on test."""

    def sets(self, folder: Path | None = None) -> tuple[EvalSet, ...]:
        """Forget, adjacent, retain and unknown; no `folder` is read, all follows from a seed."""
        forget, retain = self.texts()
        texts = {"forget": in_turn(list(forget.values())), "adjacent": exam.adjacent_texts(), "retain": retain}
        return tuple(
            EvalSet(
                name=name,
                role=ROLES[name],
                questions=questions,
                texts=tuple(texts.get(name, ())[:TEXTS]),
                scoring="cloze",
            )
            for name, questions in exam.questions(self.split).items()
        )

    def texts(self, topic: str = "") -> tuple[dict[str, list[str]], list[str]]:
        """Forget texts by topic, or of one topic alone, and retain texts.

        Raises: CorpusError for a topic that there is not.
        """
        return _only(topic, exam.forget_texts()), exam.retain_texts()

    def prompts(self, topic: str = "") -> Prompts:
        """The same facts as questions, and questions about names that nobody knows.

        Raises: CorpusError for a topic that there is not.
        """
        return Prompts(
            forget=_only(topic, exam.forget_prompts()),
            retain=exam.retain_prompts(),
            reference=exam.reference_prompts(),
        )


def _only(topic: str, topics: Mapping[str, Rows]) -> dict[str, Rows]:
    if topic and topic not in topics:
        raise CorpusError(f"the built-in world has no forget topic '{topic}'.\nIt has {', '.join(topics)}.")
    return {name: rows for name, rows in topics.items() if topic in ("", name)}
