"""Progress bars on the terminal."""

from typing import Any

from lethe.cli.console import terminal
from lethe.system.progress import Progress


class Bars(Progress):
    """Progress bars on stderr, one a phase."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self.console = terminal(errors=True)
        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            # The note gives way where the terminal is narrow.
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=self.console,
            expand=True,
        )
        self.task: Any = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self.task is not None:
            self.bars.stop()

    def phase(self, name: str, total: int) -> None:
        """A new bar."""
        self.bars.start()
        self.task = self.bars.add_task(name, total=total, note="")

    def advance(self, note: str = "") -> None:
        """One part more, and what was just done."""
        self.bars.update(self.task, advance=1, note=note)

    def warn(self, text: str) -> None:
        """A line above the bars."""
        from rich.text import Text

        self.console.print(Text.assemble(("warning:", "yellow"), f" {text}"))
