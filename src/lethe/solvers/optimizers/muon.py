"""Muon on the matrices inside layers, AdamW on everything else.

`torch.optim.Muon` works in bfloat16: where a CPU or GPU has instructions for that, it is 1.4 to 4 times as fast as one
in fp32 that takes all matrices of a shape at once, and without them up to a third slower (benchmarks/optimizers.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lethe.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Nesterov momentum whose matrix updates are made orthogonal, times sqrt(rows / columns) where that is above 1."""

    source = "Jordan et al. 2024, kellerjordan.github.io/posts/muon"
    lr: float = 0.02
    """Learning rate of matrices, of which a step moves all singular values alike."""
    momentum: float = 0.95
    lr_rest: float = 1e-3
    """Learning rate of AdamW, on embeddings, head, norms, biases and stacked experts."""

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """One optimizer of these parameters; it keeps `momentum_buffer` of matrices, AdamW's moments of the rest.

        Raises: UsageError with a torch that has no Muon.
        """
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(
                f"Muon needs torch 2.9 or newer; this is {torch.__version__}.\nUpgrade torch, or use AdamW."
            )
        # A matrix inside a layer has the layer's number in its name.
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and re.search(r"\.\d+\.", name)]
        rest = [p for p in parameters.values() if not any(p is matrix for matrix in matrices)]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(torch.optim.Muon(matrices, lr=self.lr, momentum=self.momentum, weight_decay=0.0))
        if rest:
            parts.append(torch.optim.AdamW(rest, lr=self.lr_rest, weight_decay=0.0, fused=True))
        return _Together(parts)


class _Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups and their states are shared with it."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self._parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override] - one of two forms
        """One step of each."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            part.state = self.state
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            first += len(part.param_groups)
