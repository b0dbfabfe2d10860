"""Reports of finished runs: one self-contained page, its short form in Markdown, and a page that compares runs."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lethe.errors import RunFolderError
from lethe.report import figures, style, words
from lethe.report.noise_recovery import won_back
from lethe.report.record import RunRecord, read_run
from lethe.report.words import outcome
from lethe.system.atomic_files import read_number, saving, write_text

__all__ = ["compare", "outcome", "read_run", "write_report"]


def write_report(run_folder: Path, record: RunRecord | None = None) -> Path:
    """Write `report.html`, which opens offline, and `report.md` into a run folder; the page's path.

    `record` is one that is yet to be written; by default report.json is read. The same record gives the same bytes.
    Raises: RunFolderError if the folder is incomplete or unreadable, SaveError if it cannot be written.
    """
    run = record or read_run(run_folder)
    both = [run.after[name] for name in run.before if name in run.after]
    facts: dict[str, Any] = {
        "run": run,
        "title": f"{run.method['name']} on {run.model}",
        "facts": _facts(run),
        "outcome": outcome(run),
        "rows": words.rows(run),
        "edited": _edited(run),
        "limits": words.LIMITS,
    }
    page = render(
        "report.html.jinja",
        **facts,
        table=_groups([row for row in facts["rows"] if row.is_featured]),
        more=_groups([row for row in facts["rows"] if not row.is_featured]),
        searched=figures.layer_search(run),
        solution=_solution(run),
        floor=next((floor for row in run.history if (floor := row.measures.get("retain_floor", 0.0)) > 0), None),
        sets=words.SETS,
        scores=figures.scores(run),
        has_chance=any(score.chance is not None for score in both),
        training=figures.training(run),
        topics=_topics(run),
        alpha={**run.config, **run.method["fields"]}.get("alpha"),
        by_layer=figures.by_layer(run),
        layer_sets=[
            name
            for name in words.SETS
            if any(score.by_layer for key, score in run.after.items() if key.endswith(f"/{name}"))
        ],
        timing=_timing(run),
        config=_yaml({"method": run.method, "config": run.config}),
        environment=_yaml(run.environment) if run.environment else "",
    )
    write_text(run_folder / "report.md", render("report.md.jinja", **facts))
    return write_text(run_folder / "report.html", page)


def compare(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page with a row per run, and forget against retain as points; its path, `out`.

    Raises: RunFolderError if no folder is given or one is incomplete or unreadable, SaveError if `out` cannot be
    written.
    """
    if not run_folders:
        raise RunFolderError("no run folder to compare was given.\nGive at least one, for example: lethe report runs/*")
    runs = [read_run(folder) for folder in run_folders]
    metric = words.main_metric(runs)
    marks = {method: style.MARKERS[shape] for method, shape in figures.shape_of_methods(runs).items()}
    sets = ("forget", "adjacent", "retain")
    page = render(
        "compare.html.jinja",
        title=f"{len(runs)} runs compared" if len(runs) > 1 else "1 run",
        metric=words.spoken(metric) if metric else "",
        sets=sets,
        rows=[
            {
                "run": run,
                "link": _link(folder, out),
                "mark": marks[run.method["name"]],
                "fields": ", ".join(f"{name} {value}" for name, value in run.method["fields"].items()),
                "cells": [_cell(run, f"{metric}/{name}") for name in sets],
            }
            for folder, run in zip(run_folders, runs, strict=True)
        ],
        scatter=figures.scatter(runs, metric) if metric else None,
        won_back=won_back(run_folders, runs),
        marks=marks,
        has_chance=any(
            score.chance is not None for run in runs for key, score in run.after.items() if key == f"{metric}/forget"
        ),
        limits=words.LIMITS,
    )
    with saving(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return write_text(out, page)


def render(template: str, **facts: Any) -> str:
    """A template of this folder, filled in; what is missing from `facts` is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"tie": _tie, "md": _markdown}
    return environment.get_template(template).render(**facts)


def _tie(text: str) -> str:
    """Keep a number and its unit on one line."""
    for loose in (" %", " ± ", " MB", " GB", " kB"):
        text = text.replace(loose, loose.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _markdown(text: str) -> str:
    """Text of the user's as Markdown that shows it and does nothing else."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _facts(run: RunRecord) -> str:
    kept = ("layer", "solver", "seed") if run.solution else ("layer", "steps", "seed")
    named = {name: run.config[name] for name in kept if run.config.get(name) is not None}
    parts = [f"{name} {value}" for name, value in named.items()]
    parts += [f"{name} {run.environment[name]}" for name in ("lethe", "device") if run.environment.get(name)]
    return " · ".join(parts)


def _edited(run: RunRecord) -> str:
    count = len(run.patch["tensors"])
    where = f" in {words.layers(run.trained_layers)}" if run.trained_layers else ""
    return (
        f"{count} tensor{'' if count == 1 else 's'}{where}: {100 * run.patch['share_of_model']:.2g} % of the model, "
        f"{words.size(run.patch['bytes'])} in {run.patch['file']}."
    )


def _topics(run: RunRecord) -> list[tuple[str, str]]:
    """Each topic with its dash pattern as SVG writes it."""
    dashes = itertools.cycle(style.DASHES)
    return [(topic, " ".join(f"{1.6 * dash:g}" for dash in next(dashes)) or "none") for topic in figures.topics(run)]


def _groups(rows: Sequence[words.Row]) -> list[list[words.Row]]:
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.metric)]


def _solution(run: RunRecord) -> list[tuple[str, list[str]]]:
    """The facts of each matrix's closed form in words: a name, and a value for each matrix."""
    spoken = {
        "lam": "lambda",
        "before": "objective before",
        "objective": "objective after",
        "forget_loss": "forget loss",
        "retain_loss": "retain loss",
        "forget_tokens": "forget tokens",
        "retain_tokens": "retain tokens",
        "tokens": "tokens",
        "accumulate_seconds": "seconds to read the corpora",
        "solve_seconds": "seconds to solve",
    }
    return [
        (text, [f"{read_number(facts[key]):.4g}" for facts in run.solution])
        for key, text in spoken.items()
        if run.solution and all(key in facts for facts in run.solution)
    ]


def _timing(run: RunRecord) -> list[tuple[str, str, str]]:
    spent = {**run.timing}
    if len(spent) > 1:
        spent["in all"] = {
            "seconds": sum(phase["seconds"] for phase in run.timing.values()),
            "peak_mb": max(phase["peak_mb"] for phase in run.timing.values()),
        }
    return [(name, f"{phase['seconds']:,.1f}", words.size(1e6 * phase["peak_mb"])) for name, phase in spent.items()]


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _cell(run: RunRecord, name: str) -> tuple[str, str] | None:
    if name not in run.before or name not in run.after:
        return None
    return words.with_error(run.before[name]), words.with_error(run.after[name])


def _link(folder: Path, out: Path) -> str:
    """The run's own page, as seen from `out`; empty if it has none."""
    page = folder / "report.html"
    return quote(os.path.relpath(page, out.parent).replace(os.sep, "/")) if page.is_file() else ""
