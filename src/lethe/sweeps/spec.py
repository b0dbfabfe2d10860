"""What is swept: the grid, its seeds, and by what its cells are chosen."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lethe.__version__ import __version__
from lethe.errors import InvalidValueError, UsageError
from lethe.methods.protocol import Method
from lethe.runs import config_file as configs
from lethe.runs.config import RunConfig
from lethe.sweeps.grid import Axes, Cell, Range, cells
from lethe.sweeps.settings import KEPT
from lethe.types import RUN_FORMAT

Place = Literal["auto", "ram", "disk", "none"]


Engine = Literal["local", "ray", "optuna"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is swept, and where it is written."""

    method: Method
    config: RunConfig
    """Settings of every cell but those of the grid."""
    axes: Axes
    """Values of each setting of the grid; with Optuna a range may stand for them."""
    out: Path
    seeds: tuple[int, ...] = (0,)
    engine: Engine = "local"
    """What runs the cells: this process, the workers of a Ray cluster, or this process as Optuna proposes them."""
    workers: int | None = None
    """Groups of cells that Ray runs beside each other; by default as many as the cluster has room for."""
    trials: int = 40
    """Settings that Optuna proposes."""
    halving: bool = False
    """Train all settings for few steps and go on with the best third, until three are trained to the end."""
    cache: Place = "auto"
    """Where recordings are kept: in memory, in mapped files under `out`, nowhere, or where they fit."""
    disk_gb: float | None = None
    """Most disk that recordings may take; by default half of what is free."""
    proxy: int | None = None
    """At most this many questions of each set for every cell."""
    finalists: int = 0
    """How many of the best settings are measured on all questions."""
    floor: float = KEPT
    """Share of the base's retain score that a cell must keep to be chosen."""
    calibrate: float | None = None
    """Rank by the forget score of the largest mixing with the base that keeps this share of its retain score."""

    def __post_init__(self) -> None:
        if self.finalists < 0:
            raise InvalidValueError(f"'finalists' must be 0 or more. Got {self.finalists}.")
        for name in ("trials", "workers", "proxy"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidValueError(f"'{name}' must be at least 1. Got {value}.")
        if self.disk_gb is not None and not (self.disk_gb > 0 and math.isfinite(self.disk_gb)):
            raise InvalidValueError(f"'disk_gb' must be a positive number. Got {self.disk_gb}.")
        if self.finalists and self.proxy is None:
            raise UsageError("'finalists' are measured on more questions than the others.\nPass --proxy N as well.")
        limit = self.config.evaluation.limit
        if self.proxy is not None and limit is not None and self.proxy >= limit:
            raise UsageError(
                f"--proxy {self.proxy} is no fewer questions than --limit {limit}.\nPass a smaller --proxy."
            )
        if self.workers is not None and self.engine != "ray":
            raise UsageError(
                "--workers are those of a Ray cluster.\nPass --engine ray as well, or leave --workers out."
            )
        for name in ("floor", "calibrate"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InvalidValueError(f"'{name}' must be in (0, 1]. Got {value}.")
        ranks = self.finalists or self.calibrate is not None or self.halving or self.engine == "optuna"
        if self.config.evaluation.evaluate == "none" and ranks:
            raise UsageError("nothing is measured, so there is nothing to rank by.\nLeave --evaluate none out.")
        if self.config.on is not None:
            raise UsageError("a sweep starts from the untouched model.\nLeave --on out.")
        self._check_engine()

    def _check_engine(self) -> None:
        ranges = [name for name, values in self.axes.items() if isinstance(values, Range)]
        if self.engine != "optuna":
            if ranges:
                raise UsageError(
                    f"'{ranges[0]}' is a range, and a grid needs values.\nWrite {ranges[0]}=V,V,... or pass "
                    "--engine optuna."
                )
            return
        if not ranges:
            raise UsageError(
                "the grid has no range that Optuna could search.\nWrite one as beta=1..10, or lr=1e-5..1e-3:log; "
                "without --engine optuna every combination is run."
            )
        if self.halving:
            raise UsageError("--halving chooses among the settings of a grid.\nPass it or --engine optuna, not both.")
        if self.calibrate is not None:
            raise UsageError("Optuna searches by what cells keep, not by mixtures.\nLeave --calibrate out.")

    def cells(self, axes: Axes | None = None) -> list[Cell]:
        """The runs of the grid, or of other values of its settings.

        Raises: UsageError, InvalidValueError.
        """
        config = self.config if self.proxy is None else self.config.changed(limit=self.proxy)
        return cells(self.method, config, self.axes if axes is None else axes, self.seeds, self.out / "cells")


def about(spec: Sweep) -> dict[str, Any]:
    """What makes a sweep this one, as YAML; how it is cached, ranked, shared out or cut down may change."""
    plain = configs.plain(spec.method, spec.config)
    del plain["run"]["out"], plain["run"]["seed"], plain["format"], plain["lethe"]
    grid = {
        name: str(values) if isinstance(values, Range) else [configs.plain_value(value) for value in values]
        for name, values in spec.axes.items()
    }
    own = {"format": RUN_FORMAT, "lethe": __version__, "grid": grid, "seeds": list(spec.seeds), "proxy": spec.proxy}
    # Absent where they are not asked for, as in the folders of older sweeps. Ray's cells are the local engine's.
    if spec.engine == "optuna":
        own["engine"] = spec.engine
    if spec.halving:
        own["halving"] = True
    return own | plain
