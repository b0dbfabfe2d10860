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
from lethe.methods.protocol import Method, Side, Term
from lethe.model.view import Disturbance, Recording, View
from lethe.solvers import optimizers
from lethe.solvers.optimizers.learning_rate import LearningRate
from lethe.solvers.protocol import Cost, Edit, Problem, Work
from lethe.solvers.training_state import Checkpoint
from lethe.system.machine import free_bytes, peak_mb
from lethe.system.plugins import discover, nearest
from lethe.types import Batch, HistoryRow, State

EXPLODED = 1e4
"""Losses, of both sides by their size, of this many times the largest of the first ten are taken for divergence."""
WARN_EVERY = 50
"""Steps from one look at what the method warns of to the next."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Step by step, by default with AdamW at a constant rate and no clipping, as in the published code."""

    source: ClassVar[str] = "Li et al. 2024, The WMDP Benchmark, arXiv 2403.03218: RMU's training loop"
    is_one_matrix: ClassVar[bool] = False
    keeps_requests: ClassVar[bool] = False

    steps: int = 150
    """Optimizer steps over all topics together."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    optimizer: str = "adamw"
    """adamw (published), muon (on matrices, AdamW on the rest) or sgd; see `lethe ls optimizers`."""
    lr: float | None = None
    """Learning rate; by default the optimizer's own: 5e-5 of AdamW, 0.02 of Muon, 2e-4 of SGD."""
    warm_up: int = 0
    """Steps over which the learning rate rises to its full value; 0 as published."""
    decay: float = 0.0
    """Share of all steps, the last ones, over which it falls to zero; 0 as published."""
    fp32_masters: bool = True
    """Keep fp32 copies of trained bf16 or fp16 matrices: a step of 5e-5 is about one bf16 ulp of a weight of 1e-2.
    The published code has none."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"'{name}' must be at least 1. Got {getattr(self, name)}.")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidValueError(f"'lr' must be a positive number. Got {self.lr}.")
        self.learning_rate  # noqa: B018 - refuses what it cannot do

    @property
    def learning_rate(self) -> LearningRate:
        """How the rate changes over a run."""
        return LearningRate(warm_up=self.warm_up, decay=self.decay)

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
        schedule, view, log = work.schedule(self.steps, self.accumulate), work.view(), work.log
        work.memo["check"](
            (type(view), view.start_at_layer, view.stop_at_layer, *view.trained),
            lambda: view.check(schedule.at(0)[1]),
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
                view,
                method,
                schedule,
                torch.Generator().manual_seed(work.seed),
                resume=resume,
                on_row=on_row,
                on_checkpoint=log.checkpoint,
                checkpoint_every=log.every,
            )
            values = view.delta()
        finally:
            view.restore()
        return Edit(
            model=view.model,
            values=values,
            history=tuple(log.history),
            warnings=method.warnings(log.history),
            recording_seconds=view.recording_seconds,
        )

    def train(
        self,
        view: View[Any, Any],
        method: Method,
        schedule: Schedule,
        rng: torch.Generator,
        *,
        resume: Checkpoint | None = None,
        on_row: Callable[[HistoryRow], None] = lambda row: None,
        on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
        checkpoint_every: int = 10,
    ) -> None:
        """Train what moves in the view in place.

        `on_row` sees every batch as it ends. `on_checkpoint` gets what is needed to go on from there, every
        `checkpoint_every` steps and at the end; its tensors are the live ones, to be saved before it returns.
        With `resume` the run goes on to the same final weights, bit for bit.

        Raises: DivergedError when a loss or gradient is not finite, or the loss exceeds 10000 times the largest of
        the first ten; the model then holds the weights of the last checkpoint.
        """
        training = _Training(self, view, rng, schedule.steps // self.accumulate)
        if resume is not None:
            training.restore(resume)
        total = schedule.steps // self.accumulate
        coming = [schedule.at(i) for i in range(training.step * self.accumulate, total * self.accumulate)]
        read = [(forget, retain) if method.reads_retain else (forget,) for _, forget, retain in coming]
        recordings = _Recordings(view, [batch for batches in read for batch in batches])
        good, good_step = training.copies(), training.step
        sizes: list[float] = []

        for topic, forget_batch, retain_batch in coming:
            started = time.perf_counter()
            if topic.name not in training.states:
                training.states[topic.name] = method.prepare(view, topic, rng)
            forget = recordings.of(forget_batch)
            retain = recordings.of(retain_batch) if method.reads_retain else None
            state = method.update(forget.frozen, training.states[topic.name])
            training.states[topic.name] = state

            # One side after the other: the graph of the first is gone before the second's is made.
            forgetting = method.forget_loss(training.side(forget), state)
            training.backward(forgetting.loss)
            keeping = Term(loss=torch.zeros(()))
            if retain is not None:
                keeping = method.retain_loss(training.side(retain, method.disturbance(retain, rng)), state, rng)
                training.backward(method.alpha * keeping.loss)

            measures = training.measures(
                forgetting.measures,
                keeping.measures,
                {"forget_loss": forgetting.loss, "retain_loss": keeping.loss, "gradient": training.gradient_norm()},
            )
            # A loss to ascend is below zero, and the two together may be next to nothing.
            size = abs(measures["forget_loss"]) + method.alpha * abs(measures["retain_loss"])
            exploded = size > EXPLODED * max(sizes[:10], default=math.inf)
            sizes.append(size)
            step = training.step
            if exploded or not all(map(math.isfinite, measures.values())):
                for name, parameter in view.trained.items():
                    parameter.data.copy_(good[name])
                raise DivergedError(
                    f"training diverged at step {step}: forget loss {measures['forget_loss']:.3g}, retain loss "
                    f"{measures['retain_loss']:.3g}, gradient norm {measures['gradient']:.3g}.\n"
                    f"The weights of step {good_step} were kept. "
                    f"Lower --lr (now {training.lr:g}), --alpha or the target's length."
                )
            training.after_batch()
            on_row(
                HistoryRow(
                    step=step,
                    topic=topic.name,
                    forget_loss=measures.pop("forget_loss"),
                    retain_loss=measures.pop("retain_loss"),
                    seconds=time.perf_counter() - started,
                    peak_mb=peak_mb(view.device),
                    measures=measures,
                )
            )
            if training.step > step and (training.step % checkpoint_every == 0 or training.step == total):
                good, good_step = training.copies(), training.step
                on_checkpoint(training.checkpoint())


def optimizer_of(name: str, lr: float | None) -> Any:
    """An optimizer of the shelf by its name, with this learning rate or its own.

    Raises: InvalidValueError for a name that is none.
    """
    known = discover(optimizers)
    if name not in known:
        raise InvalidValueError(f"'optimizer' must be one of {', '.join(known)}. Got {name}.{nearest(name, known)}")
    return known[name]() if lr is None else known[name](lr=lr)


class _Training:
    """The part of a training that changes: masters, optimizer, states and the step count."""

    def __init__(self, solver: Gradient, view: View[Any, Any], rng: torch.Generator, steps: int):
        self.view = view
        self.names = list(view.trained)
        self.parameters = list(view.trained.values())
        self.masters = [
            p.detach().float() if solver.fp32_masters and p.dtype != torch.float32 else p for p in self.parameters
        ]
        optimizer = optimizer_of(solver.optimizer, solver.lr)
        self.optimizer = optimizer.build(dict(zip(self.names, self.masters, strict=True)))
        self.lr: float = optimizer.lr
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.learning_rate, self.steps = solver.learning_rate, steps
        self.states: dict[str, State] = {}
        self.step = 0
        self.rng = rng
        self.device = view.device
        self.accumulate = solver.accumulate
        self.batches = 0
        # Losses beside fp32 masters are fp32: alpha times the scale is more than fp16 can hold.
        self.dtype = torch.float32 if solver.fp32_masters else self.parameters[0].dtype
        # A mean over a million coordinates has gradients below the smallest fp16 number, one over few has not.
        halves = solver.fp32_masters and self.parameters[0].dtype == torch.float16
        self.scale = 2.0 ** round(math.log2(4 * view.d_model)) if halves else 1.0

    def side(self, recording: Recording[Any], disturbance: Disturbance | None = None) -> Side[Any]:
        """What the view shows of a batch now."""
        now = self.view.see(recording, disturbance)
        return Side(batch=recording.batch, frozen=recording.frozen, now=now, dtype=self.dtype)

    def copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in zip(self.names, self.parameters, strict=True)}

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
        share = self.learning_rate.share(self.step, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
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
                    key.removeprefix(f"{name}/"): value.to(master.device)
                    for key, value in saved.tensors.items()
                    if key.startswith(f"{name}/") and key != f"{name}/master"
                }


class _Recordings:
    """Records batches, and keeps those that the schedule uses again while they fit half of the free memory."""

    def __init__(self, view: View[Any, Any], coming: Iterable[Batch]):
        self.view = view
        self.uses = Counter(id(batch) for batch in coming)
        self.kept: dict[int, Recording[Any]] = {}
        self.budget = free_bytes(view.device) // 2

    def of(self, batch: Batch) -> Recording[Any]:
        key = id(batch)
        recording = self.kept.pop(key, None)
        if recording is None:
            recording = self.view.record(batch)
        else:
            self.budget += recording.nbytes
        self.uses[key] -= 1
        if self.uses[key] > 0 and recording.nbytes <= self.budget:
            self.kept[key] = recording
            self.budget -= recording.nbytes
        return recording
