"""One run: load the first layers, unlearn, measure with the whole model, write the run folder."""

import contextlib
import dataclasses
import gc
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lethe import config as configs
from lethe import environment, report, sources
from lethe.checkpoint import Checkpoint
from lethe.config import RunConfig, method_name
from lethe.corpora import Schedule
from lethe.evaluate import Comparison, compare
from lethe.folder import RunFolder
from lethe.history import STALLED_AFTER, stalled
from lethe.patch import Patch
from lethe.progress import Progress
from lethe.protocols import SteeringMethod
from lethe.slice import LayerSlice
from lethe.solvers import Gradient
from lethe.types import RUN_FORMAT, HistoryRow, RunFolderError, Scores
from lethe.weights import checkpoint_files, load_model, load_tokenizer, model_folder


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run found, and the folder it is written in."""

    folder: Path
    patch: Patch
    history: tuple[HistoryRow, ...]
    before: dict[str, Scores]
    """Scores by `metric/set`; empty if the run was not to be evaluated."""
    after: dict[str, Scores]
    warnings: tuple[str, ...]


def unlearn(
    method: SteeringMethod, config: RunConfig, *, command: str = "", progress: Progress | None = None
) -> Result:
    """Unlearn the forget corpora and write the run folder `config.out`.

    An interrupted run goes on from its last checkpoint when it is called again with the same method and config, and
    ends with the same bytes of patch.safetensors.

    Raises: any error of types.py; RunFolderError for a folder that holds another run, or this one complete.
    """
    progress = progress or Progress()
    about = configs.plain(method, config)
    folder = RunFolder(config.out)
    if folder.holds(about) and folder.is_complete:
        raise RunFolderError(f"{config.out} holds this run, complete.\nChoose another --out, or delete the folder.")
    clock = _Clock(environment.find_device(config.device))

    with (
        environment.threads(config.threads),
        environment.explaining_memory(
            f"with layers 0..{config.layer}, {config.batch_size} rows of up to {max(config.max_length)} tokens.\n"
            "Lower --batch-size (and raise --accumulate), --max-length or --layer, or pass --dtype bfloat16; "
            "--evaluate none spares loading the whole model."
        ),
    ):
        with clock.phase("load"):
            source = sources.model_source(config.model)
            dtype = sources.find_dtype(config.dtype, source, config.revision, clock.device)
            sources.check_layer(config)
            tokenizer = load_tokenizer(source, config.revision)
            forget, retain = sources.read_corpora(config)
            sets = sources.eval_sets(config, forget, retain)
            plan = sources.training_schedule(config, forget, retain, tokenizer)
            layers = sources.load_slice(config, clock.device, dtype)
            layers.check(plan.at(0)[1])
        with folder.open(about):
            with clock.phase("train"):
                history = _train(layers, method, config, plan, folder, progress)
                warnings = stalled(history)
            clock.split("train", "record", layers.recording_seconds)
            patch = _patch(layers, method, config)
            patch.save(folder.patch)
            # The whole model comes next; where both do not fit, the slice must be gone.
            del layers
            gc.collect()
            found = Comparison()
            with clock.phase("evaluate"):
                if config.evaluate == "all":
                    model = load_model(source, dtype=dtype, device=str(clock.device), revision=config.revision)
                    found = compare(model, tokenizer, patch, sets, progress, show_forget=config.show_forget)
            written = _report(method, config, command, patch, folder, history, found, warnings, clock)
            folder.write_json("per_example.json", {"before": _examples(found.before), "after": _examples(found.after)})
            folder.write_json("environment.json", written["environment"])
            report.write_report(folder.path, written)
            # Last, because its presence says that the run is complete.
            folder.write_json("report.json", written)
            folder.drop_checkpoint()
    return Result(
        folder=config.out,
        patch=patch,
        history=tuple(history),
        before=found.before,
        after=found.after,
        warnings=warnings,
    )


def _train(
    layers: LayerSlice,
    method: SteeringMethod,
    config: RunConfig,
    plan: Schedule,
    folder: RunFolder,
    progress: Progress,
) -> list[HistoryRow]:
    solver = Gradient(lr=config.lr, accumulate=config.accumulate, fp32_masters=not config.as_published)
    checkpoint = folder.checkpoint()
    history = folder.history(until=checkpoint.step if checkpoint else 0)
    warned: set[str] = set()
    last_saved, save_seconds = time.monotonic(), 0.0
    progress.phase("unlearn", plan.steps)
    for row in history:
        progress.advance(f"step {row.step} done before")

    def on_row(row: HistoryRow) -> None:
        history.append(row)
        folder.append_history(row)
        if (row.step + 1) % STALLED_AFTER == 0 or len(history) == plan.steps:
            for warning in stalled(history):
                # The numbers in a warning change as the run goes on; one warning a topic is enough.
                if (topic := warning.split(":")[0]) not in warned:
                    warned.add(topic)
                    progress.warn(warning)
        progress.advance(
            f"{row.topic}  forget {row.forget_loss:.3g}  retain {row.retain_loss:.3g}  "
            f"norm {row.forget_norm.mean:.3g} of {row.target_norm:.3g}"
        )

    def on_checkpoint(checkpoint: Checkpoint) -> None:
        nonlocal last_saved, save_seconds
        # Two gigabytes a checkpoint at 7B: saving may take a twentieth of the time, not more.
        if checkpoint.step < config.steps and time.monotonic() - last_saved < 20 * save_seconds:
            return
        started = time.monotonic()
        folder.save_checkpoint(checkpoint)
        last_saved = time.monotonic()
        save_seconds = last_saved - started

    solver.solve(
        layers,
        configs.as_run(method, config),
        plan,
        torch.Generator().manual_seed(config.seed),
        resume=checkpoint,
        on_row=on_row,
        on_checkpoint=on_checkpoint,
    )
    return history


def _patch(layers: LayerSlice, method: SteeringMethod, config: RunConfig) -> Patch:
    about = configs.plain(method, config)
    # Where a run is kept is no property of its edit: equal runs give equal patches.
    del about["run"]["out"]
    versions = environment.describe(layers.device)
    patch = Patch.from_parameters(
        layers.model,
        layers.delta(),
        base=model_folder(sources.model_source(config.model), config.revision),
        method=method_name(method),
        config=about,
        versions={key: versions[key] for key in ("lethe", "torch", "transformers")},
    )
    return dataclasses.replace(patch, model=config.model)


def _report(
    method: SteeringMethod,
    config: RunConfig,
    command: str,
    patch: Patch,
    folder: RunFolder,
    history: Sequence[HistoryRow],
    found: Comparison,
    warnings: Sequence[str],
    clock: "_Clock",
) -> dict[str, Any]:
    """The content of report.json."""
    about = configs.plain(method, config)
    content = folder.patch.read_bytes()
    base = checkpoint_files(model_folder(sources.model_source(config.model), config.revision))
    return {
        "format": RUN_FORMAT,
        "command": command,
        "model": config.model,
        "method": {"name": about["method"].pop("name"), "source": method.source, "fields": about["method"]},
        "config": {**about["run"], "train_layers": list(config.trained_layers)},
        "before": {name: scores.summary() for name, scores in found.before.items()},
        "after": {name: scores.summary() for name, scores in found.after.items()},
        "history": [row.as_dict() for row in history],
        "environment": environment.describe(clock.device),
        "timing": clock.timing,
        "patch": {
            "file": folder.patch.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "tensors": list(patch.tensors),
            "share_of_model": len(content) / sum(file.stat().st_size for file in set(base.values())),
        },
        "samples": list(found.samples),
        "warnings": list(warnings),
    }


def _examples(scores: dict[str, Scores]) -> dict[str, list[float]]:
    return {name: list(found.per_example) for name, found in scores.items()}


class _Clock:
    """Seconds and peak memory of each phase."""

    def __init__(self, device: torch.device):
        self.device = device
        self.timing: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.timing[name] = {"seconds": seconds, "peak_mb": environment.peak_mb(self.device)}

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Report a part of a phase as a phase of its own."""
        whole = self.timing.pop(phase)
        self.timing[part] = {**whole, "seconds": seconds}
        self.timing[phase] = {**whole, "seconds": whole["seconds"] - seconds}
