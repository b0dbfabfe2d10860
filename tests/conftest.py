"""What several test files share: one thread, tiny random models, tiny batches."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lethe.suites import world
from lethe.types import Batch

TinyModel = Callable[..., PreTrainedModel]
TinyBatch = Callable[..., Batch]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums in one order on every machine, and no quarrel for cores between processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Scores of tests are not kept in the user's cache, nor found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """Builds a random model of any type: five layers of width 32, vocabulary 99.

    Every parameter gets noise on top of its initial value: biases of zero and norms of one would hide mistakes.
    """

    def build(
        model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> PreTrainedModel:
        config = AutoConfig.for_model(
            model_type,
            **{
                "vocab_size": 99,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 5,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                **changes,
            },
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def tiny_batch() -> TinyBatch:
    """Builds a batch of random tokens in rows of given lengths, padded on one side with token 2."""

    def build(
        lengths: Sequence[int] = (9, 5, 7),
        *,
        side: Literal["left", "right"] = "right",
        seed: int = 0,
        count: Literal["tokens", "no-first", "all"] = "tokens",
    ) -> Batch:
        width = max(lengths)
        ids = torch.randint(3, 99, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
        position = torch.arange(width)[None]
        length = torch.tensor(lengths)[:, None]
        first = width - length if side == "left" else torch.zeros_like(length)
        real = (position >= first) & (position < first + length)
        mask = {"tokens": real, "no-first": real & (position > first), "all": torch.ones_like(real)}[count]
        return Batch(input_ids=ids.masked_fill(~real, 2), attention_mask=real, mask=mask)

    return build


@pytest.fixture(scope="session")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of four layers and the built-in model's tokenizer; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("foreign") / "tiny"
    settings = json.loads((world.MODEL_FOLDER / "config.json").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=settings["vocab_size"],
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=4,
                num_attention_heads=2,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(world.MODEL_FOLDER / name, folder)
    return folder
