"""The only optimisation loop: it moves the trained weights until a method's losses are small.

It does not know its method, nor what the method looks at: it asks for a loss on each side and steps.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lethe.data.batches import Schedule
from lethe.errors import DivergedError, InvalidValueError
from lethe.methods.protocol import Method, Side
from lethe.model.slice import LayerSlice, Recording
from lethe.solvers.protocol import Cost, Edit, Problem, Work
from lethe.solvers.training_state import Checkpoint
from lethe.system.machine import free_bytes, peak_mb
from lethe.types import Activation, Batch, HistoryRow, State

EXPLODED = 1e4
"""A total loss of this many times the largest of the first ten is taken for divergence."""
WARN_EVERY = 50
"""Steps from one look at what the method warns of to the next."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """AdamW with a constant learning rate, weight decay 0, eps 1e-6 and no clipping, as in the published code."""

    source: ClassVar[str] = "Li et al. 2024, The WMDP Benchmark, arXiv 2403.03218: RMU's training loop"
    is_one_matrix: ClassVar[bool] = False
    keeps_requests: ClassVar[bool] = False

    steps: int = 150
    """Optimizer steps over all topics together."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    lr: float = 5e-5
    """Learning rate of AdamW, constant."""
    fp32_masters: bool = True
    """Keep fp32 copies of trained bf16 or fp16 matrices: a step of 5e-5 is about one bf16 ulp of a weight of 1e-2.
    The published code has none."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"'{name}' must be at least 1. Got {getattr(self, name)}.")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidValueError(f"'lr' must be a positive number. Got {self.lr}.")

    def accepts(self, method: Method) -> str | None:
        """Any method."""
        return None

    def as_published(self) -> "Gradient":
        """Without fp32 masters."""
        return replace(self, fp32_masters=False)

    def cost(self, problem: Problem) -> Cost:
        """Initial and last good copies, gradients, fp32 masters and AdamW's moments; a step of two batches."""
        moving = sum(map(math.prod, problem.trained.values()))
        copies = 3 * problem.dtype.itemsize + 8
        if self.fp32_masters and problem.dtype != torch.float32:
            copies += 8
        loaded, replayed = sum(problem.layers), sum(problem.layers[problem.first :])
        # Record 0..l once, run the slice once, and go back through its inputs and trained weights.
        products = 2 * loaded + 2 * replayed + 2 * (replayed - problem.layers[problem.first]) + 2 * moving
        return Cost(
            nbytes=moving * copies,
            flops=2.0 * products * problem.batch_tokens * self.accumulate,
            passes=self.steps,
        )

    def solve(self, method: Method, work: Work) -> Edit:
        """Train the slice; an interrupted training goes on from what the log resumes.

        Raises: DivergedError, as `train`.
        """
        schedule, layers, log = work.schedule(self.steps, self.accumulate), work.slice(), work.log
        work.memo["check"](
            (layers.start_at_layer, layers.stop_at_layer, *layers.trained), lambda: layers.check(schedule.at(0)[1])
        )
        resume = log.resume()
        work.progress.phase("unlearn", self.steps * self.accumulate)
        for row in log.history:
            work.progress.advance(f"step {row.step} done before")
        warned: set[str] = set()

        def on_row(row: HistoryRow) -> None:
            log.row(row)
            if (row.step + 1) % WARN_EVERY == 0 or len(log.history) == schedule.steps:
                for warning in method.warnings(log.history):
                    # The numbers in a warning change as the run goes on; one warning a topic is enough.
                    if (topic := warning.split(":")[0]) not in warned:
                        warned.add(topic)
                        work.progress.warn(warning)
            losses = f"{row.topic}  forget {row.forget_loss:.3g}  retain {row.retain_loss:.3g}"
            work.progress.advance(f"{losses}  {method.shown.format(**row.measures)}".rstrip())

        try:
            self.train(
                layers,
                method,
                schedule,
                torch.Generator().manual_seed(work.seed),
                resume=resume,
                on_row=on_row,
                on_checkpoint=log.checkpoint,
                checkpoint_every=log.every,
            )
            values = layers.delta()
        finally:
            layers.restore()
        return Edit(
            model=layers.model,
            values=values,
            history=tuple(log.history),
            warnings=method.warnings(log.history),
            recording_seconds=layers.recording_seconds,
        )

    def train(
        self,
        layers: LayerSlice,
        method: Method,
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

            # One side after the other: the graph of the first is gone before the second's is made.
            forgetting = method.forget_loss(training.side(forget), state)
            training.backward(forgetting.loss)
            keeping = method.retain_loss(training.side(retain, method.disturbance(retain, rng)), state, rng)
            training.backward(method.alpha * keeping.loss)

            measures = training.measures(
                forgetting.measures,
                keeping.measures,
                {"forget_loss": forgetting.loss, "retain_loss": keeping.loss, "gradient": training.gradient_norm()},
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
            on_row(
                HistoryRow(
                    step=step,
                    topic=topic.name,
                    forget_loss=measures.pop("forget_loss"),
                    retain_loss=measures.pop("retain_loss"),
                    seconds=time.perf_counter() - started,
                    peak_mb=peak_mb(layers.device),
                    measures=measures,
                )
            )
            if training.step > step and (training.step % checkpoint_every == 0 or training.step == total):
                good, good_step = layers.delta(), training.step
                on_checkpoint(training.checkpoint())


class _Training:
    """The part of a training that changes: masters, optimizer, states and the step count."""

    def __init__(self, solver: Gradient, layers: LayerSlice, rng: torch.Generator):
        self.layers = layers
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
        # Losses beside fp32 masters are fp32: alpha times the scale is more than fp16 can hold.
        self.dtype = torch.float32 if solver.fp32_masters else self.parameters[0].dtype
        # A mean over a million coordinates has gradients below the smallest fp16 number, one over few has not.
        halves = solver.fp32_masters and self.parameters[0].dtype == torch.float16
        self.scale = 2.0 ** round(math.log2(4 * layers.d_model)) if halves else 1.0

    def side(self, recording: Recording, noise: Tensor | None = None) -> Side[Activation]:
        """What the slice shows of a batch now."""
        now = Activation(h=self.layers(recording, noise), mask=recording.batch.mask)
        return Side(batch=recording.batch, frozen=recording.frozen, now=now, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss * (self.scale / self.accumulate)).backward()

    def gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.stack([g.norm(dtype=torch.float32) for g in gradients]).norm()

    def measures(self, *parts: Any) -> dict[str, float]:
        """All numbers of a step, in one transfer from the device."""
        named: dict[str, Tensor] = {name: value for part in parts for name, value in part.items()}
        values = torch.stack([value.detach().float().to(self.device) for value in named.values()]).tolist()
        return dict(zip(named, values, strict=True))

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
