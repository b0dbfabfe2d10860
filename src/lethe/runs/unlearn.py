"""One run: load the first layers, unlearn, measure with the whole model, write the run folder."""

import contextlib
import dataclasses
import gc
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lethe.advice.layer_search import LayerSearch
from lethe.errors import RunFolderError
from lethe.evaluation import eval_sets
from lethe.evaluation.measure import Comparison, check_refusals, compare
from lethe.evaluation.results import measured_on
from lethe.inference.loaded_model import LoadedModel
from lethe.methods.protocol import SteeringMethod
from lethe.model.checkpoint_files import checkpoint_files, model_folder
from lethe.model.loading import load_tokenizer
from lethe.model.patch import Patch
from lethe.report import pages as report
from lethe.report.record import RunRecord
from lethe.runs import config as configs
from lethe.runs import config_file, inputs, sets_of_run, solve
from lethe.runs.config import RunConfig
from lethe.runs.config_file import method_name
from lethe.runs.run_folder import RunFolder
from lethe.runs.sharing import Sharing
from lethe.solvers import protocol, request_sums
from lethe.system import machine
from lethe.system.progress import Progress
from lethe.types import HistoryRow, Scores


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
    method: SteeringMethod,
    config: RunConfig,
    *,
    command: str = "",
    progress: Progress | None = None,
    sharing: Sharing | None = None,
) -> Result:
    """Unlearn the forget corpora and write the run folder `config.out`.

    An interrupted run goes on from its last checkpoint when it is called again with the same method and config, and
    ends with the same bytes of patch.safetensors. What runs beside each other have in common they find in `sharing`.

    Raises: any error of types.py; RunFolderError for a folder that holds another run, or this one complete.
    """
    is_alone = sharing is None
    progress, sharing = progress or Progress(), sharing or Sharing()
    about = config_file.plain(method, config)
    folder = RunFolder(config.out)
    if folder.holds(about) and folder.is_complete:
        raise RunFolderError(f"{config.out} holds this run, complete.\nChoose another --out, or delete the folder.")
    clock = _Clock(machine.find_device(config.device))

    with (
        machine.threads(config.threads),
        machine.explaining_memory(
            f"with layers 0..{config.layer}, {config.batch_size} rows of up to {max(config.max_length)} tokens.\n"
            "Lower --batch-size (and raise --accumulate), --max-length or --layer, or pass --dtype bfloat16; "
            "--evaluate none spares loading the whole model."
        ),
    ):
        with clock.phase("load"):
            source = inputs.model_source(config.model)
            dtype = inputs.find_dtype(config.dtype, source, config.revision, clock.device)
            inputs.check_layer(config)
            named, rows = (source, config.revision), (method.reads, configs.of_corpora(config))
            tokenizer = sharing.once("tokenizer", named, lambda: load_tokenizer(*named))
            start = solve.earlier_patch(config)
            material = sharing.once("material", rows, lambda: solve.read(method, config, tokenizer))
            sets = sharing.once(
                "sets",
                rows,
                lambda: sets_of_run.of_run(config, material.forget, material.retain, material.asked, tokenizer),
            )
        refused: float | None = None
        if material.asked is not None:
            with clock.phase("ask reference prompts"):
                whole = LoadedModel(model=inputs.load(config, clock.device, dtype, sharing), tokenizer=tokenizer)
                reference = material.asked.reference
                refused = sharing.once(
                    "refused", rows, lambda: check_refusals(whole, reference, eval_sets.wanted(config))
                )
                del whole
        with folder.open(about):
            with clock.phase("train"):
                edit = solve.find(method, config, material, tokenizer, clock.device, dtype, folder, progress, sharing)
            clock.split("train", "record", edit.recording_seconds)
            patch = _patch(edit, start, method, config)
            patch.save(folder.patch)
            if edit.requests:
                request_sums.save(edit.requests, folder.sums)
            warnings, history, facts = edit.warnings, edit.history, edit.facts
            # The whole model comes next; where both do not fit, the part that was trained must be gone. Cells of a
            # sweep share one model, and collecting would be most of the time of a small one.
            del edit
            if is_alone and config.evaluate == "all":
                gc.collect()
            found = Comparison()
            with clock.phase("evaluate"):
                if config.evaluate == "all":
                    found = compare(
                        inputs.load(config, clock.device, dtype, sharing),
                        tokenizer,
                        patch,
                        sets,
                        progress,
                        show_forget=config.show_forget,
                        start=start,
                        first=config.trained_layers[0],
                        sharing=sharing,
                    )
            searched = None if config.layers_from is None else LayerSearch.load(config.layers_from)
            record = dataclasses.replace(
                _record(method, config, command, patch, folder, history, found, warnings, clock),
                measured_on=measured_on(found.after, sets),
                solution=tuple(facts),
                reference_refusal_rate=refused,
                layer_search=None if searched is None else dataclasses.asdict(searched),
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


def _patch(edit: protocol.Edit, start: Patch | None, method: SteeringMethod, config: RunConfig) -> Patch:
    about = config_file.plain(method, config)
    # Where a run is kept is no property of its edit: equal runs give equal patches.
    del about["run"]["out"]
    versions = machine.describe(torch.device("cpu"))
    patch = Patch.from_parameters(
        edit.model,
        edit.values,
        base=model_folder(inputs.model_source(config.model), config.revision),
        method=method_name(method),
        config=about,
        versions={key: versions[key] for key in ("lethe", "torch", "transformers")},
    )
    return dataclasses.replace(patch.over(start) if start else patch, model=config.model)


def _record(
    method: SteeringMethod,
    config: RunConfig,
    command: str,
    patch: Patch,
    folder: RunFolder,
    history: Sequence[HistoryRow],
    found: Comparison,
    warnings: Sequence[str],
    clock: "_Clock",
) -> RunRecord:
    about = config_file.plain(method, config)
    content = folder.patch.read_bytes()
    base = checkpoint_files(model_folder(inputs.model_source(config.model), config.revision))
    return RunRecord(
        name=folder.path.resolve().name,
        command=command,
        model=config.model,
        method={"name": about["method"].pop("name"), "source": method.source, "fields": about["method"]},
        config={**about["run"], "train_layers": list(config.trained_layers)},
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
