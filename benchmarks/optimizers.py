"""Seconds of one Muon step: torch's own (bfloat16, matrix by matrix), and fp32 with all matrices of a shape at once."""

import statistics
import time
from collections.abc import Callable

import torch
import tyro
from tools.world.muon import Muon
from torch import nn

SHAPES = {96: 256, 256: 688, 512: 1376}
"""d_model and d_ff of the built-in model and of two that a CPU can train."""


def matrices(d: int, inner: int, *, layers: int) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(d, d)] * 4 + [(inner, d)] * 2 + [(d, inner)]
    found = [nn.Parameter(0.02 * torch.randn(shape, generator=rng)) for _ in range(layers) for shape in shapes]
    for matrix in found:
        matrix.grad = torch.randn(matrix.shape, generator=rng)
    return found


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(threads: int = 1, layers: int = 4, repeats: int = 5) -> None:
    """Print medians of both, in turn, and the largest difference between the weights, in parts of one step."""
    torch.set_num_threads(threads)
    for d, inner in SHAPES.items():
        ours, theirs = matrices(d, inner, layers=layers), matrices(d, inner, layers=layers)
        before = [matrix.detach().clone() for matrix in ours]
        grouped = Muon(ours, weight_decay=0.0)
        stock = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
        rounds = [(seconds(lambda: grouped.step(0.02)), seconds(stock.step))]  # noqa: B023 - called at once
        step = max((a.detach() - b).abs().max().item() for a, b in zip(ours, before, strict=True))
        apart = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        rounds = [(seconds(lambda: grouped.step(0.02)), seconds(stock.step)) for _ in range(repeats)]  # noqa: B023
        a, b = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"d {d}: grouped fp32 {a:.4f} s, torch {b:.4f} s, ratio {a / b:.2f}; differ by {apart / step:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
