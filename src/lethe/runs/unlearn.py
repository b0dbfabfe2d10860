"""One run: load the first layers, unlearn, measure with the whole model, write the run folder."""

import contextlib
import dataclasses
import gc
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lethe.data.prompt_corpora import PromptCorpora
from lethe.errors import RunFolderError
from lethe.evaluation.measure import Comparison, Measured, Metrics, by_name, compared, measure_edit
from lethe.evaluation.results import measured_on
from lethe.methods.protocol import Method
from lethe.metrics.protocol import Combination, Metric
from lethe.model.checkpoint_files import checkpoint_files
from lethe.model.patch import Patch
from lethe.report import pages as report
from lethe.report.record import RunRecord
from lethe.runs import config_file, solve
from lethe.runs.config import RunConfig
from lethe.runs.config_file import method_name
from lethe.runs.run_folder import RunFolder
from lethe.runs.workspace import Workspace
from lethe.solvers.protocol import Edit
from lethe.system import machine
from lethe.system.progress import Progress
from lethe.types import EvalSet, HistoryRow, Scores


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
    method: Method,
    config: RunConfig,
    *,
    command: str = "",
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    metrics: Sequence[Metric | Combination] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Result:
    """Unlearn the forget corpora and write the run folder `config.out`.

    An interrupted run goes on from its last checkpoint when it is called again with the same method and config, and
    ends with the same bytes of patch.safetensors. Runs beside each other share a `workspace`. Without `metrics` those
    of the config measure, by default all on the shelf. `provenance` are fields of the record
    that say where settings came from.

    Raises: any error of errors.py; RunFolderError for a folder that holds another run, or this one complete.
    """
    progress = progress or Progress()
    about = config_file.plain(method, config)
    folder = RunFolder(config.out)
    if folder.holds(about) and folder.is_complete:
        raise RunFolderError(f"{config.out} holds this run, complete.\nChoose another --out, or delete the folder.")
    clock = _Clock(machine.find_device(config.base.device))
    with (
        machine.threads(config.base.threads),
        machine.explaining_memory(
            f"with layers 0..{config.layer}, {config.batching.batch_size} rows of up to "
            f"{max(config.batching.max_length)} tokens.\n"
            "Lower --batch-size (and raise --accumulate), --max-length or --layer, or pass --dtype bfloat16; "
            "--evaluate none spares loading the whole model."
        ),
    ):
        with clock.phase("load"):
            workspace = workspace or Workspace(config.base)
            workspace.check_layer(config.layer)
            start = solve.earlier_patch(config)
            corpora = workspace.corpora(config.data, method.reads)
            sets = workspace.sets(config, corpora)
            measured_by = by_name(metrics) if metrics else workspace.metrics(config, corpora, sets)
        refused: float | None = None
        if isinstance(corpora, PromptCorpora):
            with clock.phase("ask reference prompts"):
                refused = workspace.refusal_rate(corpora, config.evaluation)
        with folder.open(about):
            with clock.phase("train"):
                log = solve.FolderLog(folder, getattr(config.solver, "steps", 0))
                edit = solve.solve(method, config, workspace, corpora, log=log, folder=folder, progress=progress)
            clock.split("train", "record", edit.recording_seconds)
            patch = _patch(edit, start, method, config, workspace.folder)
            patch.save(folder.patch)
            warnings, history, facts = edit.warnings, edit.history, edit.facts
            # The whole model comes next; where both do not fit, the part that was trained must be gone. Cells of a
            # sweep share one model, and collecting would be most of the time of a small one.
            del edit
            if not workspace.is_shared and config.evaluation.evaluate == "all":
                gc.collect()
            found = Comparison()
            with clock.phase("evaluate"):
                if config.evaluation.evaluate == "all":
                    found = _compare(workspace, patch, start, sets, measured_by, config, progress)
            record = dataclasses.replace(
                _record(method, config, command, patch, folder, history, found, warnings, clock, workspace.folder),
                measured_on=measured_on(found.after, sets),
                solution=tuple(facts),
                reference_refusal_rate=refused,
                **(provenance or {}),
            )
            folder.write_json("per_example.json", record.examples_to_json())
            folder.write_json("environment.json", record.environment)
            report.write_report(folder.path, record)
            # Last, because its presence says that the run is complete.
            folder.write_json("report.json", record.to_json())
            folder.drop_checkpoint()
    return Result(
        folder=config.out,
        patch=patch,
        history=tuple(history),
        before=found.before,
        after=found.after,
        warnings=warnings,
    )


def _compare(
    workspace: Workspace,
    patch: Patch,
    start: Patch | None,
    sets: Sequence[EvalSet],
    metrics: Metrics,
    config: RunConfig,
    progress: Progress,
) -> Comparison:
    """Scores before and after; before is measured once for all runs of a workspace on the same sets."""
    model, tokenizer = workspace.model(), workspace.tokenizer
    shown = config.evaluation.show_forget
    progress.phase("measure before and after", 2 * len(sets))

    def read(edit: Patch | None, first: int | None) -> Measured:
        with workspace.reading(model, first):
            return measure_edit(
                model,
                tokenizer,
                edit,
                sets,
                progress,
                show_forget=shown,
                metrics=metrics,
                samples=config.evaluation.samples,
                seed=config.seed,
            )

    key = (tuple(sets), repr(metrics), config.evaluation.samples, config.seed, shown, config.on)
    before = workspace.before(key, lambda: read(start, None))
    return compared(before, read(patch, config.trained_layers[0]))


def _patch(edit: Edit, start: Patch | None, method: Method, config: RunConfig, base: Path) -> Patch:
    about = config_file.plain(method, config)
    # Where a run is kept is no property of its edit: equal runs give equal patches.
    del about["run"]["out"]
    versions = machine.describe(torch.device("cpu"))
    patch = Patch.from_parameters(
        edit.model,
        edit.values,
        base=base,
        method=method_name(method),
        config=about,
        versions={key: versions[key] for key in ("lethe", "torch", "transformers")},
    )
    return dataclasses.replace(patch.over(start) if start else patch, model=config.base.model)


def _record(
    method: Method,
    config: RunConfig,
    command: str,
    patch: Patch,
    folder: RunFolder,
    history: Sequence[HistoryRow],
    found: Comparison,
    warnings: Sequence[str],
    clock: "_Clock",
    base_folder: Path,
) -> RunRecord:
    about = config_file.plain(method, config)["method"]
    content = folder.patch.read_bytes()
    base = checkpoint_files(base_folder)
    return RunRecord(
        name=folder.path.resolve().name,
        command=command,
        model=config.base.model,
        method={"name": about.pop("name"), "source": method.source, "fields": about},
        config={**config_file.flat(config), "train_layers": list(config.trained_layers)},
        before=found.before,
        after=found.after,
        history=tuple(history),
        environment=machine.describe(clock.device),
        timing=clock.timing,
        patch={
            "file": folder.patch.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "tensors": list(patch.tensors),
            "share_of_model": len(content) / sum(file.stat().st_size for file in set(base.values())),
        },
        samples=tuple(found.samples),
        warnings=tuple(warnings),
    )


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
        self.timing[name] = {"seconds": seconds, "peak_mb": machine.peak_mb(self.device)}

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Report a part of a phase as a phase of its own."""
        whole = self.timing.pop(phase)
        self.timing[part] = {**whole, "seconds": seconds}
        self.timing[phase] = {**whole, "seconds": whole["seconds"] - seconds}
