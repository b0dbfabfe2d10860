"""How tables of several commands look."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lethe.types


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


def chance(score: "lethe.types.Scores") -> str:
    """What a guess would score, where there is such a level."""
    return "" if score.chance is None else f"{100 * score.chance:.0f} %"


def short(value: Any) -> str:
    """A setting."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "default"
    return "default" if value is None else str(value)
