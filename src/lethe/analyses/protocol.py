"""What an analysis is, and how its finding is written: numbers, figure, reading, and one page of all."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from matplotlib.figure import Figure

from lethe.__version__ import __version__
from lethe.analyses.workbench import Bench
from lethe.errors import LetheError
from lethe.report import standalone_figures as page
from lethe.system.atomic_files import saving, write_json


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What an analysis found: its numbers, a figure of them, and what they say in plain words."""

    name: str
    title: str
    reading: str
    """One paragraph, made from the numbers."""
    data: dict[str, Any] = field(repr=False)
    """JSON; holds no text of a corpus or question."""
    figure: Figure = field(repr=False)


@runtime_checkable
class Analysis(Protocol):
    """A frozen dataclass with its settings as fields, which finds out one thing on a bench."""

    source: ClassVar[str]

    def __call__(self, bench: Bench) -> Finding:
        """Raises: UsageError, saying what is missing, if the bench lacks what it needs."""
        ...


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, its standard error (0 for one value) and the number of values."""
    n = len(values)
    return {
        "mean": math.fsum(values) / n,
        "stderr": statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0,
        "n": n,
    }


def write(finding: Finding, out: Path) -> tuple[Path, ...]:
    """Write NAME.json, NAME.svg and NAME.png into the folder `out`; their paths.

    Raises: SaveError.
    """
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    content = {"name": finding.name, "title": finding.title, "reading": finding.reading, "data": finding.data}
    return (
        write_json(out / f"{finding.name}.json", content),
        *page.write_figure(finding.figure, out, finding.name),
    )


def analyze_all(bench: Bench, known: Mapping[str, Analysis], out: Path) -> tuple[dict[str, Finding], dict[str, str]]:
    """Every analysis, each written into `out`, and all on one page, `out/analyses.html`.

    Returns the findings, and why each of the others was not measured, by name.

    Raises: SaveError.
    """
    findings: dict[str, Finding] = {}
    missing: dict[str, str] = {}
    for name, analysis in known.items():
        try:
            findings[name] = analysis(bench)
        except LetheError as error:
            missing[name] = str(error)
            continue
        write(findings[name], out)
    with saving(out):
        out.mkdir(parents=True, exist_ok=True)
    page.write_page(
        out / "analyses.html",
        title=f"Analyses of {bench.config.base.model}",
        facts=_facts(bench),
        drawings=[(f.name, f.title, f.reading, f.figure) for f in findings.values()],
        missing=missing,
    )
    return findings, missing


def _facts(bench: Bench) -> str:
    config = bench.config
    parts = [f"layer {config.layer} of {bench.depth}", f"{bench.solver.steps} steps", f"seed {config.seed}"]
    return " · ".join([*parts, f"lethe {__version__}", str(bench.device)])
