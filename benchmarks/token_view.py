"""A step of NPO and of KL to the base: open-unlearning's loop of two models, and one model seen through a TokenView."""

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lethe import Batch
from lethe.model.token_view import TokenLogProbs, TokenView
from lethe.model.trainable import Everything, Matrices
from memory import forget_peak, peak_mb, random_batch

CONFIG = LlamaConfig(
    num_hidden_layers=12, hidden_size=512, intermediate_size=1376, num_attention_heads=8, vocab_size=32000
)
ROWS, TOKENS = 2, 128
Loss = Literal["npo", "kl"]
Trained = Literal["all", "quarter"]


def names(model: PreTrainedModel, trained: Trained) -> tuple[str, ...]:
    first = 0 if trained == "all" else CONFIG.num_hidden_layers * 3 // 4
    layers = tuple(f"model.layers.{layer}." for layer in range(first, CONFIG.num_hidden_layers))
    return tuple(n for n, _ in model.named_parameters() if trained == "all" or n.startswith(layers))


def npo(now: Tensor, frozen: Tensor) -> Tensor:
    """Of sums of token log-probabilities, as open-unlearning takes them; beta 0.1."""
    return -(2 / 0.1) * logsigmoid(-0.1 * (now - frozen)).mean()


class TwoModels:
    """A deep copy is the reference; every layer of both runs in every step."""

    def __init__(self, model: PreTrainedModel, trained: Trained):
        self.model, self.reference = model.requires_grad_(False), copy.deepcopy(model).eval()
        wanted = names(model, trained)
        self.parameters = [p.requires_grad_(True) for n, p in model.named_parameters() if n in wanted]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def step(self, batch: Batch, loss: Loss) -> None:
        """One step, both models in full."""
        mask = batch.attention_mask.long()
        with torch.no_grad():
            frozen = self.reference(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        now = self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        if loss == "npo":
            value = npo(*(-self._losses(logits, batch).sum(1) for logits in (now, frozen)))
        else:
            p, q = log_softmax(frozen, -1), log_softmax(now, -1)
            value = torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _losses(self, logits: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.mT, batch.input_ids[:, 1:], reduction="none")


class OneModel:
    """The same steps by a view; untouched weights lie on disk."""

    def __init__(self, model: PreTrainedModel, trained: Trained, folder: Path):
        moves = Everything() if trained == "all" else Matrices(names(model, trained))
        self.view = TokenView(model, moves, originals_in=folder)
        self.optimizer = torch.optim.AdamW(list(self.view.trained.values()), lr=1e-5, fused=True)

    def step(self, recording: object, loss: Loss) -> None:
        """One step from a recording."""
        now, frozen = self.view(recording), recording.frozen  # type: ignore[arg-type, attr-defined]
        value = npo(self._sums(now), self._sums(frozen)) if loss == "npo" else self._kl(now, frozen)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _sums(self, read: TokenLogProbs) -> Tensor:
        return (read.of_tokens * read.mask).sum(1)

    def _kl(self, now: TokenLogProbs, frozen: TokenLogProbs) -> Tensor:
        # Position 0 is 0 in both, and adds nothing.
        q, p = now.distribution, frozen.distribution
        return torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / now.mask.sum()


def time_of(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def make() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def peak(side: str, trained: Trained, loss: Loss) -> None:
    """Print the peak of two steps in this process above what the model itself takes."""
    model, batch = make(), random_batch(CONFIG.vocab_size, ROWS, TOKENS, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        if side == "two":
            two = TwoModels(model, trained)
            forget_peak()
            for _ in range(2):
                two.step(batch, loss)
        else:
            one = OneModel(model, trained, Path(folder))
            recording = one.view.record(batch)
            forget_peak()
            for _ in range(2):
                one.step(recording, loss)
        print(peak_mb())


def main(side: Literal["both", "one", "two"] = "both", trained: Trained = "all", loss: Loss = "npo", repeats: int = 3):
    """Compare both sides; one side alone prints its peak memory."""
    torch.set_num_threads(1)
    if side != "both":
        return peak(side, trained, loss)
    batch = random_batch(CONFIG.vocab_size, ROWS, TOKENS, seed=0)
    weights = sum(p.numel() * p.element_size() for p in make().parameters()) / 1e6
    for which in ("all", "quarter"):
        with tempfile.TemporaryDirectory() as folder:
            two, one = TwoModels(make(), which), OneModel(make(), which, Path(folder))
            for kind in ("npo", "kl"):
                rounds = []
                for _ in range(repeats):
                    recording = one.view.record(batch)
                    a, b = time_of(lambda: two.step(batch, kind)), time_of(lambda: one.step(recording, kind))  # noqa: B023
                    rounds.append((a, b, b + time_of(lambda: one.view.record(batch))))  # noqa: B023
                a, b, c = (statistics.median(column) for column in zip(*rounds, strict=True))
                apart = max(
                    (x - y).abs().max().item() for x, y in zip(two.parameters, one.view.trained.values(), strict=True)
                )
                print(f"{which} {kind}: two {a:.2f} s; view, reused {a / b:.2f}x, recorded {a / c:.2f}x; {apart:.0e}")
        peaks = [
            float(
                subprocess.run(
                    [sys.executable, __file__, "--side", name, "--trained", which],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
            )
            for name in ("two", "one")
        ]
        print(f"{which}: peak {peaks[0]:.0f} and {peaks[1]:.0f} MB; one copy of the weights is {weights:.0f} MB")
    return None


if __name__ == "__main__":
    tyro.cli(main)
