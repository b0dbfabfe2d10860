"""Before a run: which layer, which strength, which rows."""
