"""Search of settings within ranges: Optuna proposes them one after another, from what the earlier ones came to."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lethe.errors import RunFolderError, UsageError
from lethe.runs.run_folder import RunFolder
from lethe.sweeps import outcomes
from lethe.sweeps.grid import Axes, Cell, Range
from lethe.sweeps.spec import Sweep
from lethe.system.atomic_files import saving

JOURNAL = "optuna.journal"
"""Optuna's own record of the trials, below the sweep's folder."""


DIGITS = 4
"""Significant digits of a proposed number: folders are named by it, and finer differences mean nothing."""


DIVERGED = 10.0
"""What a trial that diverged or has no number comes to; any other is less, and less is better."""


def search(
    spec: Sweep, run: Callable[[Sequence[Cell]], dict[str, str]], *, on_done: Callable[[Cell], None] = lambda cell: None
) -> tuple[list[Cell], dict[str, str]]:
    """Run trials up to the number asked for; their cells, and what went wrong with those that diverged, by name.

    A trial is one combination of settings with all seeds, and comes to the mean that the sweep's rule ranks by. Trials
    in the journal are not run again (`on_done` hears of their cells). Each has a sampler seeded by its place, so that
    an interrupted trial is proposed again as it was. Source: Watanabe 2023, arXiv 2304.11127 (TPE).

    Raises: UsageError if Optuna is not installed; RunFolderError if the journal cannot be read; what `run` raises.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            'Optuna is not installed, and --engine optuna searches with it.\nRun: pip install "lethe-unlearn[search]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(spec.out / JOURNAL)
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    space: dict[str, Any] = {name: _distribution(values) for name, values in spec.axes.items()}
    found: dict[str, Cell] = {}
    failed: dict[str, str] = {}
    for place in range(max(spec.trials, len(done))):
        if place < len(done):
            cells = spec.cells(_axes(spec.axes, done[place].params))
            diverged = done[place].user_attrs["diverged"]
            gone = [c for c in cells if c.name not in diverged and not RunFolder(c.config.out).is_complete]
            if gone:
                diverged |= run(gone)
            for cell in cells:
                on_done(cell)
        else:
            seed = random.Random(f"{spec.seeds[0]} {place}").getrandbits(32)
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            trial = study.ask(space)
            cells = spec.cells(_axes(spec.axes, trial.params))
            diverged = run(cells)
            trial.set_user_attr("diverged", diverged)
            study.tell(trial, DIVERGED if diverged else _value(spec, cells))
        found |= {cell.name: cell for cell in cells}
        failed |= diverged
    return list(found.values()), failed


def _study(path: Path) -> Any:
    """The study of the journal; trials that were interrupted are closed."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with saving(path):
        # The sweep's folder is locked, so a lock is that of a killed process. So is the beginning of a line.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                path.write_bytes(content[: content.rfind(b"\n") + 1])
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    except (ValueError, KeyError, TypeError, optuna.exceptions.OptunaError) as error:
        raise RunFolderError(f"{path} cannot be read.\nChoose another --out, or delete the folder.") from error
    return study


def _distribution(values: tuple[Any, ...] | Range) -> Any:
    from optuna import distributions

    if not isinstance(values, Range):
        # As text, because Optuna keeps no tuples and paths.
        return distributions.CategoricalDistribution([str(value) for value in values])
    if values.is_whole:
        return distributions.IntDistribution(int(values.low), int(values.high), log=values.is_log)
    return distributions.FloatDistribution(values.low, values.high, log=values.is_log)


def _axes(axes: Axes, params: dict[str, Any]) -> Axes:
    """One value for each setting."""
    return {name: (_chosen(values, params[name]),) for name, values in axes.items()}


def _chosen(values: tuple[Any, ...] | Range, proposed: Any) -> Any:
    if not isinstance(values, Range):
        return next(value for value in values if str(value) == proposed)
    if values.is_whole:
        return int(proposed)
    return min(max(float(f"{proposed:.{DIGITS}g}"), values.low), values.high)


def _value(spec: Sweep, cells: Sequence[Cell]) -> float:
    found = outcomes.read(spec.method, cells, floor=spec.floor, out=spec.out)
    return min(max(found.merit(found.points[0]), -1e12), DIVERGED)
