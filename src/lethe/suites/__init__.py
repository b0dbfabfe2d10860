"""Published benchmarks, each turned into corpora and sets; the built-in world is the first."""
