"""What is measured of a model on a set: one file a metric."""
