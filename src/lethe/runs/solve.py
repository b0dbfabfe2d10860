"""Find the edit of a run: by the solver that its settings name, alone or on top of an earlier run."""

import time

from lethe.data.batches import Corpora
from lethe.errors import RunFolderError, UsageError
from lethe.methods.protocol import Method
from lethe.model.patch import Patch
from lethe.runs.config import RunConfig
from lethe.runs.config_file import read_run_config
from lethe.runs.run_folder import RunFolder
from lethe.runs.workspace import Workspace
from lethe.solvers.protocol import Edit, Log, Work
from lethe.solvers.training_state import Checkpoint
from lethe.system.progress import Progress
from lethe.types import HistoryRow


def earlier_patch(config: RunConfig) -> Patch | None:
    """The patch of the run that this one is put on top of.

    Raises: RunFolderError, also if that run edited another model.
    """
    if config.on is None:
        return None
    folder = RunFolder(config.on)
    folder.require_patch()
    other = read_run_config(folder.config)
    if (other.base.model, other.base.revision) != (config.base.model, config.base.revision):
        raise RunFolderError(
            f"{config.on} edited {other.base.model}, not {config.base.model}.\n"
            f"Pass --model {other.base.model}, or another --on."
        )
    return Patch.load(folder.patch)


def solve(
    method: Method,
    config: RunConfig,
    workspace: Workspace,
    corpora: Corpora,
    *,
    log: Log | None = None,
    folder: RunFolder | None = None,
    progress: Progress | None = None,
) -> Edit:
    """Solve for the run's edit; the workspace's model is left untouched.

    Raises: UsageError if the solver does not take the method; what the solvers raise.
    """
    if config.as_published:
        method = method.as_published()
        if config.solver.is_one_matrix and method.reads == "texts":
            raise UsageError("--as-published repeats the authors' training loop.\nPass --solver gradient.")
    if config.train == "everything" and method.view == "activations":
        raise UsageError(
            "a steering method replays the layers up to --layer alone, so it cannot train everything.\n"
            "Pass --train matrices or --train lora."
        )
    if config.train != "matrices" and config.solver.is_one_matrix:
        raise UsageError(f"--solver {config.solver_name} solves for whole matrices.\nLeave --train out.")
    if refused := config.solver.accepts(method):
        raise UsageError(refused)
    work = Work(
        name=config.out.name,
        seed=config.seed,
        view=lambda: workspace.view(config, method.view, earlier_patch(config)),
        layers=lambda: workspace.layers(config),
        schedule=lambda steps, accumulate: workspace.schedule(config, corpora, steps, accumulate),
        rows=lambda: workspace.rows(config, corpora),
        rows_key=(config.data, config.batching, config.seed),
        log=log or Log(),
        progress=progress or Progress(),
        memo=workspace.memo,
        sums=folder.sums if folder is not None else None,
        earlier=RunFolder(config.on).sums if config.on is not None else None,
        withdraw=config.withdraw,
    )
    return config.solver.solve(method, work)


class FolderLog(Log):
    """Writes a training's history and states into a run folder, and resumes from them."""

    def __init__(self, folder: RunFolder, steps: int):
        super().__init__()
        self.folder = folder
        self.steps = steps
        self._last_saved, self._save_seconds = time.monotonic(), 0.0

    def resume(self) -> Checkpoint | None:
        """The checkpoint that the folder holds."""
        checkpoint = self.folder.checkpoint()
        self.history = self.folder.history(until=checkpoint.step if checkpoint else 0)
        return checkpoint

    def row(self, row: HistoryRow) -> None:
        """Add a line to history.jsonl."""
        super().row(row)
        self.folder.append_history(row)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint, if saving took little of the time since the last one."""
        # Two gigabytes a checkpoint at 7B: saving may take a twentieth of the time, not more.
        if checkpoint.step < self.steps and time.monotonic() - self._last_saved < 20 * self._save_seconds:
            return
        started = time.monotonic()
        self.folder.save_checkpoint(checkpoint)
        self._last_saved = time.monotonic()
        self._save_seconds = self._last_saved - started
