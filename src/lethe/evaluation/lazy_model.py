"""A model that is to be measured, loaded when the first number is asked that was not measured before."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.errors import ModelError
from lethe.evaluation.score_cache import ScoreCache
from lethe.inference.loaded_model import LoadedModel
from lethe.model.loading import load_model
from lethe.model.patch import Patch


class LazyModel:
    """A model folder, with a patch on it or not, and a retain-only model beside it or not."""

    def __init__(
        self,
        name: str,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        device: torch.device,
        patch: Path | None = None,
        retain_only: tuple[Path, PreTrainedTokenizerBase] | None = None,
    ):
        self.name = name
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.device = device
        self._patch_file = patch
        # Read at once: a damaged one is told before anything is measured.
        self._patch = Patch.load(patch) if patch is not None else None
        self._retain_only = retain_only

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in memory, with its edit, and the retain-only model beside it.

        Raises: ModelError, PatchError, OutOfMemoryError.
        """
        model = self._load(self.folder, self.tokenizer, self.name)
        originals = self._patch.apply_in_memory(model) if self._patch else {}
        other = None
        if self._retain_only:
            folder, tokenizer = self._retain_only
            other = LoadedModel(model=self._load(folder, tokenizer, str(folder)), tokenizer=tokenizer)
        return LoadedModel(model=model, tokenizer=self.tokenizer, originals=originals, retain_only=other)

    def identity(self, cache: ScoreCache) -> dict[str, Any]:
        """What decides the model's output, for the key of a cache entry."""
        return {
            "model": cache.model_hash(self.folder),
            "patch": cache.files_hash([self._patch_file]) if self._patch_file else None,
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    def retain_only_hash(self, cache: ScoreCache) -> str | None:
        """What decides the output of the retain-only model."""
        return cache.model_hash(self._retain_only[0]) if self._retain_only else None

    def _load(self, folder: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedModel:
        model = load_model(folder, dtype=self.dtype, device=str(self.device))
        rows = model.config.get_text_config().vocab_size
        # Added tokens are left out: a padding token beyond the embeddings is common and never read.
        if tokenizer.vocab_size > rows:
            raise ModelError(
                f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, and the model knows {rows}: it belongs to "
                "another model.\nCopy the tokenizer files of the base model into its folder."
            )
        return model
