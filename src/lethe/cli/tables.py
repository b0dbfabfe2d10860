"""How tables of several commands look, and how a score stands in one."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

PERCENT = (
    "multiple_choice",
    "exact_match",
    "answer_confidence",
    "rouge1_recall",
    "rouge_l_recall",
    "refusal_rate",
    "trigger",
    "trigger_control",
    "answer_probability",
    "entailment",
    "knowmem",
    "model_utility",
    "top_one_agreement",
    "verbmem",
    "exam_accuracy",
    "exam_accuracy_shuffled",
    "exam_shuffle_drop",
    "harness_acc",
    "harness_acc_norm",
)
"""Metrics that are shares, shown in per cent."""


def empty_table(title: str, *columns: str) -> Table:
    """A table without rows; numbers stand at the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in ("before", "after", "value", "n", "chance", "layer", "relative norm", "effective rank")
        right = numeric and columns != ("what", "value")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def as_rows(table: Table) -> list[dict[str, str]]:
    """The cells of a table, for JSON."""
    names = [str(column.header).replace(" ", "_") for column in table.columns]
    columns = [list(column.cells) for column in table.columns]
    return [dict(zip(names, map(str, row), strict=True)) for row in zip(*columns, strict=True)]


def by_metric(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by `metric/set`, in the order of reports."""
    from lethe.report.words import metric_and_set, metric_names

    order = {metric: i for i, metric in enumerate(metric_names(scores))}
    return dict(sorted(scores.items(), key=lambda item: order[metric_and_set(item[0])[0]]))


def score(metric: str, summary: Mapping[str, Any]) -> str:
    """A score with its standard error."""
    if metric in PERCENT:
        return f"{100 * summary['value']:.1f} ± {100 * summary['stderr']:.1f} %"
    return f"{summary['value']:.4g} ± {summary['stderr']:.2g}"


def chance(summary: Mapping[str, Any]) -> str:
    """What a guess would score, where there is such a level."""
    return f"{100 * summary['chance']:.0f} %" if "chance" in summary else ""


def short(value: Any) -> str:
    """A setting."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "default"
    return "default" if value is None else str(value)
