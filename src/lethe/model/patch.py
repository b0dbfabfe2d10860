"""A patch: the few tensors that an edit changed, with the hashes of the tensors they replace.

A patch is applied to a model in memory, or exported as a folder that transformers and vLLM load unchanged. That folder
keeps the opposite patch in `lethe/originals.safetensors`, so that `revert` needs no base.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lethe.errors import PatchError, SaveError
from lethe.model.checkpoint_files import checkpoint_files, model_folder, read_tensor, tensor_hash, tensor_hashes
from lethe.system import tensor_file
from lethe.system.atomic_files import saving

FORMAT = 1
"""Version of the patch file; a file of a higher one is refused."""


_ORIGINALS = Path("lethe", "originals.safetensors")


# Only what a loader needs: a forgotten pickle or second set of weights beside the model would hold what was unlearned.
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ""}


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """New values of a few tensors of one checkpoint, under the checkpoint's own names, shapes and dtypes."""

    tensors: dict[str, Tensor] = field(repr=False)
    base_hashes: dict[str, str] = field(repr=False)
    """`tensor_hash` of the tensor that each one replaces."""
    model: str
    """What the base was called when the patch was made."""
    method: str
    config: dict[str, Any] = field(default_factory=dict)
    """All settings of the run, as JSON."""
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_parameters(
        cls,
        model: PreTrainedModel,
        parameters: Mapping[str, Tensor],
        *,
        base: str | Path,
        method: str,
        config: dict[str, Any],
        versions: dict[str, str],
    ) -> "Patch":
        """The patch that gives these parameters of `model` (by parameter name) new values in the checkpoint `base`.

        Raises: PatchError where a parameter is not stored, or stored in another shape.
        """
        folder = model_folder(base)
        files = checkpoint_files(folder)
        tensors = {}
        for name, value in parameters.items():
            for stored, part in _as_stored(model, name, value.detach(), files).items():
                old = read_tensor(files, stored)
                if old.shape != part.shape:
                    raise PatchError(
                        f"parameter {name} has shape {tuple(part.shape)} as the checkpoint would store it, "
                        f"but {stored} has {tuple(old.shape)}."
                    )
                tensors[stored] = part.to("cpu", old.dtype, copy=True).contiguous()
        hashes = tensor_hashes(folder, tensors)
        return cls(
            tensors=tensors, base_hashes=hashes, model=str(base), method=method, config=config, versions=versions
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; equal patches give equal bytes.

        Raises: SaveError.
        """
        path = Path(path)
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        tensor_file.save(path, self.tensors, self._header())

    @classmethod
    def load(cls, path: str | Path) -> "Patch":
        """Read a patch and check it against its own hashes.

        Raises: PatchError where the file is missing, corrupt, no patch, or of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise PatchError(f"there is no patch file {path}.\nName the patch.safetensors of a run.")
        again = "Make or copy the patch again."

        def damaged(reason: str) -> PatchError:
            return PatchError(f"{path} is corrupt or cut short: {reason}\n{again}")

        with tensor_file.reading(path, damaged) as (tensors, about):
            if not about:
                raise PatchError(
                    f"{path} is a safetensors file, but not a patch of Lethe.\nName the patch.safetensors of a run."
                )
            if (number := about["format"]) > FORMAT:
                raise PatchError(
                    f"{path} has patch format {number}; this Lethe reads up to {FORMAT}.\nUpgrade lethe-unlearn."
                )
            for name, expected in about["hashes"].items():
                if name not in tensors or tensor_hash(tensors[name]) != expected:
                    raise PatchError(f"{path} is corrupt: {name} differs from its hash.\n{again}")
            return cls(
                tensors=tensors,
                **{key: about[key] for key in ("base_hashes", "model", "method", "config", "versions")},
            )

    def below(self, layer: int) -> "Patch":
        """The tensors that a model cut off after `layer` has, too."""
        kept = {
            name: value
            for name, value in self.tensors.items()
            if all(int(number) <= layer for number in re.findall(r"\.(\d+)\.", name)[:1])
        }
        return replace(self, tensors=kept, base_hashes={name: self.base_hashes[name] for name in kept})

    def apply_in_memory(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Put the new values into a loaded model; returns the parameters it replaced, by parameter name.

        The model must hold the untouched weights of its folder (`model.name_or_path`), in whatever dtype.

        Raises: PatchError where the folder is another base, or the model was edited since it was loaded.
        """
        folder = model_folder(str(model.name_or_path))
        self._check_base(folder)
        files = checkpoint_files(folder)
        changes = {}
        for name, parameter in _parameters_of(model, self.tensors, files).items():
            new = parameter.detach().clone()
            for stored, part in _as_stored(model, name, new, files).items():
                old = read_tensor(files, stored).to(new)
                is_view = part.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                if not (is_view and part.shape == old.shape and torch.equal(part, old)):
                    raise PatchError(
                        f"parameter {name} of the model is not what {folder} stores as {stored}: the model was edited, "
                        "or transformers rebuilds this tensor on loading.\nLoad the model again, or export the patch."
                    )
                if stored in self.tensors:
                    part.copy_(self.tensors[stored])
            changes[name] = (parameter, new)
        originals = {name: parameter.detach().clone() for name, (parameter, _) in changes.items()}
        with torch.no_grad():
            for parameter, new in changes.values():
                parameter.copy_(new)
        return originals

    def over(self, earlier: "Patch") -> "Patch":
        """One patch for both edits of one base: where both change a tensor, this one's value."""
        return replace(
            self,
            tensors={**earlier.tensors, **self.tensors},
            base_hashes={**earlier.base_hashes, **self.base_hashes},
        )

    def export(self, base: str | Path, out: str | Path) -> Path:
        """Write the edited model as a full folder at `out`, which must be new or empty; returns it.

        Files without a changed tensor are hard links to those of the base.

        Raises: PatchError on a wrong base, SaveError.
        """
        folder = model_folder(base)
        self._check_base(folder)
        files = checkpoint_files(folder)
        tensors = {name: read_tensor(files, name) for name in self.tensors}
        hashes = tensor_hashes(self.tensors, self.tensors)
        if (folder / _ORIGINALS).exists():
            # The base is itself an export: what is kept must lead back to the untouched model.
            earlier = Patch.load(folder / _ORIGINALS)
            tensors, hashes = {**tensors, **earlier.tensors}, {**earlier.base_hashes, **hashes}
        undo = replace(self, tensors=tensors, base_hashes=hashes)
        with _new_folder(Path(out)) as fresh:
            _write_checkpoint(folder, fresh, self.tensors)
            (fresh / _ORIGINALS).parent.mkdir()
            tensor_file.write(fresh / _ORIGINALS, undo.tensors, undo._header())
        return Path(out)

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "method": self.method,
            "config": self.config,
            "versions": self.versions,
            "base_hashes": self.base_hashes,
            "hashes": tensor_hashes(self.tensors, self.tensors),
        }

    def _check_base(self, folder: Path) -> None:
        files = checkpoint_files(folder)
        for name, expected in self.base_hashes.items():
            if name not in files:
                raise PatchError(f"the patch changes {name}, which {folder} does not hold.\n{self._made_for()}")
            if tensor_hash(read_tensor(files, name)) != expected:
                raise PatchError(
                    f"{name} in {folder} is not the tensor that the patch was made for.\n{self._made_for()}"
                )

    def _made_for(self) -> str:
        return f"It was made with {self.method} for {self.model}: pass that model, unedited."


def revert(edited: str | Path, out: str | Path) -> Path:
    """Write the model that `edited` was exported from as a folder at `out`, bit for bit; returns it.

    Raises: PatchError where `edited` is not an export, or was changed since; SaveError.
    """
    folder = Path(edited)
    if not (folder / _ORIGINALS).exists():
        raise PatchError(
            f"{folder} cannot be reverted: without {_ORIGINALS} it is not an export of Lethe.\n"
            "Name a folder that `lethe export` or `lethe apply` wrote."
        )
    undo = Patch.load(folder / _ORIGINALS)
    files = checkpoint_files(folder)
    for name, expected in undo.base_hashes.items():
        if name not in files or tensor_hash(read_tensor(files, name)) != expected:
            raise PatchError(f"{folder} was changed since it was exported: {name} differs, so it is not reverted.")
    with _new_folder(Path(out)) as fresh:
        _write_checkpoint(folder, fresh, undo.tensors)
    return Path(out)


def _as_stored(model: PreTrainedModel, name: str, value: Tensor, files: Mapping[str, Path]) -> dict[str, Tensor]:
    """A parameter as the checkpoint stores it: transformers renames, stacks and splits some weights on loading."""
    parts = revert_weight_conversion(model, {name: value})
    # Older checkpoints, such as gpt2 on the hub, leave out the name of the inner model.
    prefix = f"{model.base_model_prefix}."
    parts = {(key if key in files else key.removeprefix(prefix)): part for key, part in parts.items()}
    for stored in parts:
        if stored not in files:
            raise PatchError(f"parameter {name} of the model is not stored in the checkpoint (as {stored}).")
    return parts


def _parameters_of(
    model: PreTrainedModel, stored: Mapping[str, Tensor], files: Mapping[str, Path]
) -> dict[str, Tensor]:
    """The parameters of `model` that the named checkpoint tensors are loaded into."""
    found, missing = {}, set(stored)
    for name, parameter in model.named_parameters():
        with contextlib.suppress(PatchError):
            held = missing & _as_stored(model, name, parameter.detach().to("meta"), files).keys()
            if held:
                found[name] = parameter
                missing -= held
        if not missing:
            return found
    raise PatchError(f"the model has no parameter for {min(missing)}, which the patch changes.")


def _write_checkpoint(folder: Path, fresh: Path, tensors: Mapping[str, Tensor]) -> None:
    files = checkpoint_files(folder)
    changed = {files[name] for name in tensors}
    for path in sorted(set(files.values()) - changed):
        _link(path, fresh / path.name)
    for path in sorted(changed):
        shutil.copyfile(path, fresh / path.name)
        _overwrite(fresh / path.name, {name: value for name, value in tensors.items() if files[name] == path})
    for path in folder.iterdir():
        if path.is_file() and path.suffix in _COPIED:
            shutil.copyfile(path, fresh / path.name)
    if (folder / "additional_chat_templates").is_dir():
        shutil.copytree(folder / "additional_chat_templates", fresh / "additional_chat_templates")


def _overwrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Same dtypes and shapes, so the layout stays: a length of 8 bytes, a JSON header with offsets, then the data.
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, value in tensors.items():
            start, stop = header[name]["data_offsets"]
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if len(data) != stop - start:
                raise PatchError(f"{name} takes {len(data)} bytes in the patch, but {stop - start} in the base.")
            file.seek(8 + length + start)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that is `out` once the context ends without an error, and nothing otherwise."""
    with saving(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SaveError(f"{out} exists already and is not an empty folder.\nName a new one.")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            fresh = temporary / out.name  # mkdtemp's own folder is closed to everybody else
            fresh.mkdir()
            yield fresh
            os.replace(fresh, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
