"""Load a model, its first layers, its skeleton or its tokenizer."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lethe.errors import InvalidLayerError, InvalidValueError, ModelError, OutOfMemoryError, first_line
from lethe.model.checkpoint_files import (
    checkpoint_files,
    files_matching,
    model_folder,
    read_config,
    read_json,
    refuse_remote_code,
)


def load_folder(
    auto: Any, folder: Path, device: torch.device, *, what: str, spare: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, in eval mode and without gradients.

    `auto` is one of transformers' AutoModel classes, `what` its noun in errors. Tensors whose name holds `spare` may
    be absent from the file.

    Raises: ModelError if the folder is missing, or holds no such model that can be read without running its code.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ModelError(f"there is no {what} {folder}.\nPass the folder of one in Hugging Face's format, or none.")
    checkpoint_files(folder)
    try:
        model, report = auto.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot load the {what} {folder}: {first_line(error)}\n"
            "Pass a folder with config.json, model.safetensors and the tokenizer's files."
        ) from error
    if missing := sorted(name for name in report["missing_keys"] if spare is None or spare not in name):
        raise ModelError(f"{folder} lacks weights that its config.json asks for: {missing[0]}.\nDownload it again.")
    return cast(PreTrainedModel, model.requires_grad_(False).eval().to(device)), tokenizer


_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "*.tiktoken",
)


# MiniMax computes the attention decay of each layer from the number of layers: cut short, it would be another model.
_DEPTH_DEPENDENT = {"minimax"}


def load_model(
    model: str | Path,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or hub id: eval mode, no parameter with a gradient, no cache.

    With `layers=k` only the embeddings and decoder layers 0..k-1 are read, and the head is an `nn.Identity`: the hidden
    states after layer k-1 are those of the whole model bit for bit. `dtype=None` keeps the dtype of the checkpoint.

    Raises: ModelError, InvalidLayerError, InvalidValueError (device), OutOfMemoryError.
    """
    folder = model_folder(model, revision)
    config = read_config(folder)
    checkpoint_files(folder)
    if layers is not None:
        _keep_first_layers(config, layers, folder)
    try:
        with _without_load_report() if layers is not None else contextlib.nullcontext():
            loaded, report = cast(
                tuple[PreTrainedModel, dict[str, Any]],
                AutoModelForCausalLM.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype or "auto",
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that the report below names them
                ),
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"{model} does not fit in memory.\nLoad fewer layers or a smaller dtype.") from error
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, SafetensorError) as error:
        raise ModelError(
            f"transformers {transformers.__version__} cannot load {folder}: {first_line(error)}"
        ) from error
    _refuse_invented_weights(report, folder, layers)
    if layers is not None:
        # It would only turn the hidden states of an inner layer into meaningless logits.
        loaded.set_output_embeddings(nn.Identity())
    loaded.requires_grad_(False).eval()
    loaded.config.get_text_config(decoder=True).use_cache = False
    try:
        return loaded.to(device)  # pyright: ignore[reportArgumentType] (its decorator hides self)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"{model} does not fit on {device}.\nLoad fewer layers or a smaller dtype.") from error
    except (RuntimeError, AssertionError) as error:
        raise InvalidValueError(f"device {device!r} cannot be used: {first_line(error)}\nTry --device cpu.") from error


def skeleton(model: str | Path, *, layers: int | None = None, revision: str | None = None) -> PreTrainedModel:
    """The model without weights, on the meta device: names and shapes at no cost.

    Raises: ModelError, InvalidLayerError.
    """
    folder = model_folder(model, revision)
    config = read_config(folder)
    if layers is not None:
        _keep_first_layers(config, layers, folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; where it has no padding token, its end (or begin, or unknown) token serves.

    Raises: ModelError where the folder holds no vocabulary, or would need remote code.
    """
    folder = model_folder(model, revision)
    # transformers makes up an empty vocabulary for some model types rather than fail.
    if not any(files_matching(folder, _VOCABULARIES)):
        raise ModelError(
            f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there.\n"
            "Copy the tokenizer files of the base model into it."
        )
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        refuse_remote_code(read_json(settings), settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {first_line(error)}).\n"
            "Copy the tokenizer files of the base model into it."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer in {folder} has no pad, eos, bos or unk token.\n"
            'Name one as "pad_token" in its tokenizer_config.json.'
        )
    return tokenizer


def _keep_first_layers(config: PreTrainedConfig, layers: int, folder: Path) -> None:
    text = config.get_text_config(decoder=True)
    available = text.num_hidden_layers
    if not 1 <= layers <= available:
        raise InvalidLayerError(
            f"the first {layers} layers were asked for, but {folder} has {available}: layers 0 to {available - 1}."
        )
    if layers < available and config.model_type in _DEPTH_DEPENDENT:
        raise ModelError(f"the first layers of a {config.model_type} model depend on how many follow: load it whole.")
    text.num_hidden_layers = layers
    # The layers that share keys and values are counted from the last one.
    if shared := text.to_dict().get("num_kv_shared_layers"):
        text.num_kv_shared_layers = max(0, layers - (available - shared))


def _refuse_invented_weights(report: dict[str, Any], folder: Path, layers: int | None) -> None:
    # transformers fills what it does not find with random numbers and goes on.
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(f"{folder} lacks weights that its config.json asks for: {names[0]}{more}.\nDownload it again.")
    if report["mismatched_keys"]:
        name, stored, expected = sorted(report["mismatched_keys"])[0]
        partly = "" if layers is None else ", or its layers cannot be loaded in part"
        fix = f"Its config.json belongs to other weights{partly}."
        raise ModelError(f"{folder}: {name} is stored as {tuple(stored)} but used as {tuple(expected)}.\n{fix}")


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    # It would list every layer that was left out on purpose as unexpected.
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
