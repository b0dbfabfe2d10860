"""The built-in world: a small model that knows 1050 made-up facts, its questions and its corpora."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""A plain Hugging Face folder with the trained model; `lethe.world.train` makes another."""
