"""What a model should do on a batch: one file a method."""
