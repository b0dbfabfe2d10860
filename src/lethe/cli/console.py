"""What every command shares: the two consoles, what a command is, and how its arguments are parsed."""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, arg

# Paths and corpora's names may hold [brackets] and :colons:, which are no markup.
_console = functools.partial(Console, soft_wrap=True, markup=False, emoji=False, highlight=False)

# Into a file or a pipe, a row of a table is one line.
RESULT = _console(width=None if sys.stdout.isatty() else 1000)
"""stdout: the result and nothing else."""


NOTES = _console(stderr=True)
"""stderr: progress, warnings, errors."""


HELP = ("-h", "--help")


Json = Annotated[bool, arg(name="json", help="Print one JSON object instead of a table.")]


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
            RESULT.print(f"usage: lethe {name} {command.usage}\n\n{said}\n")
            RESULT.print(listed(command.words()))
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
    RESULT.print("\nExamples:")
    for command in commands:
        for line in command.examples:
            RESULT.print(f"  {line}")


def print_json(value: Any) -> None:
    """The result as one JSON object."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def listed(lines: Mapping[str, str]) -> Table:
    """Names, and what each does."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, what in lines.items():
        table.add_row(f"  {name}", what)
    return table
