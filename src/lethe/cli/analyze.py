"""The command `lethe analyze`: one analysis of a model or a run, or all of them on one page."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from lethe import analyses
from lethe.analyses.protocol import analyze_all, write
from lethe.analyses.workbench import open_bench
from lethe.cli import progress_bars, tables
from lethe.cli.console import NOTES, RESULT, Json, examples, parse, print_json
from lethe.errors import UnknownNameError
from lethe.system import plugins as configs
from lethe.system.machine import explaining_memory, threads
from lethe.system.plugins import discover


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def analyze(argv: list[str]) -> None:
    """Explain what steering does inside a model: one analysis, or all on one page."""
    known = discover(analyses)
    if not argv or argv[0] in ("-h", "--help"):
        RESULT.print("usage: lethe analyze NAME|all MODEL_OR_RUN --out DIR\n")
        RESULT.print(tables.analyses())
        examples("analyze")
        return
    name, kinds = argv[0].replace("_", "-"), {**known, "all": None}
    if name not in kinds:
        hint = configs.nearest(name, kinds)
        raise UnknownNameError(f"there is no analysis '{argv[0]}'.{hint}\nAnalyses: {', '.join(kinds)}.")
    fields: list[Any] = [("on", _On), ("as_json", Json, False)]
    if name != "all":
        fields.insert(1, ("analysis", known[name], known[name]()))
    chosen = parse(
        dataclasses.make_dataclass("Analyze", fields, frozen=True, kw_only=True),
        argv[1:],
        f"analyze {name}",
        (known[name].__doc__ if name != "all" else analyze.__doc__) or "",
    )
    on: _On = chosen.on
    given = {key: value for key, value in vars(on).items() if key not in ("target", "out") and value not in (None, ())}
    with (
        progress_bars.Bars(NOTES) as progress,
        explaining_memory(f"with {on.target} loaded whole.\nPass --dtype bfloat16."),
    ):
        bench = open_bench(on.target, given, progress)
        with threads(bench.config.base.threads):
            if name == "all":
                findings, missing = analyze_all(bench, {key: kind() for key, kind in known.items()}, on.out)
            else:
                findings, missing = {name: chosen.analysis(bench)}, {}
                write(findings[name], on.out)
    if chosen.as_json:
        readings = {key: finding.reading for key, finding in findings.items()}
        print_json({"readings": readings, "not measured": missing, "out": str(on.out)})
        return
    for finding in findings.values():
        RESULT.print(f"{finding.title}\n{finding.reading}\n")
    for key, why in missing.items():
        RESULT.print(f"{key}: not measured: {why}\n")
    RESULT.print(str(on.out / ("analyses.html" if name == "all" else f"{name}.png")))
