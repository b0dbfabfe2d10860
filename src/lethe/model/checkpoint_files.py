"""Reads Hugging Face checkpoints: a whole model, its first layers, or single tensors.

Weights are safetensors only, and code that ships with a model is never run.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lethe.errors import ModelError, first_line

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def count_layers(model: str | Path, revision: str | None = None) -> int:
    """How many decoder layers a model has."""
    return read_config(model_folder(model, revision)).get_text_config(decoder=True).num_hidden_layers


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The local folder of `model`: itself if it is one, else the downloaded snapshot of the hub id.

    Raises: ModelError if there is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{model} is a file. Pass the folder that holds config.json and the weights.")
    parent = path.parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings)
    hint = f"\nDid you mean {', '.join(str(parent / name) for name in near)}?" if near else ""
    in_existing_folder = parent != Path() and parent.is_dir()
    if in_existing_folder or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(model)):
        raise ModelError(f"there is no model folder {model}.{hint or ' Pass a folder, or a hub id such as org/name.'}")
    try:
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=_SMALL_FILES))
        if (folder / "config.json").exists():
            read_config(folder)
        index = folder / _INDEX
        weights = sorted(set(_read_index(index).values())) if index.exists() else [_SINGLE]
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=[*_SMALL_FILES, *weights]))
    except GatedRepoError as error:
        raise ModelError(f"{model} is gated on the hub.\nAccept its licence there, then run: hf auth login") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision!r} on the hub.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"{model} is neither a local folder nor a model on the hub.{hint}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{model} is not a local folder, not in the cache, and the hub cannot be reached.{hint}\n"
            "Go online, or pass the folder of a downloaded model."
        ) from error


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """The file that holds each tensor of a checkpoint folder, by tensor name; every file's header is read and checked.

    Raises: ModelError where weights are pickled, absent, incomplete or corrupt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}.")
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists():
        return dict.fromkeys(_names_in(single), single)
    if index.exists():
        files = {name: folder / shard for name, shard in _read_index(index).items()}
        held: dict[Path, set[str]] = {}
        for path in sorted(set(files.values())):
            if not path.exists():
                raise ModelError(f"{folder} lacks {path.name}, which {_INDEX} names.\nDownload the model again.")
            held[path] = set(_names_in(path))
        for name, path in files.items():
            if name not in held[path]:
                raise ModelError(f"{path} does not hold {name}, though {_INDEX} says so.\nDownload the model again.")
        return files
    if pickles := list(files_matching(folder, _PICKLES)):
        raise ModelError(
            f"{folder} holds only pickled weights ({pickles[0].name}); a pickle can run code, so it is not read.\n"
            "Convert it to safetensors: https://huggingface.co/spaces/safetensors/convert"
        )
    others = ", ".join(path.name for path in files_matching(folder, ["*.safetensors"]))
    found = f", but {others}" if others else ""
    raise ModelError(
        f"{folder} has no weights: neither {_SINGLE} nor {_INDEX} is there{found}.\nDownload the model again."
    )


def read_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    """One tensor of a checkpoint, as stored; `files` is what `checkpoint_files` found.

    Raises: ModelError if the checkpoint does not hold it.
    """
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise ModelError(f"the checkpoint holds no tensor {name!r}.{hint}")
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and raw bytes."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_hashes(source: str | Path | Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """`tensor_hash` of the named tensors of a checkpoint folder, one in memory at a time, or of a state dict."""
    if isinstance(source, Mapping):
        return {name: tensor_hash(source[name]) for name in names}
    files = checkpoint_files(source)
    return {name: tensor_hash(read_tensor(files, name)) for name in names}


def read_config(folder: Path) -> PreTrainedConfig:
    """A model's config.json.

    Raises: ModelError.
    """
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise ModelError(f"{folder} is an adapter, not a model.\nMerge it into its base model and save that.")
        raise ModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder.\nName one that has.")
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter besides the model.\nMerge it, or remove adapter_config.json.")
    settings = read_json(path)
    refuse_remote_code(settings, path)
    model_type = settings.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(transformers.CONFIG_MAPPING), n=1)
        raise ModelError(
            f"{path}: transformers {transformers.__version__} knows no model_type {model_type!r}."
            + (f" The nearest is {near[0]!r}." if near else "")
            + "\nUpgrade transformers if the model is newer."
        )
    classes = {
        key: name if isinstance(name, str) else name[0] for key, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }
    named = settings.get("architectures") or [classes.get(model_type)]
    if settings.get("is_encoder_decoder") or model_type not in classes or not set(named) <= set(classes.values()):
        what = ", ".join(settings.get("architectures") or [str(model_type)])
        raise ModelError(
            f"{folder} is not a causal language model: {what}.\nLethe needs a decoder-only one, with its head."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} cannot be used: {first_line(error)}") from error


def refuse_remote_code(settings: dict[str, Any], path: Path) -> None:
    """Raises: ModelError if the settings name code of their own."""
    if settings.get("auto_map"):
        raise ModelError(
            f"{path} asks to run code shipped with the model (auto_map), which Lethe never does.\n"
            "If transformers knows the model type itself, remove auto_map from a local copy."
        )


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or any(Path(str(file)).name != file for file in files.values()):
        raise ModelError(f"{path} has no usable weight_map.\nDownload the model again.")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: ModelError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is corrupt or cut short: {first_line(error)}\nDownload it again, or copy it completely."
        ) from error


def files_matching(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """The files that a pattern names, pattern by pattern."""
    return (path for pattern in patterns for path in sorted(folder.glob(pattern)))
