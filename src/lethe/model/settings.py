"""Settings of the base model: which weights, on which device, in which numbers."""

from dataclasses import dataclass
from typing import Literal

from lethe.errors import InvalidValueError, check_choices

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model."""

    model: str
    """`builtin` (the shipped small model), a Hugging Face folder, or a hub id."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; auto takes cuda where there is one."""
    dtype: Dtype = "auto"
    """Number type of the weights while training and measuring; auto is the checkpoint's (on a CPU fp32 for fp16)."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.threads is not None and self.threads < 1:
            raise InvalidValueError(f"'threads' must be at least 1. Got {self.threads}.")
