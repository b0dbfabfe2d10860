"""What steering does inside a model: one file an analysis, one figure each."""
