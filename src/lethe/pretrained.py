"""Models of other kinds than the measured one, read from a folder: a sentence encoder, a model of inference."""

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lethe.types import ModelError
from lethe.weights import checkpoint_files


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"transformers {transformers.__version__} cannot load the {what} {folder}: {reason}\n"
            "Pass a folder with config.json, model.safetensors and the tokenizer's files."
        ) from error
    if missing := sorted(name for name in report["missing_keys"] if spare is None or spare not in name):
        raise ModelError(f"{folder} lacks weights that its config.json asks for: {missing[0]}.\nDownload it again.")
    return cast(PreTrainedModel, model.requires_grad_(False).eval().to(device)), tokenizer
