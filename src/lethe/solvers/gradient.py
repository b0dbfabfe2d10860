"""Move the trained matrices until the activations meet a method's targets.

`Gradient` is the only optimisation loop. It does not know its method: it asks for the two targets.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lethe.data.batches import Schedule
from lethe.errors import DivergedError, InvalidValueError
from lethe.methods.directions import gaussian_like
from lethe.methods.protocol import SteeringMethod
from lethe.model.losses import masked_mse
from lethe.model.slice import LayerSlice, Recording
from lethe.solvers import history
from lethe.solvers.training_state import Checkpoint
from lethe.system.machine import free_bytes, peak_mb
from lethe.types import Activation, Batch, HistoryRow, State

EXPLODED = 1e4
"""A total loss of this many times the largest of the first ten is taken for divergence."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """AdamW with a constant learning rate, weight decay 0, eps 1e-6 and no clipping, as in the published code."""

    lr: float = 5e-5
    """Learning rate."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    fp32_masters: bool = True
    """Keep fp32 copies of trained bf16 or fp16 matrices: a step of 5e-5 is about one bf16 ulp of a weight of 1e-2."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidValueError(f"'lr' must be a positive number. Got {self.lr}.")
        if self.accumulate < 1:
            raise InvalidValueError(f"'accumulate' must be at least 1. Got {self.accumulate}.")

    def solve(
        self,
        layers: LayerSlice,
        method: SteeringMethod,
        schedule: Schedule,
        rng: torch.Generator,
        *,
        resume: Checkpoint | None = None,
        on_row: Callable[[HistoryRow], None] = lambda row: None,
        on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
        checkpoint_every: int = 10,
    ) -> None:
        """Train the slice in place.

        `on_row` sees every batch as it ends. `on_checkpoint` gets what is needed to go on from there, every
        `checkpoint_every` steps and at the end; its tensors are the live ones, to be saved before it returns.
        With `resume` the run goes on to the same final weights, bit for bit.

        Raises: DivergedError when a loss or gradient is not finite, or the loss exceeds 10000 times the largest of
        the first ten; the slice then holds the weights of the last checkpoint.
        """
        training = _Training(self, layers, rng)
        if resume is not None:
            training.restore(resume)
        total = schedule.steps // self.accumulate
        coming = [schedule.at(i) for i in range(training.step * self.accumulate, total * self.accumulate)]
        recordings = _Recordings(layers, [batch for _, forget, retain in coming for batch in (forget, retain)])
        good, good_step = layers.delta(), training.step
        losses: list[float] = []

        for topic, forget_batch, retain_batch in coming:
            started = time.perf_counter()
            if topic.name not in training.states:
                training.states[topic.name] = method.prepare(layers, topic, rng)
            forget, retain = recordings.of(forget_batch), recordings.of(retain_batch)
            state = method.update(forget.frozen, training.states[topic.name])
            training.states[topic.name] = state

            target = method.forget_target(forget.frozen, state)
            h_forget = layers(forget)
            forget_loss = masked_mse(training.widen(h_forget), training.widen(target), forget.batch.mask)
            training.backward(forget_loss)
            disturbed = method.nu > 0 and method.noise == "input"
            h_retain = layers(retain, method.nu * gaussian_like(retain.hidden, rng) if disturbed else None)
            kept = method.retain_target(retain.frozen, rng)
            retain_loss = masked_mse(training.widen(h_retain), training.widen(kept), retain.batch.mask)
            training.backward(method.alpha * retain_loss)

            measures = history.measure(
                Activation(h=h_forget.detach(), mask=forget.batch.mask),
                Activation(h=h_retain.detach(), mask=retain.batch.mask),
                forget.frozen,
                retain.frozen,
                target,
                state.get("direction"),
                forget_loss=forget_loss,
                retain_loss=retain_loss,
                gradients=[p.grad for p in layers.trained.values() if p.grad is not None],
            )
            loss = measures["forget_loss"] + method.alpha * measures["retain_loss"]
            exploded = loss > EXPLODED * max(losses[:10], default=math.inf)
            losses.append(loss)
            step = training.step
            if exploded or not all(map(math.isfinite, measures.values())):
                for name, parameter in layers.trained.items():
                    parameter.data.copy_(good[name])
                raise DivergedError(
                    f"training diverged at step {step}: forget loss {measures['forget_loss']:.3g}, retain loss "
                    f"{measures['retain_loss']:.3g}, gradient norm {measures['gradient']:.3g}.\n"
                    f"The weights of step {good_step} were kept. "
                    f"Lower --lr (now {self.lr:g}), --alpha or the target's length."
                )
            training.after_batch()
            seconds = time.perf_counter() - started
            row = history.row(measures, step=step, topic=topic.name, seconds=seconds, peak_mb=peak_mb(layers.device))
            on_row(replace(row, retain_floor=method.retain_floor))
            if training.step > step and (training.step % checkpoint_every == 0 or training.step == total):
                good, good_step = layers.delta(), training.step
                on_checkpoint(training.checkpoint())


class _Training:
    """The part of a training that changes: masters, optimizer, states and the step count."""

    def __init__(self, solver: Gradient, layers: LayerSlice, rng: torch.Generator):
        self.names = list(layers.trained)
        self.parameters = list(layers.trained.values())
        self.masters = [
            p.detach().float() if solver.fp32_masters and p.dtype != torch.float32 else p for p in self.parameters
        ]
        # Fused, because the other implementations need a temporary copy of each moment: 0.6 GB more at 7B.
        self.optimizer = torch.optim.AdamW(self.masters, lr=solver.lr, eps=1e-6, weight_decay=0.0, fused=True)
        self.states: dict[str, State] = {}
        self.step = 0
        self.rng = rng
        self.device = layers.device
        self.accumulate = solver.accumulate
        self.batches = 0
        self.fp32_masters = solver.fp32_masters
        # A mean over a million coordinates has gradients below the smallest fp16 number, one over few has not.
        halves = solver.fp32_masters and self.parameters[0].dtype == torch.float16
        self.scale = 2.0 ** round(math.log2(4 * layers.d_model)) if halves else 1.0

    def widen(self, h: Tensor) -> Tensor:
        """Losses beside fp32 masters are fp32: alpha times the scale is more than fp16 can hold."""
        return h.float() if self.fp32_masters else h

    def backward(self, loss: Tensor) -> None:
        (loss * (self.scale / self.accumulate)).backward()

    def after_batch(self) -> None:
        """Step the optimizer once enough batches were accumulated."""
        self.batches += 1
        if self.batches % self.accumulate:
            return
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float().div_(self.scale)
                parameter.grad = None  # both copies at once are a third of a gigabyte at 7B
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                master.grad = parameter.grad = None
        self.step += 1

    def checkpoint(self) -> Checkpoint:
        tensors = {f"{name}/master": m.detach() for name, m in zip(self.names, self.masters, strict=True)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state[master].items()}
        return Checkpoint(step=self.step, tensors=tensors, states=self.states, rng=self.rng)

    def restore(self, saved: Checkpoint) -> None:
        self.step = saved.step
        self.states = {
            topic: {key: value.to(self.device) for key, value in state.items()} for topic, state in saved.states.items()
        }
        self.rng.set_state(saved.rng.get_state())
        with torch.no_grad():
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
                master.copy_(saved.tensors[f"{name}/master"])
                parameter.copy_(master)
                self.optimizer.state[master] = {
                    key: saved.tensors[f"{name}/{key}"].to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }


class _Recordings:
    """Records batches, and keeps those that the schedule uses again while they fit half of the free memory."""

    def __init__(self, layers: LayerSlice, coming: Iterable[Batch]):
        self.layers = layers
        self.uses = Counter(id(batch) for batch in coming)
        self.kept: dict[int, Recording] = {}
        self.budget = free_bytes(layers.device) // 2

    def of(self, batch: Batch) -> Recording:
        key = id(batch)
        recording = self.kept.pop(key, None)
        if recording is None:
            recording = self.layers.record(batch)
        else:
            self.budget += recording.nbytes
        self.uses[key] -= 1
        if self.uses[key] > 0 and recording.nbytes <= self.budget:
            self.kept[key] = recording
            self.budget -= recording.nbytes
        return recording
