"""Successive halving: all settings for few steps, and the best of them for more, until a few are trained to the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lethe.errors import UsageError
from lethe.runs import inputs
from lethe.sweeps import outcomes
from lethe.sweeps.grid import Cell
from lethe.sweeps.outcomes import Outcomes
from lethe.sweeps.spec import Sweep

ETA = 3
"""One of so many settings goes on, for so many times as many steps. Source: Jamieson and Talwalkar 2016, arXiv
1502.07943; 3 as Li et al. 2018, arXiv 1603.06560, take it."""


LAST = 3
"""So many settings are trained to the end: layers learn at different speeds, so short runs rank them badly."""


FEWEST = 2
"""Steps that a forget corpus must have in the first rung."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Settings that are trained for equally many steps."""

    steps: int
    settings: int
    """How many there are."""


def ladder(spec: Sweep) -> tuple[Rung, ...]:
    """The rungs, from the first with all settings to the last with `LAST`.

    Raises: UsageError for a grid or steps that halving can do nothing with; CorpusError.
    """
    cells = spec.cells()
    settings = len(cells) // len(dict.fromkeys(spec.seeds))
    if settings <= LAST:
        raise UsageError(
            f"halving trains {LAST} settings to the end, and the grid has no more than {settings}.\n"
            "Name more values in --grid, or leave --halving out."
        )
    if "steps" in spec.axes:
        raise UsageError("'steps' cannot stand in the grid with --halving: its rungs differ in them.\nPass --steps N.")
    named = sorted({cell.config.solver_name for cell in cells if cell.config.solver.is_one_matrix})
    if named:
        raise UsageError(f"--solver {named[0]} takes no steps that --halving could cut.\nLeave --halving out.")
    steps = cells[0].config.settings()["steps"]
    counts = [settings]
    while counts[-1] > LAST:
        counts.append(max(LAST, counts[-1] // ETA))
    cut = ETA ** (len(counts) - 1)
    of_corpora = {cell.config.data for cell in cells}
    fewest = FEWEST * max(map(inputs.count_topics, of_corpora))
    if steps // cut < fewest:
        raise UsageError(
            f"the first rung of {settings} settings has {steps // cut} of {steps} steps, and "
            f"needs {fewest}.\nPass --steps {fewest * cut} or more, or leave --halving out."
        )
    return tuple(
        Rung(steps=steps // ETA ** (len(counts) - 1 - number), settings=count) for number, count in enumerate(counts)
    )


def halve(spec: Sweep, run: Callable[[Sequence[Cell], str], dict[str, str]]) -> tuple[Outcomes, dict[str, str]]:
    """Climb the ladder; outcomes of every setting on the rung that it came to, and what went wrong, by cell.

    Each rung's runs are trained from the beginning, in folders below `rungs`; the last rung's are the sweep's cells.

    Raises: UsageError as `ladder`; what `run` raises.
    """
    rungs = ladder(spec)
    going = spec.cells()
    failed: dict[str, str] = {}
    found: Outcomes | None = None
    tied: list[int] = []
    for number, rung in enumerate(rungs, start=1):
        is_last = number == len(rungs)
        todo = going if is_last else [at(cell, rung, spec) for cell in going]
        diverged = run(todo, "cells" if is_last else f"rung {number}, {rung.steps} steps")
        failed |= {name if is_last else f"{name} ({rung.steps} steps)": text for name, text in diverged.items()}
        left = [cell for cell in todo if cell.name not in diverged]
        stopped = None if is_last else rung.steps
        seen = outcomes.read(spec.method, left, floor=spec.floor, out=spec.out, stopped=stopped)
        found = seen if found is None else outcomes.extended(found, seen)
        if not is_last:
            ranked, count = seen.ranked(), rungs[number].settings
            if len(ranked) > count and seen.merit(ranked[count - 1]) == seen.merit(ranked[count]):
                tied.append(rung.steps)
            best = [point.settings for point in ranked[:count]]
            going = [cell for cell in going if cell.settings in best]
    assert found is not None
    doubt = f" After {' and '.join(map(str, tied))} steps settings that went on and others that stopped were equal: "
    doubt += "their order in the grid decided. Pass more --steps."
    return replace(found, how=describe(rungs) + doubt * bool(tied)), failed


def at(cell: Cell, rung: Rung, spec: Sweep) -> Cell:
    """The cell as it is trained on a rung before the last."""
    folder = spec.out / "rungs" / str(rung.steps) / cell.name
    return replace(cell, config=cell.config.changed(steps=rung.steps, out=folder))


def describe(rungs: Sequence[Rung]) -> str:
    """The ladder in a sentence."""
    first, *rest = rungs
    then = ", ".join(f"the best {rung.settings} for {rung.steps}" for rung in rest)
    return f"Successive halving: all {first.settings} settings for {first.steps} steps, {then}."
