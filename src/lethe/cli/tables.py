"""What a terminal shows: results as tables, examples, progress bars. Nothing here writes to stdout."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table
from rich.text import Text

from lethe import analyses as analyses_folder
from lethe import methods as methods_folder
from lethe import metrics as metrics_folder
from lethe.advice.advise import Advice
from lethe.advice.layer_search import LayerSearch
from lethe.errors import RunFolderError
from lethe.methods.protocol import Method
from lethe.model.diff import TensorDiff
from lethe.report.record import read_run
from lethe.report.record import scores as as_scores
from lethe.report.words import FEATURED, metric_and_set, metric_names, with_error
from lethe.runs import config_file
from lethe.runs.config import RunConfig
from lethe.runs.estimate import Plan
from lethe.system.plugins import discover
from lethe.types import Scores

EXAMPLES: dict[str, list[str]] = {
    "demo": ["lethe demo"],
    "unlearn": [
        "lethe unlearn adaptive-rmu --model builtin --layer 5 --beta 2 --out runs/a",
        "lethe unlearn rmu --model HuggingFaceH4/zephyr-7b-beta --forget cyber.jsonl --retain wiki.txt --out runs/b",
        "lethe unlearn rmu --model ./my-model --forget a.jsonl --retain r.txt --layer 7 --dry-run",
        "lethe unlearn rmu --model ./my-model --data ./my-data --out runs/my",
        "lethe unlearn lunar --model ./my-chat --forget questions.jsonl --retain others.jsonl --layer 20 --out runs/c",
        "lethe unlearn rmu --model builtin --nu 10 --out runs/d",
        "lethe unlearn rmu --model builtin --layer auto --out runs/e",
        "lethe unlearn runs/a/config.yaml --seed 1 --out runs/a1",
    ],
    "sweep": [
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=2,3,5 --seeds 0 1 2 --out runs/sweep",
        "lethe sweep rmu --model ./my-model --forget a.jsonl --retain r.txt --grid layer=7,11 steering_coeff=20,50",
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=1,2,3,5,8,10 --halving --out runs/halved",
        "lethe sweep adaptive-rmu --grid layer=3..9 beta=1..10 --engine optuna --trials 40 --out runs/searched",
        "lethe sweep adaptive-rmu --grid layer=3,5,7 beta=2,3,5 --engine ray --workers 2 --out runs/on-ray",
    ],
    "advise": ["lethe advise builtin", "lethe advise ./my-model --forget a.jsonl --retain r.txt --out advice.json"],
    "layers": ["lethe layers builtin", "lethe layers ./my-model --forget q.jsonl --retain r.jsonl --out layers.json"],
    "withdraw": ["lethe withdraw runs/b a --out runs/b-without-a"],
    "eval": [
        "lethe eval builtin --split dev",
        "lethe eval runs/a",
        "lethe eval ./my-model --retain-questions mine.jsonl",
        "lethe eval runs/a --exam ./mmlu --shots 5 --shuffle 0 --out mmlu.json",
        "lethe eval runs/a --harness wmdp,mmlu --batch-size 16",
        "lethe eval runs/a --suite tofu:forget05 --data ./tofu --retain-only ./retain95",
    ],
    "data": [
        "lethe data check ./my-data --model ./my-model",
        "lethe data check --forget a.jsonl b.jsonl --retain wiki.txt",
        "lethe data rank ./my-data --model ./my-model --layer 7 --out rows.csv",
    ],
    "analyze": [
        "lethe analyze layers builtin --layers 2 7 11 --out runs/analyses",
        "lethe analyze all runs/a --out runs/a-analyses",
    ],
    "check": ["lethe check builtin --layer 5", "lethe check ./my-model --layer 7"],
    "ls": ["lethe ls methods", "lethe ls runs"],
    "report": ["lethe report runs/a", "lethe report runs/a runs/b --out runs/compare.html"],
    "compare": [
        "lethe compare runs/a runs/b --out runs/a-b",
        "lethe compare runs/a --metrics all",
        "lethe compare base.json runs/seed0 runs/seed1 runs/seed2",
    ],
    "export": ["lethe export runs/a --to ./edited-model"],
    "apply": ["lethe apply runs/a/patch.safetensors ./my-model --to ./edited-model"],
    "revert": ["lethe revert ./edited-model --to ./my-model-again"],
    "diff": ["lethe diff ./my-model ./edited-model"],
}
"""What one may copy, by command."""


def before_after(report: Mapping[str, Any]) -> Table:
    """Scores before and after, one row a metric and set."""
    method = report["method"]
    title = f"{method['name']} on {report['model']}, layer {report['config']['layer']}"
    table = _table(title, "metric", "set", "before", "after", "n", "chance")
    before = as_scores(report["before"])
    for name, after in _by_metric(as_scores(report["after"])).items():
        metric, data = metric_and_set(name)
        if metric in FEATURED:
            table.add_row(metric, data, with_error(before[name]), with_error(after), str(after.n), _chance(after))
    measured = {metric_and_set(name)[0] for name in report["after"]}
    more = len(measured - set(FEATURED))
    table.caption = f"{more} more metrics stand in the report." if more else None
    if not measured:
        table.caption = "Not measured (--evaluate none)."
    return table


def scores(found: Mapping[str, Scores]) -> Table:
    """Scores of one model."""
    table = _table("", "metric", "set", "value", "n", "chance")
    for name, score in _by_metric(found).items():
        metric, data = metric_and_set(name)
        table.add_row(metric, data, with_error(score), str(score.n), _chance(score))
    return table


def plan(method: Method, run: RunConfig, found: Plan) -> Table:
    """The resolved settings and the plan of a run."""
    table = _table("plan (nothing was run)", "what", "value")
    for key, value in {"name": config_file.method_name(method), **vars(method), **config_file.flat(run)}.items():
        table.add_row(key, Text(_short(value)))
    table.add_section()
    table.add_row("layers loaded for training", f"{found.layers} of {found.of}")
    for name, shape in found.matrices.items():
        table.add_row("trained", Text(f"{name} {' x '.join(map(str, shape))}"))
    table.add_row("weights loaded for training", f"{found.weights_gb:.2g} GB")
    closed = run.solver.is_one_matrix
    table.add_row(
        "sums of the corpora" if closed else "copies, gradients, optimizer",
        f"{found.training_gb:.2g} GB, and activations",
    )
    if found.whole_model_first:
        table.add_row("before it", "the whole model once, to ask the reference prompts")
    table.add_row("weights loaded for evaluation", f"{found.evaluation_gb:.2g} GB, after training")
    table.add_row("patch", f"{found.patch_gb:.2g} GB")
    table.add_row("the solve" if closed else "a step", f"{found.step_flops / 1e9:.3g} GFLOP")
    table.add_row("training, estimated", f"{found.seconds:.3g} s at this machine's rate of matrix products")
    return table


def methods() -> Table:
    """Every discovered method."""
    return _discovered(methods_folder, "method", "what it does")


def metrics() -> Table:
    """Every discovered metric, as reports call it."""
    table = _table("", "metric", "what it measures", "higher means", "unit", "chance level", "needs", "source")
    for name, kind in discover(metrics_folder).items():
        found: Any = kind
        means = "" if found.higher_means == "neither" else f"{found.higher_means} knowledge"
        about = (_first_line(kind), means, found.unit, found.chance, found.needs, found.source)
        table.add_row(name.replace("-", "_"), *about)
    return table


def analyses() -> Table:
    """Every discovered analysis."""
    return _discovered(analyses_folder, "analysis", "what it shows")


def runs(folder: Path) -> Table:
    """Complete runs directly inside a folder."""
    table = _table("", "run", "method", "model", "layer", "forget", "retain")
    for path in sorted(folder.glob("*/report.json")):
        try:
            run = read_run(path.parent)
        except RunFolderError:
            table.add_row(str(path.parent), "unreadable report.json")
            continue
        after = run.to_json()["after"]
        cells = [run.method["name"], run.model, str(run.config.get("layer"))]
        for data in ("forget", "retain"):
            name = next((f"{m}/{data}" for m in ("multiple_choice", "perplexity") if f"{m}/{data}" in after), None)
            cells.append(with_error(as_scores(after)[name]) if name else "not measured")
        table.add_row(str(path.parent), *cells)
    if not table.rows:
        table.caption = f"No complete run in {folder}."
    return table


def advice(found: Advice) -> Table:
    """What was read at each layer, and which one is proposed."""
    columns = ("layer", "norm", "growth", "reach", "passed on", "separability", "chosen")
    table = _table(f"{found.model}: {found.tokens} tokens read in {found.seconds:.0f} s", *columns)
    for row in found.layers:
        table.add_row(
            str(row.layer),
            f"{row.median_norm:.3g}",
            f"{row.growth:.2f}",
            f"{100 * row.reach:.0f} %",
            f"{row.passed_on:.2f}",
            "" if row.separability is None else f"{row.separability:.2f}",
            "chosen" if row.layer == found.chosen.layer else "",
        )
    return table


def layer_search(found: LayerSearch) -> Table:
    """Scores of each layer."""
    columns = ("layer", "refused", "wanted (s1)", "unwanted (s2)", "s1 - s2", "direction", "chosen")
    table = _table(f"steered by {found.coefficient:g} times the direction at the last prompt token", *columns)
    for row in found.layers:
        table.add_row(
            str(row.layer),
            f"{100 * row.refusal_rate:.0f} %",
            f"{row.wanted:.3f}",
            f"{row.unwanted:.3f}",
            f"{row.wanted - row.unwanted:+.3f}",
            f"{row.length:.3g}",
            str(found.chosen.index(row.layer) + 1) if row.layer in found.chosen else "",
        )
    return table


def differences(rows: Sequence[TensorDiff]) -> Table:
    """How two checkpoints differ."""
    table = _table("", "tensor", "layer", "kind", "relative norm", "effective rank", "shape")
    for row in rows:
        table.add_row(
            row.name,
            "" if row.layer is None else str(row.layer),
            row.kind,
            "" if row.relative_norm is None else f"{row.relative_norm:.3g}",
            "" if row.effective_rank is None else f"{row.effective_rank:.1f}",
            " x ".join(map(str, row.shape)),
        )
    if not rows:
        table.caption = "No tensor differs."
    return table


def facts(title: str, found: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = _table(title, "what", "value")
    for name, value in found.items():
        lines = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, entry in lines:
            table.add_row(name, Text(f"{key} {_short(entry)}".strip()))
    return table


def commands(found: Mapping[str, object]) -> Table:
    """The commands and what they do."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, run in found.items():
        table.add_row(f"  {name}", _first_line(run))
    return table


def as_rows(table: Table) -> list[dict[str, str]]:
    """The cells of a table, for JSON."""
    names = [str(column.header).replace(" ", "_") for column in table.columns]
    columns = [list(column.cells) for column in table.columns]
    return [dict(zip(names, map(str, row), strict=True)) for row in zip(*columns, strict=True)]


def _discovered(folder: ModuleType, noun: str, what: str) -> Table:
    table = _table("", noun, what, "source")
    for name, kind in discover(folder).items():
        table.add_row(name, _first_line(kind), kind.source)  # type: ignore[attr-defined]
    return table


def table_of(columns: Sequence[str], numeric: Collection[str], *, title: str = "") -> Table:
    """A table without rows; the columns of numbers are set to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return table


def _table(title: str, *columns: str) -> Table:
    numeric = ("before", "after", "value", "n", "chance", "layer", "relative norm", "effective rank")
    return table_of(columns, () if columns == ("what", "value") else numeric, title=title)


def _by_metric(found: Mapping[str, Any]) -> dict[str, Any]:
    order = {metric: i for i, metric in enumerate(metric_names(found))}
    return dict(sorted(found.items(), key=lambda item: order[metric_and_set(item[0])[0]]))


def _chance(score: Scores) -> str:
    return "" if score.chance is None else f"{100 * score.chance:.0f} %"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "default"
    return "default" if value is None else str(value)


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]
