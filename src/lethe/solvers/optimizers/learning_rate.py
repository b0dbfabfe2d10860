"""How the learning rate changes over a run."""

from dataclasses import dataclass

from lethe.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Constant, after a linear warm-up and before a linear decay where these are asked for."""

    warm_up: int = 0
    """Steps until the full rate; the first one has 1 / (warm_up + 1) of it."""
    decay: float = 0.0
    """Share of all steps, the last ones, over which the rate falls to zero; in [0, 1]."""

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise InvalidValueError(f"'warm_up' must be at least 0. Got {self.warm_up}.")
        if not 0 <= self.decay <= 1:
            raise InvalidValueError(f"'decay' must be in [0, 1]. Got {self.decay}.")

    def share(self, step: int, steps: int) -> float:
        """What the rate of a step, counted from 0, is multiplied by in a run of so many: above 0, at most 1."""
        left = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return min(1.0, (step + 1) / (self.warm_up + 1), left)
