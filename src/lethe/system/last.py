"""The last thing that was made, kept for whoever asks for the same."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Last(Generic[Thing]):
    """Remembers one value by the key it was made for; another key replaces it."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value: Thing | None = None
        self._is_set = False

    def __call__(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """The value of the last call with this key, else what `make` returns."""
        if not (self._is_set and self._key == key):
            self.clear()  # first, so that the old value and the new one never stand in memory together
            self._value = make()
            self._key, self._is_set = key, True
        return self._value  # type: ignore[return-value]

    def clear(self) -> None:
        """Give the value up."""
        self._key, self._value, self._is_set = None, None, False
