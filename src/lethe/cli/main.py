"""The `lethe` command: finds the command that is asked for, and turns errors into messages and exit codes."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.text import Text
from transformers.utils import logging as transformers_logging

from lethe.__version__ import __version__
from lethe.cli import analyze, compare, console, data, evaluate, files, layers, sweep, tables
from lethe.cli.console import NOTES, RESULT
from lethe.errors import LetheError, UnknownNameError
from lethe.system import plugins as configs


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 failed, 2 usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        _dispatch(argv)
    except LetheError as error:
        NOTES.print(Text.assemble(("lethe: error:", "bold red"), f" {error}"))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        resume = argv[0] in ("demo", "sweep", "unlearn")
        NOTES.print("lethe: interrupted." + " The same command goes on from the last checkpoint." * resume)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": console.demo, "unlearn": console.unlearn, "sweep": sweep.sweep, "advise": layers.advise,
    "layers": layers.layers, "withdraw": console.withdraw, "eval": evaluate.evaluate,
    "data": data.data, "analyze": analyze.analyze, "check": console.check, "ls": console.ls,
    "report": files.report, "compare": compare.compare,
    "export": files.export, "apply": files.apply, "revert": files.revert,
    "diff": files.diff,
}  # fmt: skip


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        RESULT.print("lethe COMMAND ...: remove chosen knowledge from a language model, and measure what is left.\n")
        RESULT.print(tables.commands(COMMANDS))
        console.examples(*COMMANDS)
        return
    if argv[0] == "--version":
        RESULT.print(__version__)
        return
    command = argv[0]
    if command not in COMMANDS:
        hint = configs.nearest(command, COMMANDS, cutoff=0.4)
        raise UnknownNameError(f"there is no command '{command}'.{hint}\nCommands: {', '.join(COMMANDS)}.")
    if command in ("analyze", "data", "sweep", "unlearn"):
        # What follows decides which settings there are.
        COMMANDS[command](argv[1:])
    else:
        console.parse(COMMANDS[command], argv[1:], command, None)


if __name__ == "__main__":
    main()
