"""Seconds and peak memory of an RMU step: the published two-model loop and Lethe, same weights, same batches."""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lethe import RMU, Batch, Gradient, LayerSlice, load_model
from lethe.data.batches import Schedule
from lethe.model.layers import trainable_names
from lethe.suites import world
from memory import peak_mb, random_batch, random_schedule

LAYER = 7
ROWS, TOKENS = 4, 128
CONFIG = LlamaConfig(
    num_hidden_layers=32, hidden_size=768, intermediate_size=2048, num_attention_heads=12, vocab_size=32000
)
METHOD, SOLVER = RMU(), Gradient()


class Naive:
    """RMU as its authors' code runs it: two whole models, hooks, a gradient for every parameter.

    One thing is kinder than theirs: no key-value cache is built.
    """

    def __init__(self, updated: PreTrainedModel, frozen: PreTrainedModel):
        self.updated, self.frozen = updated.requires_grad_(True), frozen
        down = [updated.model.layers[layer].mlp.down_proj.weight for layer in range(LAYER - 2, LAYER + 1)]
        self.optimizer = torch.optim.AdamW(down, lr=SOLVER.lr, eps=1e-6, weight_decay=0.0)
        direction = torch.rand(updated.config.hidden_size, generator=torch.Generator().manual_seed(0))
        self.target = METHOD.steering_coeff * direction / direction.norm()

    def step(self, forget: Batch, retain: Batch) -> None:
        """One step of training; gradients of what is not trained pile up, as they do there."""
        h_forget = self.activation(self.updated, forget)
        forget_loss = mse_loss(h_forget, self.target.expand_as(h_forget))
        h_retain = self.activation(self.updated, retain)
        with torch.no_grad():
            h_frozen = self.activation(self.frozen, retain)
        loss = forget_loss + METHOD.alpha * mse_loss(h_retain, h_frozen)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def activation(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """The output of the layer, noted by a hook while the whole model runs."""
        noted: list[Tensor] = []
        handle = model.model.layers[LAYER].register_forward_hook(lambda _, __, output: noted.append(output))
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False)
        handle.remove()
        return noted[0]


def load_slice(folder: Path, layer: int) -> LayerSlice:
    model = load_model(folder, layers=layer + 1)
    names = [name for trained in range(layer - 2, layer + 1) for name in trainable_names(model, trained)]
    return LayerSlice(model, layer - 2, layer + 1, tuple(names))


def solve(layers: LayerSlice, plan: Schedule) -> float:
    """Seconds per step after the first one: wall time, so all that a step costs is in it."""
    ends: list[float] = []
    rng = torch.Generator().manual_seed(0)
    SOLVER.train(layers, METHOD, plan, rng, on_row=lambda _: ends.append(time.perf_counter()))
    return (time.perf_counter() - ends[0]) / max(plan.steps - 1, 1)


class Products(TorchDispatchMode):
    """Notes shapes and strides of the operands of every matrix product; attention scores, 3 % of them, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[list[tuple[torch.Size, tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.operands.append([(t.shape, t.stride()) for t in args])
        return func(*args, **(kwargs or {}))


def products(layers: LayerSlice) -> list[tuple[Tensor, Tensor]]:
    """Operands like those of every matrix product of one step with reused recordings."""
    found = []
    for steps in (1, 2):
        with Products() as noted:
            solve(layers, random_schedule(CONFIG.vocab_size, ROWS, TOKENS, steps=steps, distinct=1))
        found.append(noted.operands)
    reused = found[1][len(found[0]) :]
    return [(torch.empty_strided(*x).normal_(), torch.empty_strided(*y).normal_()) for x, y in reused]


def needed_flops() -> int:
    """Of a reused step: what lies between the first trained matrix's layer and the loss, forward and backward."""
    d, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    attention, mlp, down = 4 * d * d, 3 * d * inner, d * inner
    forward = mlp + 2 * (attention + mlp)
    backward = 2 * (attention + mlp) + 3 * down
    return 2 * 2 * ROWS * TOKENS * (forward + backward)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def same_weights(naive: Naive, layers: LayerSlice) -> float:
    """Largest difference between the trained weights after the same two steps."""
    plan = random_schedule(CONFIG.vocab_size, ROWS, TOKENS, steps=2, distinct=2)
    solve(layers, plan)
    for step in range(plan.steps):
        naive.step(*plan.at(step)[1:])
    return max((naive.updated.get_parameter(n) - p).abs().max().item() for n, p in layers.trained.items())


def recording(layers: LayerSlice, name: str, *, rows: int, tokens: int, repeats: int) -> None:
    """Print what recording four batches in one forward would gain."""
    vocabulary = layers.model.config.vocab_size
    small = [random_batch(vocabulary, rows, tokens, seed=seed) for seed in range(4)]
    large = random_batch(vocabulary, 4 * rows, tokens, seed=4)
    apart, together = [], []
    for _ in range(repeats + 1):
        apart.append(seconds(lambda: [layers.record(batch) for batch in small]))
        together.append(seconds(lambda: layers.record(large)))
    one, other = statistics.median(apart[1:]), statistics.median(together[1:])
    print(f"recording {4 * rows} rows, {name}: 4 batches {one:.3f} s, at once {other:.3f} s, ratio {one / other:.2f}")


def peak_of(side: str, folder: Path, threads: int) -> float:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(side: str, folder: Path) -> None:
    """Two steps in this process alone; prints the MB above what it held after its imports."""
    before = peak_mb()
    plan = random_schedule(CONFIG.vocab_size, ROWS, TOKENS, steps=2, distinct=2)
    if side == "naive":
        loop = Naive(load_model(folder), load_model(folder))
        for step in range(plan.steps):
            loop.step(*plan.at(step)[1:])
    else:
        solve(load_slice(folder, LAYER), plan)
    print(peak_mb() - before)


def main(side: Literal["both", "naive", "lethe"] = "both", folder: Path = Path(), threads: int = 2, repeats: int = 7):
    """Compare both sides; one side alone prints its peak memory for the model in `folder`."""
    torch.set_num_threads(threads)
    if side != "both":
        print_peak(side, folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG)
        model.save_pretrained(temporary)
        naive, layers = Naive(model, copy.deepcopy(model)), load_slice(Path(temporary), LAYER)
        difference = same_weights(naive, layers)
        if difference > 1e-6:
            raise SystemExit(f"the two sides differ by {difference:.2g} after two steps; nothing was timed.")
        print(f"equal weights after 2 steps: largest difference {difference:.1e}")

        operands = products(layers)
        flops = sum(2 * x.numel() * y.shape[1] for x, y in operands)
        fresh = random_schedule(CONFIG.vocab_size, ROWS, TOKENS, steps=3, distinct=3)
        again = random_schedule(CONFIG.vocab_size, ROWS, TOKENS, steps=5, distinct=1)
        rounds: list[tuple[float, ...]] = []
        for _ in range(repeats):
            a = seconds(lambda: naive.step(*fresh.at(0)[1:]))
            b, c = solve(layers, fresh), solve(layers, again)
            rounds.append((a, b, c, seconds(lambda: [x @ y for x, y in operands])))
        a, b, c, floor = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"naive {a:.3f} s   Lethe, recording {b:.3f} s   reused {c:.3f} s   its products alone {floor:.3f} s")
        for name, target, of in (("recording every step", 5, 1), ("recordings reused", 9, 2)):
            ratios = [row[0] / row[of] for row in rounds]
            print(f"{name}: {a / (b, c)[of - 1]:.1f}x (rounds {min(ratios):.1f}-{max(ratios):.1f}, target {target}x)")
        print(f"products of a reused step: {flops / 1e9:.1f} GFLOP, of which needed {needed_flops() / 1e9:.1f}")
        print(f"their rate alone: {flops / floor / 1e9:.0f} GFLOP/s; their share of the reused step: {floor / c:.0%}")

        recording(layers, "32 layers, l=7", rows=ROWS, tokens=TOKENS, repeats=repeats)
        recording(load_slice(world.MODEL_FOLDER, 10), "built-in, l=10", rows=8, tokens=75, repeats=4 * repeats)
        del naive, layers, model
        a, b = (peak_of(name, Path(temporary), threads) for name in ("naive", "lethe"))
        print(f"peak memory above imports: naive {a:.0f} MB, Lethe {b:.0f} MB, ratio 1/{a / b:.1f} (target 1/4)")


if __name__ == "__main__":
    tyro.cli(main)
