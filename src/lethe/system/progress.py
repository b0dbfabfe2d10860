"""What long work tells while it goes on."""


class Progress:
    """Hears how far the work is. This one is silent; the command line shows bars on stderr."""

    def phase(self, name: str, total: int) -> None:
        """A phase begins, of so many parts."""

    def advance(self, note: str = "") -> None:
        """One part of the phase is done."""

    def warn(self, text: str) -> None:
        """Something the user should know now; it also stands in the report."""
