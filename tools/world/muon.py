"""Muon in fp32: momentum whose matrix updates are made orthogonal.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon. `torch.optim.Muon` works in bfloat16, matrix by
matrix, which costs more than the model itself on a CPU; here all matrices of one shape go through it together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


def orthogonalise(matrices: Float[Tensor, "n rows cols"]) -> Float[Tensor, "n rows cols"]:
    """Matrices with the same singular vectors and all singular values near 1 (about 0.7 to 1.2)."""
    # Five steps of a quintic Newton-Schulz iteration; the short side is kept first to make the products small.
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, with decoupled weight decay, for matrices only."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients in place."""
        for matrices, average in self._groups:
            gradients = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            average.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(average, self.momentum))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - lr * self.weight_decay).sub_(change, alpha=lr)
