"""What every command shares: the two consoles, what a command is, and how its arguments are parsed."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg

from lethe.cli.tables import Table

if TYPE_CHECKING:
    import rich.console
    import rich.table

HELP = ("-h", "--help")


Json = Annotated[bool, arg(name="json", help="Print one JSON object instead of a table.")]


@functools.cache
def terminal(*, errors: bool = False) -> "rich.console.Console":
    """Where tables go, stdout; with `errors` stderr, for progress, warnings and errors."""
    # A help screen needs none of it.
    from rich.console import Console

    # Into a file or a pipe, a row of a table is one line.
    width = None if errors or sys.stdout.isatty() else 1000
    # Paths and corpora's names may hold [brackets] and :colons:, which are no markup.
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False, stderr=errors, width=width)


def show(result: "str | Table | rich.table.Table" = "") -> None:
    """Write a line or a table to stdout: the result of a command, and nothing else."""
    if isinstance(result, str):
        sys.stdout.write(f"{result}\n")
        return
    terminal().print(_drawn(result) if isinstance(result, Table) else result)


def note(text: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{text}\n")


def _drawn(table: Table) -> "rich.table.Table":
    from rich.table import Table as Drawing
    from rich.text import Text

    drawing = Drawing(
        title=table.title or None, title_justify="left", box=None, pad_edge=False, header_style="bold",
        show_header=table.has_header, caption=table.caption or None,
    )  # fmt: skip
    for name in table.columns:
        drawing.add_column(name, justify="right" if name in table.numbers else "left", overflow="fold")
    for row in table.rows:
        drawing.add_row(*map(Text, row))
    return drawing


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `lethe`, with what one may copy."""

    run: Callable[..., Any]
    """A function whose parameters are the flags. With `words`, one that returns such a function, or a dataclass of
    flags that is called when they are filled in, and the arguments for it, from the next word and the rest."""
    examples: tuple[str, ...]
    usage: str = ""
    """How the next word is called, where it decides which flags there are."""
    words: Callable[[], Mapping[str, str]] | None = None
    """What the next word may be, each with a line about it."""
    about: str = ""
    """What else its help says, above these words."""


def call(command: Command, name: str, argv: Sequence[str]) -> None:
    """Run a command with the arguments after its name, or print its help."""
    target: Any = command.run
    if command.words is not None:
        if not argv or argv[0] in HELP:
            said = "\n\n".join(filter(None, (command.run.__doc__, command.about)))
            show(f"usage: lethe {name} {command.usage}\n\n{said}\n")
            show(listed(command.words()))
            print_examples(command)
            return
        word, *argv = argv
        target, argv = command.run(word, argv)
        name = f"{name} {word}"
    parse(target, argv, name, command)


def parse(target: Any, argv: Sequence[str], name: str, command: Command) -> None:
    """Call `target` with the arguments of a command line, or print its help."""
    try:
        filled = tyro.cli(target, args=argv, prog=f"lethe {name}", config=(OmitArgPrefixes, FlagCreatePairsOff))
    except SystemExit:
        if any(word in argv for word in HELP):
            print_examples(command)
        raise
    if filled is not None:
        filled()


def taken(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, the last one if it is given twice, and the arguments without it.

    For the few flags that decide what the defaults of the others are, so that these can be parsed at all.
    """
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == flag:
            following = next(words, None)
            if following is None:
                rest.append(word)
            else:
                value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
        else:
            rest.append(word)
    return value, rest


def print_examples(*commands: Command) -> None:
    """Print what one may copy."""
    show("\nExamples:")
    for command in commands:
        for line in command.examples:
            show(f"  {line}")


def print_json(value: Any) -> None:
    """The result as one JSON object."""
    from lethe.system.atomic_files import as_json

    sys.stdout.write(as_json(value) + "\n")


def listed(lines: Mapping[str, str]) -> Table:
    """Names, and what each does."""
    table = Table("", ("name", "what it does"), has_header=False)
    for name, what in lines.items():
        table.add(f"  {name}", what)
    return table
