"""The command `lethe analyze`: one analysis of a model or a run, or all of them on one page."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro.conf import Positional

from lethe import analyses
from lethe.cli import progress_bars
from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.unlearn import with_behaviour
from lethe.system.plugins import catalogue, discover, look_up, name_of, summary


@dataclass(frozen=True, kw_only=True)
class _On:
    """What an analysis is made on."""

    target: Positional[str]
    """A run folder, or `builtin`, a model folder or a hub id."""
    out: Path = Path("analyses")
    """Folder for NAME.json, NAME.svg and NAME.png; of `all` also analyses.html."""
    forget: tuple[str, ...] = ()
    """Forget corpora; of a run, its own."""
    retain: str | None = None
    """Retain corpus; of a run, its own."""
    forget_questions: Path | None = None
    """Questions on what should be forgotten."""
    retain_questions: Path | None = None
    """Questions that should still be answered."""
    scoring: Literal["letter", "cloze"] | None = None
    """letter or cloze."""
    layer: int | None = None
    """Layer l of the edits that are trained."""
    steps: int | None = None
    """Steps of the edits that are trained."""
    lr: float | None = None
    """Learning rate of the edits that are trained."""
    seed: int | None = None
    """First seed."""
    device: str | None = None
    """cpu, cuda, mps or auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights."""


@dataclass(frozen=True, kw_only=True)
class _Analyze:
    """Explain what steering does inside a model: one analysis, or all on one page."""

    on: _On
    as_json: Json = False

    # The one analysis; None for all of them. Of one, a form derives from this that has its settings here. No docstring:
    # a help screen shows the analysis's own.
    analysis: ClassVar[Any] = None

    def __call__(self) -> None:
        """Make the analyses, write them and say what they read."""
        from lethe.analyses.protocol import analyze_all, write
        from lethe.analyses.workbench import open_bench
        from lethe.system.machine import explaining_memory, threads

        on = self.on
        given = {
            key: value for key, value in vars(on).items() if key not in ("target", "out") and value not in (None, ())
        }
        page = "analyses.html"
        with (
            progress_bars.Bars() as progress,
            explaining_memory(f"with {on.target} loaded whole.\nPass --dtype bfloat16."),
        ):
            bench = open_bench(on.target, given, progress)
            with threads(bench.config.base.threads):
                if self.analysis is None:
                    every = {key: kind() for key, kind in discover(analyses).items()}
                    findings, missing = analyze_all(bench, every, on.out)
                else:
                    analysis = with_behaviour(self.analysis)
                    finding = analysis(bench)
                    write(finding, on.out)
                    findings, missing, page = {name_of(type(analysis)): finding}, {}, f"{finding.name}.png"
        if self.as_json:
            readings = {key: finding.reading for key, finding in findings.items()}
            print_json({"readings": readings, "not measured": missing, "out": str(on.out)})
            return
        for finding in findings.values():
            show(f"{finding.title}\n{finding.reading}\n")
        for key, why in missing.items():
            show(f"{key}: not measured: {why}\n")
        show(str(on.out / page))


def analyze(name: str, argv: Sequence[str]) -> tuple[type[_Analyze], Sequence[str]]:
    """Explain what steering does inside a model: one analysis, or all on one page."""
    if name == "all":
        return _Analyze, argv
    kind = look_up(name, analyses, also=["all"])
    members = {"__doc__": kind.__doc__}
    settings = [("analysis", kind, kind())]
    return make_dataclass("Analyze", settings, bases=(_Analyze,), namespace=members, frozen=True, kw_only=True), argv


ANALYZE = Command(
    run=analyze,
    usage="NAME|all MODEL_OR_RUN --out DIR",
    words=lambda: {
        **{name: summary(kind) for name, kind in catalogue(analyses).items()},
        "all": "Every analysis, on one page.",
    },
    examples=(
        "lethe analyze layers builtin --layers 2 7 11 --out runs/analyses",
        "lethe analyze all runs/a --out runs/a-analyses",
    ),
)
