"""Settings of a sweep that are known without running one."""

KEPT = 0.97
"""Share of the base's retain score that a cell must keep to be chosen."""
