"""The commands `lethe unlearn`, `lethe demo` and `lethe withdraw`: one run, from its flags to its scores."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from tyro.conf import Positional, arg

from lethe import methods, solvers
from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, note, parse, print_json, show, taken
from lethe.cli.tables import Table, by_metric, chance, short
from lethe.data.settings import BUILTIN
from lethe.errors import UsageError
from lethe.runs.config import SECTIONS, RunConfig, RunSettings
from lethe.runs.defaults import defaults
from lethe.system.plugins import catalogue, load, look_up, name_of, real, summary

if TYPE_CHECKING:
    import lethe.report.record
    import lethe.runs.estimate


class RunFlags:
    """The settings of a run as flags: those of its sections and of its solver, each by its own name."""

    @property
    def run(self) -> RunConfig:
        """The config that the flags make.

        Raises: InvalidValueError for a setting outside its range.
        """
        flags: Any = self
        sections = {name: getattr(flags, name) for name in SECTIONS}
        return RunConfig(**sections, solver=with_behaviour(flags.of_solver), **vars(flags.settings))


@dataclass(frozen=True, kw_only=True)
class Unlearn(RunFlags):
    """The flags of `lethe unlearn`; for each method a form derives from them, which knows the method's settings."""

    method: Any
    layers_from: Annotated[
        Path | None,
        arg(help="Result of `lethe layers`: its chosen layers take the place of --layer and --train-layers."),
    ] = None
    dry_run: Annotated[bool, arg(help="Print the settings and the plan, and do nothing.")] = False
    print_config: Annotated[bool, arg(help="Print the config.yaml that the run would have, and do nothing.")] = False
    as_json: Json = False

    line: ClassVar[str] = ""
    """The command as it was typed."""

    def __call__(self) -> None:
        """Do what the flags say."""
        from lethe.runs import config_file

        method, run, provenance = with_behaviour(self.method), self.run, {}
        if self.layers_from is not None:
            run, provenance = _searched(run, self.layers_from)
        plain = config_file.plain(method, run)
        if self.print_config:
            import yaml

            sys.stdout.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        elif self.dry_run:
            from lethe.runs.estimate import plan

            estimate = plan(run, reads=method.reads)
            if self.as_json:
                print_json({**plain, "plan": dataclasses.asdict(estimate)})
            else:
                settings = {"name": config_file.method_name(method), **vars(method), **config_file.flat(run)}
                show(plan_table(settings, estimate, steps=not run.solver.is_one_matrix))
        else:
            _run(method, run, self.line, self.as_json, provenance)


def unlearn(method: str, argv: Sequence[str]) -> tuple[type[Unlearn], list[str]]:
    """Unlearn forget corpora from a model with a method, measure, and write a run folder."""
    line = shlex.join(["lethe", "unlearn", method, *argv])
    own, run, argv = starting_point("unlearn", method, argv)
    layer, others = taken("--layer", argv)
    if layer != "auto":
        return form(Unlearn, own, run, line), argv

    def go_on_with_advice(given: Unlearn) -> None:
        # What the user gave stands; the advice fills in the rest.
        found, layer = _advised(given.method, given.run)
        start = run.changed(layer=layer, train_layers=())
        parse(form(Unlearn, dataclasses.replace(own, **found), start, line), others, f"unlearn {method}", UNLEARN)

    return form(Unlearn, own, run, line, __call__=go_on_with_advice), others


UNLEARN = Command(
    run=unlearn,
    usage="METHOD --model M --forget F [F ...] --retain R --layer L --out DIR",
    words=lambda: {name: summary(kind) for name, kind in catalogue(methods).items()},
    about="METHOD is one of these, path/to/file.py:Class, or the config.yaml of a run to repeat; "
    "its settings: lethe unlearn METHOD --help",
    examples=(
        "lethe unlearn adaptive-rmu --model builtin --layer 5 --beta 2 --out runs/a",
        "lethe unlearn rmu --model HuggingFaceH4/zephyr-7b-beta --forget cyber.jsonl --retain wiki.txt --out runs/b",
        "lethe unlearn rmu --model ./my-model --forget a.jsonl --retain r.txt --layer 7 --dry-run",
        "lethe unlearn rmu --model ./my-model --data ./my-data --out runs/my",
        "lethe unlearn lunar --model ./my-chat --forget questions.jsonl --retain others.jsonl --layer 20 --out runs/c",
        "lethe unlearn rmu --model builtin --nu 10 --out runs/d",
        "lethe unlearn rmu --model builtin --layer auto --out runs/e",
        "lethe unlearn my_method.py:Shrink --model builtin --out runs/f",
        "lethe unlearn runs/a/config.yaml --seed 1 --out runs/a1",
        "lethe unlearn runs/a/config.yaml --print-config",
    ),
)


def demo(out: Path = Path("runs/demo"), seed: int = 0, as_json: Json = False) -> None:
    """Unlearn two hazard topics from the built-in model with Adaptive RMU, measure, and write a report.

    Args:
        out: Run folder.
        seed: Seed of directions and of the order of rows.
    """
    method, run = defaults(load("adaptive-rmu", methods), BUILTIN)
    line = f"lethe demo --out {out} --seed {seed}"
    _run(method, dataclasses.replace(run, out=out, seed=seed), line, as_json)


DEMO = Command(run=demo, examples=("lethe demo",))


def withdraw(run: Positional[Path], request: Positional[str], out: Path, as_json: Json = False) -> None:
    """Take one request out of a ridge run, as if it had never been made, and write the run without it.

    Args:
        run: Run folder made with --solver ridge, on top of other requests.
        request: Name of the request: the run folder that it was made in.
        out: New run folder.
    """
    from lethe.runs.config_file import read_config
    from lethe.runs.run_folder import RunFolder

    RunFolder(run).require_patch()
    method, config = read_config(run / "config.yaml")
    changed = config.changed(on=run, withdraw=request, out=out)
    _run(method, changed, shlex.join(["lethe", "withdraw", str(run), request, "--out", str(out)]), as_json)


WITHDRAW = Command(run=withdraw, examples=("lethe withdraw runs/b a --out runs/b-without-a",))


def starting_point(command: str, method: str, argv: Sequence[str]) -> tuple[Any, RunConfig, list[str]]:
    """A method (or its stand-in) and a run as they are before any flag, and the arguments that are flags of these.

    `method` is a name, `path/to/file.py:Class` or the config.yaml of a run.

    Raises: UsageError if a flag stands where the method should; UnknownNameError; RunFolderError.
    """
    if method.startswith("-"):
        raise UsageError(
            f"the method comes before {method}: lethe {command} METHOD {method} ...\nSee `lethe ls methods`."
        )
    if method.endswith((".yaml", ".yml")):
        from lethe.runs.config_file import read_config

        name, argv = taken("--method", argv)
        own, run = read_config(Path(method), kind=None if name is None else load(name, methods))
        solver, _ = taken("--solver", argv)
        return own, run if solver is None else run.changed(solver=solver), argv
    (model, _), (solver, _) = taken("--model", argv), taken("--solver", argv)
    return *defaults(look_up(method, methods), model or BUILTIN, solver=solver, find=look_up), list(argv)


def with_behaviour(method: Any) -> Any:
    """The method that a stand-in stands for, with its settings; any other method is its own.

    Raises: InvalidValueError for a setting outside its range.
    """
    return real(type(method))(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})


def form(base: type, method: Any, run: RunConfig, line: str, **members: Any) -> type:
    """The flags of `base` with the settings of a method and a run, which start from these.

    Raises: UsageError if a setting of the method is called like another flag.
    """
    taken_names = {name for field in dataclasses.fields(base) if field.name != "method" for name in _flags(field)}
    for field in dataclasses.fields(method):
        if field.name in taken_names:
            raise UsageError(
                f"the setting '{field.name}' of {name_of(type(method))} is called like another flag of this command.\n"
                "Give it another name."
            )
    solver = Annotated[
        str, arg(help=f"{', '.join(catalogue(solvers))}: how the weights are found; each has its flags.")
    ]
    own = {field.name: getattr(run, field.name) for field in dataclasses.fields(RunSettings)}
    settings = [
        ("method", type(method), method),
        *((name, type(getattr(run, name)), getattr(run, name)) for name in SECTIONS),
        ("solver", solver, run.solver_name),
        ("of_solver", type(run.solver), run.solver),
        ("settings", RunSettings, RunSettings(**own)),
    ]
    told = f"{type(method).__doc__}\n\nSource: {method.source}"
    space = {**members, "__doc__": told, "line": line}
    return dataclasses.make_dataclass(
        base.__name__, settings, bases=(base,), namespace=space, frozen=True, kw_only=True
    )


def _flags(field: dataclasses.Field[Any]) -> list[str]:
    if not dataclasses.is_dataclass(field.type):
        return [field.name]
    return [name for inner in dataclasses.fields(field.type) for name in _flags(inner)]


def _advised(method: Any, run: RunConfig) -> tuple[dict[str, float], int]:
    """The method's settings and the layer that are advised for a run."""
    from lethe.advice.advise import advise
    from lethe.system.machine import explaining_memory

    if method.reads == "prompts":
        raise UsageError(f"--layer auto reads texts, and {name_of(type(method))} reads prompts.\nSee `lethe layers`.")
    with progress_bars.Bars() as progress, explaining_memory(f"with {run.base.model} loaded whole.\nPass --layer N."):
        advice = advise(run, progress)
    note(advice.reason)
    chosen = advice.chosen
    return {"alpha": chosen.alpha, method.coefficient: getattr(chosen, method.coefficient)}, chosen.layer


def _searched(run: RunConfig, found: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The run on the layers that a search chose, and the search for its record."""
    from lethe.advice.layer_search import LayerSearch

    search = LayerSearch.load(found)
    changed = run.changed(layer=max(search.chosen), train_layers=tuple(sorted(search.chosen)))
    return changed, {"layer_search": dataclasses.asdict(search)}


def _run(method: Any, run: RunConfig, line: str, as_json: bool, provenance: Mapping[str, Any] | None = None) -> None:
    """Make the run, unless its folder holds it, and show its scores."""
    from lethe.report.record import read_run
    from lethe.runs import config_file
    from lethe.runs.run_folder import RunFolder
    from lethe.runs.unlearn import unlearn

    folder = RunFolder(run.out)
    complete = folder.holds(config_file.plain(method, run)) and folder.is_complete
    if not complete:
        with progress_bars.Bars() as progress:
            unlearn(method, run, command=line, progress=progress, provenance=provenance)
    record = read_run(run.out)
    if complete:
        note(f"{run.out} holds this run already, complete.")
    if as_json:
        keys = ("command", "model", "method", "before", "after", "timing", "patch", "warnings")
        content = record.to_json()
        print_json({"folder": str(run.out), **{key: content[key] for key in keys}})
    else:
        show(before_after(record))
        show(f"report: {run.out / 'report.html'}")


def before_after(run: "lethe.report.record.RunRecord") -> Table:
    """Scores before and after, one row a metric and set."""
    from lethe.report.words import FEATURED, metric_and_set, with_error

    title = f"{run.method['name']} on {run.model}, layer {run.config['layer']}"
    table = Table(title, ("metric", "set", "before", "after", "n", "chance"), ("before", "after", "n", "chance"))
    for name, after in by_metric(run.after).items():
        metric, data = metric_and_set(name)
        if metric in FEATURED:
            table.add(metric, data, with_error(run.before[name]), with_error(after), str(after.n), chance(after))
    more = len({metric_and_set(name)[0] for name in run.after} - set(FEATURED))
    table.caption = f"{more} more metrics stand in the report." if more else ""
    if not run.after:
        table.caption = "Not measured (--evaluate none)."
    return table


def plan_table(settings: Mapping[str, Any], plan: "lethe.runs.estimate.Plan", *, steps: bool) -> Table:
    """The resolved settings and the plan of a run."""
    table = Table("plan (nothing was run)", ("what", "value"))
    for key, value in settings.items():
        table.add(key, short(value))
    table.add()
    table.add("layers loaded for training", f"{plan.layers} of {plan.of}")
    for name, shape in plan.matrices.items():
        table.add("trained", f"{name} {' x '.join(map(str, shape))}")
    table.add("weights loaded for training", f"{plan.weights_gb:.2g} GB")
    table.add(
        "copies, gradients, optimizer" if steps else "sums of the corpora",
        f"{plan.training_gb:.2g} GB, and activations",
    )
    if plan.whole_model_first:
        table.add("before it", "the whole model once, to ask the reference prompts")
    table.add("weights loaded for evaluation", f"{plan.evaluation_gb:.2g} GB, after training")
    table.add("patch", f"{plan.patch_gb:.2g} GB")
    table.add("a step" if steps else "the solve", f"{plan.step_flops / 1e9:.3g} GFLOP")
    table.add("training, estimated", f"{plan.seconds:.3g} s at this machine's rate of matrix products")
    return table
