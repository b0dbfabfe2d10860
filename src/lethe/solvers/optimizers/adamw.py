"""AdamW, as the published steering code uses it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay, without clipping."""

    source = "Loshchilov & Hutter 2019, arXiv 1711.05101"
    lr: float = 5e-5
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0

    def build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimizer of these parameters; it keeps `step`, `exp_avg` and `exp_avg_sq` of each."""
        # Fused, because the other implementations need a temporary copy of each moment: 0.6 GB more at 7B.
        return torch.optim.AdamW(
            list(parameters.values()),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )
