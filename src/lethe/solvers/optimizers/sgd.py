"""Plain stochastic gradient descent."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Steps along the gradient; without momentum it keeps no state."""

    source = "Robbins & Monro 1951; as MRP trains its projections, arXiv 2508.15449"
    lr: float = 2e-4
    """Learning rate."""
    momentum: float = 0.0

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimizer of these parameters; with momentum it keeps `momentum_buffer` of each."""
        return torch.optim.SGD(list(parameters.values()), lr=self.lr, momentum=self.momentum)
