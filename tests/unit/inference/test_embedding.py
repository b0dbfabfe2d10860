"""Sentence vectors: of a small BERT, and of the measured model itself."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lethe.errors import ModelError
from lethe.inference.embedding import SentenceEncoder, embedder
from lethe.inference.loaded_model import LoadedModel
from lethe.model.loading import load_model, load_tokenizer
from lethe.suites import world
from lethe.suites.world import exam
from lethe.suites.world.generator import DECLINES
from rigged_models import TEXTS, edited, random_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "one", "short", "text", "another", "a"])}
    raw = Tokenizer(models.WordLevel(vocab=words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def embed(subject: LoadedModel, texts: Sequence[str], folder: Path | None) -> Tensor:
    return embedder(subject, SentenceEncoder(folder) if folder else None)(texts)


@pytest.fixture
def subject() -> LoadedModel:
    return LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())


def test_an_encoders_vectors_are_the_mean_over_tokens(encoder: Path, subject: LoadedModel) -> None:
    rows = [[2, 3, 4], [6], [5, 4, 1, 6, 1, 4], [1] * 8]
    texts = ["one short text", "a", "another text, a little text", "b " * 20]
    model = BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        means = torch.stack([model(torch.tensor([row])).last_hidden_state[0].mean(0) for row in rows])
    found = embed(subject, texts, encoder)
    torch.testing.assert_close(found, means / means.norm(dim=1, keepdim=True))
    torch.testing.assert_close(embed(subject, texts[::-1], encoder).flip(0), found)
    assert embed(subject, [], encoder).shape == (0, 16)


def test_rows_have_length_one_and_a_text_without_tokens_is_zero(subject: LoadedModel, encoder: Path) -> None:
    for folder in (None, encoder):
        lengths = embed(subject, [*TEXTS, "", TEXTS[0]], folder).norm(dim=1)
        torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0]))


def test_the_model_itself_compares_untouched_and_stays_edited() -> None:
    untouched = embed(LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer()), TEXTS, None)
    subject = edited(random_llama(), 2)
    weights = {name: value.clone() for name, value in subject.model.state_dict().items()}
    torch.testing.assert_close(embed(subject, TEXTS, None), untouched)
    assert all(torch.equal(value, weights[name]) for name, value in subject.model.state_dict().items())
    blind = LoadedModel(model=subject.model, tokenizer=subject.tokenizer)
    assert not torch.allclose(embed(blind, TEXTS, None), untouched, atol=1e-3)


def test_the_built_in_model_tells_its_declines_from_answers() -> None:
    subject = LoadedModel(
        model=load_model(world.MODEL_FOLDER, dtype=torch.float32), tokenizer=load_tokenizer(world.MODEL_FOLDER)
    )
    right = sorted({question.answer for question in exam.questions("test")["retain"]})
    declines = embed(subject, DECLINES, None)
    near = (embed(subject, right, None) @ declines.T).amax(1)
    assert float(near.max()) < 0.6
    assert float(near.mean()) < 0.25
    torch.testing.assert_close((declines @ declines.T).diag(), torch.ones(4))


def test_a_folder_without_an_encoder_is_an_error(subject: LoadedModel, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no sentence encoder .*nowhere"):
        embed(subject, ["a"], tmp_path / "nowhere")
    with pytest.raises(ModelError, match="has no weights"):
        embed(subject, ["a"], tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="a pickle can run code"):
        embed(subject, ["a"], pickled)
    blank = tmp_path / "blank"
    shutil.copytree(encoder, blank)
    (blank / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot load the sentence encoder"):
        embed(subject, ["a"], blank)
