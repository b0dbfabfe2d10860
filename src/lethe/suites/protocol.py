"""Published unlearning benchmarks with sets of their own; one suite is one public dataclass in one file.

They are found by name. Their data is read from local files and stays with its owners: nothing of it is part of Lethe.
"""

from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

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
