"""Settings that suit the built-in model."""

from collections.abc import Mapping
from typing import Any

ON_BUILTIN: Mapping[str, Any] = {
    "layer": 5,
    "steps": 100,
    "batch_size": 8,
    "max_length": (128,),
    "lr": 1e-2,
    "threads": 1,  # its products are too small to share out: on busy cores a second thread makes it slower
}
"""Settings, by field, that suit the small built-in model; they are the command line's defaults for it."""


OF_METHODS: Mapping[str, Mapping[str, Any]] = {
    "rmu": {"steering_coeff": 160.0, "alpha": 10.0},
    "adaptive-rmu": {"beta": 2.0, "alpha": 10.0},
    "rsv": {"steering_coeff": 320.0, "alpha": 10.0},
    "lunar": {"alpha": 10.0, "layer": 8, "lam": 1e-2},
}
"""Settings of methods, by name and by field of the method or of RunConfig, that suit it; after those of all runs."""
