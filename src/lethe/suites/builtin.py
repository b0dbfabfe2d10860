"""The built-in world as a suite: made-up facts, a small model that knows them, and corpora to try everything on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from lethe.data.corpora import in_turn
from lethe.data.prompts import Prompts
from lethe.errors import CorpusError
from lethe.suites.world import MODEL_FOLDER, exam, settings
from lethe.suites.world.generator import DECLINES
from lethe.types import EvalSet, Role

Rows = TypeVar("Rows")


TEXTS = 64
"""Texts of a set."""


ROLES: Mapping[str, Role] = {"forget": "forget", "adjacent": "keep", "retain": "keep", "unknown": "neither"}


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

    def settings(self, method: str = "") -> dict[str, Any]:
        """What suits the model, by field of the method of this name, or of a run."""
        return {**settings.ON_BUILTIN, **settings.OF_METHODS.get(method, {})}


def _only(topic: str, topics: Mapping[str, Rows]) -> dict[str, Rows]:
    if topic and topic not in topics:
        raise CorpusError(f"the built-in world has no forget topic '{topic}'.\nIt has {', '.join(topics)}.")
    return {name: rows for name, rows in topics.items() if topic in ("", name)}
