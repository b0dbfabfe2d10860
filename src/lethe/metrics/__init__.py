"""What is measured on a set before and after unlearning; one metric is one public dataclass in one file.

See `lethe.protocols.Metric`; `lethe.protocols.discover` finds them by name.
"""
