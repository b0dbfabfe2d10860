"""What each `lethe` command does with its arguments, and what it prints."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from lethe.cli import progress_bars, tables
from lethe.data.settings import BUILTIN
from lethe.errors import RunFolderError, UnknownNameError, UsageError
from lethe.methods.protocol import Method, SteeringMethod
from lethe.runs import config_file
from lethe.runs.config import RunConfig
from lethe.runs.defaults import defaults
from lethe.system import plugins

# Paths and corpora's names may hold [brackets] and :colons:, which are no markup.
# Into a file or a pipe, a row of a table is one line.
WIDTH = None if sys.stdout.isatty() else 1000


RESULT = Console(soft_wrap=True, markup=False, emoji=False, highlight=False, width=WIDTH)
"""stdout: the result and nothing else."""


NOTES = Console(soft_wrap=True, markup=False, emoji=False, highlight=False, stderr=True)
"""stderr: progress, warnings, errors."""


Json = Annotated[bool, arg(name="json", help="Print one JSON object instead of a table.")]


def demo(out: Path = Path("runs/demo"), seed: int = 0, as_json: Json = False) -> None:
    """Unlearn two hazard topics from the built-in model with Adaptive RMU, measure, and write a report.

    Args:
        out: Run folder.
        seed: Seed of directions and of the order of rows.
    """
    method, run = defaults(config_file.method_class("adaptive-rmu"), BUILTIN)
    _unlearn(
        method,
        dataclasses.replace(run, out=out, seed=seed),
        f"lethe demo --out {out} --seed {seed}",
        as_json,
    )


def unlearn(argv: list[str]) -> None:
    """Unlearn forget corpora from a model with a method, measure, and write a run folder."""
    if not argv or argv[0] in ("-h", "--help"):
        RESULT.print("usage: lethe unlearn METHOD --model M --forget F [F ...] --retain R --layer L --out DIR\n")
        RESULT.print(f"{unlearn.__doc__}\n\nMETHOD is one of these, or the config.yaml of a run to repeat:")
        RESULT.print(tables.methods())
        RESULT.print("Settings of a method: lethe unlearn METHOD --help")
        examples("unlearn")
        return
    require_method("unlearn", argv)
    method, run = _start(argv)
    rest, is_auto = _without_auto(argv[1:])
    chosen, given, wanted = _parse_unlearn(method, run, rest)
    if is_auto:
        # What the user gave stands; the advice fills in the rest.
        chosen, given, wanted = _parse_unlearn(*_advised(given, method, wanted, run), rest)
    method, run = given, wanted
    provenance: dict[str, Any] = {}
    if chosen.layers_from is not None:
        run, provenance = _searched(run, chosen.layers_from)
    if chosen.dry_run:
        from lethe.runs.estimate import plan

        found = plan(run, reads=method.reads)
        if chosen.as_json:
            print_json({**config_file.plain(method, run), "plan": dataclasses.asdict(found)})
        else:
            RESULT.print(tables.plan(method, run, found))
        return
    _unlearn(method, run, shlex.join(["lethe", "unlearn", *argv]), chosen.as_json, provenance)


def withdraw(run: Positional[Path], request: Positional[str], out: Path, as_json: Json = False) -> None:
    """Take one request out of a ridge run, as if it had never been made, and write the run without it.

    Args:
        run: Run folder made with --solver ridge, on top of other requests.
        request: Name of the request: the run folder that it was made in.
        out: New run folder.
    """
    from lethe.runs.run_folder import RunFolder

    RunFolder(run).require_patch()
    method, config = config_file.read_config(run / "config.yaml")
    changed = config.changed(on=run, withdraw=request, out=out)
    _unlearn(method, changed, shlex.join(["lethe", "withdraw", str(run), request, "--out", str(out)]), as_json)


def check(
    model: Positional[str],
    layer: int = 7,
    train_modules: tuple[str, ...] = (),
    device: str = "auto",
    as_json: Json = False,
) -> None:
    """Prove that replaying the slice of this model equals its own forward, and say what would be trained.

    Args:
        model: `builtin`, a model folder or a hub id.
        layer: Layer l whose output is steered.
        train_modules: Matrices to train; by default the MLP output matrices.
        device: cpu, cuda, mps or auto.
    """
    from lethe.runs.check import check as check_model
    from lethe.system.machine import explaining_memory

    settings = RunConfig.of(model=model, layer=layer, train_modules=train_modules, device=device)
    with explaining_memory(f"with layers 0..{layer}.\nLower --layer."):
        found = check_model(settings)
    if as_json:
        print_json(found)
    else:
        RESULT.print(tables.facts(f"{model}: replaying the slice equals the model's own forward.", found))


def ls(what: Positional[str] = "methods", folder: Positional[Path] = Path("runs"), as_json: Json = False) -> None:
    """List methods, metrics, analyses, or the runs in a folder.

    Args:
        what: methods, metrics, analyses or runs.
        folder: Where runs are looked for.
    """
    lists: dict[str, Callable[[], Any]] = {
        "methods": tables.methods,
        "metrics": tables.metrics,
        "analyses": tables.analyses,
        "runs": lambda: tables.runs(folder),
    }
    if what not in lists:
        raise UnknownNameError(f"there is no list '{what}'.{plugins.nearest(what, lists)} Lists: {', '.join(lists)}.")
    table = lists[what]()
    if as_json:
        print_json({what: tables.as_rows(table)})
    else:
        RESULT.print(table)


def parse(target: Any, argv: list[str], name: str, description: str | None) -> Any:
    """Call `target` with the arguments of a command line, or print its help."""
    try:
        return tyro.cli(
            target,
            args=argv,
            prog=f"lethe {name}",
            description=description,
            config=(OmitArgPrefixes, FlagCreatePairsOff),
        )
    except SystemExit:
        if "-h" in argv or "--help" in argv:
            examples(name.split()[0])
        raise


def examples(*names: str) -> None:
    """Print what one may copy."""
    RESULT.print("\nExamples:")
    for name in names:
        for line in tables.EXAMPLES[name]:
            RESULT.print(f"  {line}")


def require_method(command: str, argv: list[str]) -> None:
    """Raises: UsageError if the arguments begin with a flag."""
    if argv[0].startswith("-"):
        raise UsageError(
            f"the method comes before {argv[0]}: lethe {command} METHOD {argv[0]} ...\nSee `lethe ls methods`."
        )


def _start(argv: list[str]) -> tuple[Method, RunConfig]:
    """The method and run that the flags change: defaults depend on the model and on the solver."""
    from lethe.cli.run_flags import value_of

    solver = value_of("--solver", argv)
    if argv[0].endswith((".yaml", ".yml")):
        method, run = config_file.read_config(Path(argv[0]))
        return method, run.changed(solver=solver) if solver else run
    return defaults(config_file.method_class(argv[0]), value_of("--model", argv) or BUILTIN, solver=solver)


def _parse_unlearn(method: Method, run: RunConfig, argv: list[str]) -> tuple[Any, Method, RunConfig]:
    from lethe.cli.run_flags import parse_run

    return parse_run(
        "unlearn",
        method,
        run,
        argv,
        (
            "layers_from",
            Annotated[
                Path | None,
                arg(help="Result of `lethe layers`: its chosen layers take the place of --layer and --train-layers."),
            ],
            None,
        ),
        ("dry_run", Annotated[bool, arg(help="Print the settings and the plan, and do nothing.")], False),
        ("as_json", Json, False),
    )


def _without_auto(argv: list[str]) -> tuple[list[str], bool]:
    """The arguments without `--layer auto`, and whether it was there."""
    for place, (flag, value) in enumerate(zip(argv, [*argv[1:], ""], strict=True)):
        if flag == "--layer=auto":
            return argv[:place] + argv[place + 1 :], True
        if (flag, value) == ("--layer", "auto"):
            return argv[:place] + argv[place + 2 :], True
    return argv, False


def _advised(given: Method, method: Method, run: RunConfig, start: RunConfig) -> tuple[Method, RunConfig]:
    """Method and run as they start, with the layer, coefficient and alpha that are advised for the given run."""
    from lethe.advice.advise import advise
    from lethe.system.machine import explaining_memory

    if given.reads == "prompts":
        raise UsageError(
            f"--layer auto reads texts, and {config_file.method_name(given)} reads prompts.\nSee `lethe layers`."
        )
    with (
        progress_bars.Bars(NOTES) as progress,
        explaining_memory(f"with {run.base.model} loaded whole.\nPass --layer N."),
    ):
        advice = advise(run, progress)
    NOTES.print(advice.reason)
    assert isinstance(given, SteeringMethod)
    found = {"alpha": advice.chosen.alpha, given.coefficient: getattr(advice.chosen, given.coefficient)}
    return dataclasses.replace(method, **found), dataclasses.replace(start, layer=advice.chosen.layer, train_layers=())


def _searched(run: RunConfig, found: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The run on the layers that a search chose, and the search for the report."""
    from lethe.advice.layer_search import LayerSearch

    search = LayerSearch.load(found)
    changed = run.changed(layer=max(search.chosen), train_layers=tuple(sorted(search.chosen)))
    return changed, {"layer_search": dataclasses.asdict(search)}


def _unlearn(
    method: Method, run: RunConfig, command: str, as_json: bool, provenance: Mapping[str, Any] | None = None
) -> None:
    from lethe.runs.run_folder import RunFolder
    from lethe.runs.unlearn import unlearn

    folder = RunFolder(run.out)
    complete = folder.holds(config_file.plain(method, run)) and folder.is_complete
    if not complete:
        with progress_bars.Bars(NOTES) as progress:
            unlearn(method, run, command=command, progress=progress, provenance=provenance)
    try:
        found = json.loads(folder.report.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder.report} cannot be read.\nDelete {run.out} and run again.") from error
    if complete:
        NOTES.print(f"{run.out} holds this run already, complete.")
    if as_json:
        keys = ("command", "model", "method", "before", "after", "timing", "patch", "warnings")
        print_json({"folder": str(run.out), **{key: found[key] for key in keys}})
    else:
        RESULT.print(tables.before_after(found))
        RESULT.print(f"report: {run.out / 'report.html'}")


def print_json(value: Any) -> None:
    """The result as one JSON object."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
