"""Find the edit of a run: by the solver that its config names, alone or on top of an earlier run."""

import re
import time
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from lethe.data.batches import Schedule
from lethe.data.prompts import Prompts
from lethe.errors import RunFolderError
from lethe.methods.protocol import SteeringMethod
from lethe.model.patch import Patch
from lethe.runs import config as configs
from lethe.runs import config_file, inputs
from lethe.runs.config import RunConfig
from lethe.runs.run_folder import RunFolder
from lethe.runs.sharing import Sharing
from lethe.solvers import request_sums, ridge
from lethe.solvers.gradient import Gradient
from lethe.solvers.history import STALLED_AFTER, stalled
from lethe.solvers.protocol import Edit
from lethe.solvers.training_state import Checkpoint
from lethe.system.progress import Progress
from lethe.types import HistoryRow


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run unlearns and keeps."""

    forget: dict[str, list[str]] = field(repr=False)
    """Texts by topic; of a method that reads prompts, each prompt with its answer."""
    retain: list[str] = field(repr=False)
    asked: Prompts | None = field(repr=False)
    """The prompts themselves, for a method that reads prompts."""


def read(method: SteeringMethod, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    """The corpora in the form that the method reads.

    Raises: CorpusError.
    """
    if method.reads == "texts":
        forget, retain = inputs.read_corpora(config)
        return Material(forget=forget, retain=retain, asked=None)
    asked = inputs.read_prompts(config, tokenizer)
    forget, retain = asked.texts()
    return Material(forget=forget, retain=retain, asked=asked)


def earlier_patch(config: RunConfig) -> Patch | None:
    """The patch of the run that this one is put on top of.

    Raises: RunFolderError, also if that run edited another model.
    """
    if config.on is None:
        return None
    folder = RunFolder(config.on)
    folder.require_patch()
    other = config_file.read_run_config(folder.config)
    if (other.model, other.revision) != (config.model, config.revision):
        raise RunFolderError(
            f"{config.on} edited {other.model}, not {config.model}.\nPass --model {other.model}, or another --on."
        )
    return Patch.load(folder.patch)


def find(
    method: SteeringMethod,
    config: RunConfig,
    material: Material,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    folder: RunFolder,
    progress: Progress,
    sharing: Sharing | None = None,
) -> Edit:
    """Solve for the run's edit; a gradient run writes its history and checkpoints into `folder` and resumes from them.

    Raises: what the solvers raise.
    """
    sharing = sharing or Sharing()
    if config.solver == "gradient":
        return _train(method, config, material, tokenizer, device, dtype, folder, progress, sharing)
    method = config_file.as_run(method, config)
    ridge.check(method, config)
    held = request_sums.load(RunFolder(config.on).sums) if config.on is not None else ()
    slices = inputs.layer_slices(config, device, dtype, sharing)
    if config.withdraw is not None:
        found = ridge.solve_again(method, config, slices, request_sums.withdraw(held, config.withdraw))
    else:
        topics, retain = sharing.once(
            "rows",
            configs.of_corpora(config),
            lambda: inputs.one_pass(config, material.forget, material.retain, material.asked, tokenizer),
        )
        found = ridge.solve(method, config, slices, topics, retain, held, progress, sharing)
    return Edit(
        model=slices[0].model,
        values=found.values,
        requests=found.requests,
        facts=found.facts,
        recording_seconds=sum(layers.recording_seconds for layers in slices),
    )


def _train(
    method: SteeringMethod,
    config: RunConfig,
    material: Material,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    folder: RunFolder,
    progress: Progress,
    sharing: Sharing,
) -> Edit:
    plan = sharing.once("plan", configs.of_corpora(config), lambda: schedule(config, material, tokenizer))
    layers = inputs.load_slice(config, device, dtype, _below(earlier_patch(config), config.layer), sharing)
    sharing.once(
        "check", (layers.start_at_layer, layers.stop_at_layer, *layers.trained), lambda: layers.check(plan.at(0)[1])
    )
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

    try:
        solver.solve(
            layers,
            config_file.as_run(method, config),
            plan,
            torch.Generator().manual_seed(config.seed),
            resume=checkpoint,
            on_row=on_row,
            on_checkpoint=on_checkpoint,
        )
        values = layers.delta()
    finally:
        layers.restore()
    return Edit(
        model=layers.model,
        values=values,
        history=tuple(history),
        warnings=stalled(history),
        recording_seconds=layers.recording_seconds,
    )


def schedule(config: RunConfig, material: Material, tokenizer: PreTrainedTokenizerBase) -> Schedule:
    """The batches of a gradient run.

    Raises: CorpusError.
    """
    if material.asked is not None:
        return inputs.prompt_schedule(config, material.asked, tokenizer)
    return inputs.training_schedule(config, material.forget, material.retain, tokenizer)


def _below(patch: Patch | None, layer: int) -> Patch | None:
    """The tensors of the patch that a model cut off after `layer` has, too."""
    if patch is None:
        return None
    kept = {
        name: value
        for name, value in patch.tensors.items()
        if all(int(number) <= layer for number in re.findall(r"\.(\d+)\.", name)[:1])
    }
    return replace(patch, tensors=kept, base_hashes={name: patch.base_hashes[name] for name in kept})
