"""The built-in world: a small model that knows 1050 made-up facts, its questions and its corpora."""

from pathlib import Path

from lethe.suites.world.exam import (
    Split,
    adjacent_texts,
    forget_prompts,
    forget_texts,
    questions,
    reference_prompts,
    retain_prompts,
    retain_texts,
)
from lethe.suites.world.generator import DECLINES

MODEL_FOLDER = Path(__file__).parent / "model"
"""A plain Hugging Face folder with the trained model; `lethe.world.train` makes another."""


__all__ = [
    "DECLINES",
    "MODEL_FOLDER",
    "Split",
    "adjacent_texts",
    "forget_prompts",
    "forget_texts",
    "questions",
    "reference_prompts",
    "retain_prompts",
    "retain_texts",
]
