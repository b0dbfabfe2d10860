"""Published unlearning benchmarks with sets of their own; one suite is one public dataclass in one file.

They are found by name. Their data is read from local files and stays with its owners: nothing of it is part of Lethe.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from lethe.data.prompts import Prompts
from lethe.system.plugins import discover
from lethe.types import EvalSet


@runtime_checkable
class Suite(Protocol):
    """Turns the files of a benchmark into the sets that metrics read."""

    source: ClassVar[str]
    data: ClassVar[str]
    """Where its files are to be had, and under which licence."""
    split: str
    """Which part of the benchmark, by the name that its authors gave it."""

    def sets(self, folder: Path) -> tuple[EvalSet, ...]:
        """The sets in a folder with the benchmark's files.

        Raises: QuestionError naming file, row and fix.
        """
        ...


@runtime_checkable
class SuiteWithModel(Suite, Protocol):
    """A suite that also brings a model, what that can be made to forget, and the settings that suit it."""

    model: ClassVar[Path]
    """Folder of the model."""
    refusals: ClassVar[tuple[str, ...]]
    """How that model declines."""
    suits: ClassVar[Mapping[str, Any]]
    """Settings of a run that suit the model, by field, written out: the command line starts from them."""
    suits_methods: ClassVar[Mapping[str, Mapping[str, Any]]]
    """The same by method, by field of the method or of a run; after those of all runs."""

    def sets(self, folder: Path | None = None) -> tuple[EvalSet, ...]:
        """What the model is measured on; no folder is read."""
        ...

    def texts(self, topic: str = "") -> tuple[dict[str, list[str]], list[str]]:
        """Forget texts by topic, or of one topic alone, and retain texts.

        Raises: CorpusError for a topic that there is not.
        """
        ...

    def prompts(self, topic: str = "") -> Prompts:
        """The same as questions, and questions that the model cannot answer, which methods may steer towards.

        Raises: CorpusError for a topic that there is not.
        """
        ...


def with_model(name: str, **settings: Any) -> SuiteWithModel | None:
    """The suite of this name if it brings a model, with these settings; None for a name of anything else."""
    from lethe import suites

    kind = discover(suites).get(name)
    return kind(**settings) if kind is not None and "model" in vars(kind) else None
