"""Commands on files that runs leave: reports, patches and model folders."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from lethe.cli.console import Command, Json, print_json, show
from lethe.cli.tables import Table
from lethe.errors import UsageError

if TYPE_CHECKING:
    import lethe.model.diff


def report(runs: Positional[tuple[Path, ...]], out: Path = Path("runs/compare.html")) -> None:
    """Write the report of one run again, or one page that compares several.

    Args:
        runs: Run folders.
        out: The page that compares several runs.
    """
    from lethe.report.pages import compare, write_report

    if not runs:
        raise UsageError("no run was named.\nName one or more run folders: lethe report runs/a runs/b")
    show(str(write_report(runs[0]) if len(runs) == 1 else compare(runs, out)))


REPORT = Command(run=report, examples=("lethe report runs/a", "lethe report runs/a runs/b --out runs/compare.html"))


def export(run: Positional[Path], to: Path) -> None:
    """Write the edited model of a run as a full folder that transformers and vLLM load unchanged.

    Args:
        run: A run folder.
        to: A new folder.
    """
    from lethe.model.patch import Patch
    from lethe.runs.config_file import read_run_config
    from lethe.runs.run_folder import RunFolder

    folder = RunFolder(run)
    folder.require_patch()
    settings = read_run_config(folder.config)
    show(str(Patch.load(folder.patch).export(_source(settings.base.model, settings.base.revision), to)))


EXPORT = Command(run=export, examples=("lethe export runs/a --to ./edited-model",))


def apply(patch: Positional[Path], model: Positional[str], to: Path, revision: str | None = None) -> None:
    """Write a model folder with a patch applied.

    Args:
        patch: A patch.safetensors.
        model: The untouched base: `builtin`, a model folder or a hub id.
        to: A new folder.
        revision: Commit or tag of a hub model.
    """
    from lethe.model.patch import Patch

    show(str(Patch.load(patch).export(_source(model, revision), to)))


APPLY = Command(run=apply, examples=("lethe apply runs/a/patch.safetensors ./my-model --to ./edited-model",))


def revert(edited: Positional[Path], to: Path) -> None:
    """Write the untouched model that an exported folder came from, bit for bit.

    Args:
        edited: A folder written by `lethe export` or `lethe apply`.
        to: A new folder.
    """
    from lethe.model.patch import revert

    show(str(revert(edited, to)))


REVERT = Command(run=revert, examples=("lethe revert ./edited-model --to ./my-model-again",))


def diff(base: Positional[str], other: Positional[str], as_json: Json = False) -> None:
    """Which tensors of two model folders differ: relative norm and effective rank, by layer.

    Args:
        base: A model folder or hub id.
        other: Another.
    """
    from lethe.model.diff import diff

    found = diff(_source(base, None), _source(other, None))
    if as_json:
        print_json({"differences": [dataclasses.asdict(row) for row in found]})
    else:
        show(_differences(found))


DIFF = Command(run=diff, examples=("lethe diff ./my-model ./edited-model",))


def _differences(rows: "Sequence[lethe.model.diff.TensorDiff]") -> Table:
    table = Table(
        "",
        ("tensor", "layer", "kind", "relative norm", "effective rank", "shape"),
        ("layer", "relative norm", "effective rank"),
    )
    for row in rows:
        table.add(
            row.name,
            "" if row.layer is None else str(row.layer),
            row.kind,
            "" if row.relative_norm is None else f"{row.relative_norm:.3g}",
            "" if row.effective_rank is None else f"{row.effective_rank:.1f}",
            " x ".join(map(str, row.shape)),
        )
    if not rows:
        table.caption = "No tensor differs."
    return table


def _source(model: str, revision: str | None) -> Path:
    from lethe.model.checkpoint_files import model_folder
    from lethe.runs.inputs import model_source

    return model_folder(model_source(model), revision)
