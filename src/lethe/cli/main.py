"""The `lethe` command: finds the command that is asked for, and turns errors into messages and exit codes."""

import contextlib
import functools
import io
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any, Literal, NoReturn

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from lethe.__version__ import __version__
from lethe.cli import analyze, check, compare, data, evaluate, files, layers, listing, sweep, unlearn
from lethe.cli.console import HELP, Command, call, listed, note, print_examples, show, terminal
from lethe.errors import LetheError, UnknownNameError
from lethe.system.plugins import nearest, summary


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 failed, 2 usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quieten_transformers()
    try:
        _dispatch(argv)
    except LetheError as error:
        from rich.text import Text

        terminal(errors=True).print(Text.assemble(("lethe: error:", "bold red"), f" {error}"))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        resume = argv[0] in ("demo", "sweep", "unlearn")
        note("lethe: interrupted." + " The same command goes on from the last checkpoint." * resume)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> None:
    """Print a script that completes commands, names and flags at TAB.

    Args:
        shell: bash, zsh or fish.
    """
    commands = {name: _choice(command) for name, command in COMMANDS.items()}
    config = (OmitArgPrefixes, FlagCreatePairsOff, OmitSubcommandPrefixes)
    with contextlib.redirect_stdout(io.StringIO()) as written:
        try:
            tyro.cli(_one_of(commands), prog="lethe", args=["--tyro-write-completion", shell, "-"], config=config)
        except SystemExit as end:
            if end.code:
                raise
    # Shells take each line of a description for one more thing to offer.
    show(re.sub(r"(?m)^COMPLETION_SPEC = .*$", lambda line: line[0].replace("\\n", " "), written.getvalue()))


def _choice(command: Command) -> Any:
    """What tyro would fill in for a command, whatever its next word."""
    if command.words is None:
        return command.run
    forms = {word: command.run(word, ())[0] for word in command.words()}
    return make_dataclass("Next", [("word", _one_of(forms))])


def _one_of(choices: Mapping[str, Any]) -> Any:
    return functools.reduce(
        operator.or_, (Annotated[Any, subcommand(name, constructor=choice)] for name, choice in choices.items())
    )


COMMANDS: dict[str, Command] = {
    "demo": unlearn.DEMO, "unlearn": unlearn.UNLEARN, "sweep": sweep.SWEEP, "advise": layers.ADVISE,
    "layers": layers.LAYERS, "withdraw": unlearn.WITHDRAW, "eval": evaluate.EVAL, "data": data.DATA,
    "analyze": analyze.ANALYZE, "check": check.CHECK, "ls": listing.LS, "report": files.REPORT,
    "compare": compare.COMPARE, "export": files.EXPORT, "apply": files.APPLY, "revert": files.REVERT,
    "diff": files.DIFF,
    "completion": Command(run=completion, examples=("lethe completion bash > ~/.bash_completion.d/lethe",)),
}  # fmt: skip


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in (*HELP, "help"):
        show("lethe COMMAND ...: remove chosen knowledge from a language model, and measure what is left.\n")
        show(listed({name: summary(command.run) for name, command in COMMANDS.items()}))
        print_examples(*COMMANDS.values())
        return
    if argv[0] == "--version":
        show(__version__)
        return
    name, *rest = argv
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS, cutoff=0.4)
        raise UnknownNameError(f"there is no command '{name}'.{hint}\nCommands: {', '.join(COMMANDS)}.")
    call(COMMANDS[name], name, rest)


def _quieten_transformers() -> None:
    """Keep its notes and bars off stderr, without importing it for a command that does not."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


if __name__ == "__main__":
    main()
