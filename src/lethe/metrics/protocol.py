"""What a metric is."""

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from lethe.inference.loaded_model import LoadedModel
from lethe.types import EvalSet, Scores


@runtime_checkable
class Metric(Protocol):
    """Measures one number of a subject on one set.

    A metric is a frozen dataclass with these members; it returns None for a set that has nothing
    it could measure (no questions, no texts).
    """

    source: ClassVar[str]
    """The paper or code that it comes from."""
    better: ClassVar[str]
    """"higher", "lower" or "neither": which way is good on a retain set, as in its scores."""
    chance: ClassVar[str]
    """What no knowledge scores, in words; empty where there is no such level."""
    needs: ClassVar[str]
    """What a set, or a subject, must bring: "questions with choices"; without it the metric returns None."""

    def __call__(self, subject: LoadedModel, data: EvalSet) -> Scores | Mapping[str, Scores] | None:
        """The score with its standard error; or several, by what the metric's name is continued with ("" for one)."""
        ...


@runtime_checkable
class Combination(Protocol):
    """A metric that is worked out from scores of others, such as one number for forget and retain together.

    It says the same of itself as a `Metric`; what it needs are the scores that it combines.
    """

    source: ClassVar[str]
    better: ClassVar[str]
    chance: ClassVar[str]
    needs: ClassVar[str]

    def combine(self, scores: Mapping[str, Scores]) -> Scores | None:
        """The score from those by `metric/set`; None where one that it needs was not measured."""
        ...
