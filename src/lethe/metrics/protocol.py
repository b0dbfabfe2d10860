"""What a metric is."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, runtime_checkable

from lethe.inference.reading import Reading
from lethe.types import Scores, Unit

Knowledge = Literal["more", "less", "neither"]


@runtime_checkable
class Metric(Protocol):
    """Measures one number of a model on one set.

    A metric is a frozen dataclass derived from this class. What it says of itself is data of the class; what a user may
    set are its fields, each with a default. It returns None for a set that has nothing that it could measure.
    """

    source: ClassVar[str]
    """The paper or code that it comes from."""
    needs: ClassVar[str]
    """What a set, or a model, must bring: "questions with choices"; without it the metric returns None."""
    higher_means: ClassVar[Knowledge] = "more"
    """Whether a model with a higher score knows more, or works better; "higher", "lower", "neither" in its scores."""
    unit: ClassVar[Unit] = ""
    """What the number counts, by which every table prints it."""
    chance: ClassVar[str] = ""
    """What no knowledge scores, in words; empty where there is no such level."""
    label: ClassVar[str] = ""
    """How people call it, where that is not the class's name in words."""
    hint: ClassVar[str] = ""
    """Which way is which, where a higher score does not simply know more or less."""

    def __call__(self, reading: Reading) -> Scores | Mapping[str, Scores] | None:
        """The score with its standard error; or several, by what the metric's name is continued with ("" for one)."""
        ...


@runtime_checkable
class Combination(Protocol):
    """A metric that is worked out from scores of others, such as one number for forget and retain together.

    It says the same of itself as a `Metric`; what it needs are the scores that it combines.
    """

    source: ClassVar[str]
    needs: ClassVar[str]
    higher_means: ClassVar[Knowledge] = "more"
    unit: ClassVar[Unit] = ""
    chance: ClassVar[str] = ""
    label: ClassVar[str] = ""
    hint: ClassVar[str] = ""

    def combine(self, scores: Mapping[str, Scores]) -> Scores | None:
        """The score from those by `metric/set`; None where one that it needs was not measured."""
        ...
