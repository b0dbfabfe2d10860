"""The command `lethe compare`: one table and one figure of several runs, with what noise could have done."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lethe.cli.console import Command, Json, print_json, show


def compare(
    runs: Positional[tuple[Path, ...]],
    against: Literal["first", "before"] = "first",
    metrics: tuple[str, ...] = (),
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Compare runs score by score: each difference with its interval, and whether it is within noise.

    Runs that differ in nothing but the seed are one column, with the spread between seeds. One run alone is compared
    with its model before the edit.

    Args:
        runs: Run folders, or files of `lethe eval --out`; the others are compared with the first.
        against: Compare with the first, or with the model before its edit.
        metrics: Metrics of the table, or all; by default those that reports feature, and exams.
        out: Folder for compare.json and the figure, compare.svg and compare.png.
    """
    from lethe.cli.compare_table import table, write
    from lethe.evaluation.compare import as_dict
    from lethe.evaluation.compare import compare as compare_measured
    from lethe.evaluation.results import read

    found = compare_measured([read(path) for path in runs], against=against, metrics=metrics)
    if out is not None:
        write(found, out)
    if as_json:
        print_json(as_dict(found))
        return
    show(table(found))
    for note in found.notes:
        show(note)
    if out is not None:
        show(f"figure: {out / 'compare.png'}")


COMPARE = Command(
    run=compare,
    examples=(
        "lethe compare runs/a runs/b --out runs/a-b",
        "lethe compare runs/a --metrics all",
        "lethe compare base.json runs/seed0 runs/seed1 runs/seed2",
    ),
)
