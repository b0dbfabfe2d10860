"""How tables of several commands look, and how a score stands in one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Table:
    """Rows of cells under named columns; `console.show` draws it."""

    title: str
    columns: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    """Columns that stand at the right."""
    caption: str = ""
    has_header: bool = True
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One row more; cells that are left out are empty."""
        self.rows.append((*cells, *[""] * (len(self.columns) - len(cells))))

    def as_rows(self) -> list[dict[str, str]]:
        """The cells by column, for JSON."""
        names = [name.replace(" ", "_") for name in self.columns]
        return [dict(zip(names, row, strict=True)) for row in self.rows]


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
