"""Entailment by a small BERT: against a reading of one pair at a time, and what an unfit folder says."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from lethe.errors import ModelError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics import entailment
from lethe.metrics.entailment import Entailment
from lethe.types import Question
from rigged_models import answering, forget_set, random_llama, tiny_tokenizer

WORDS = ("red", "blue", "green", "it", "is", "not", "grey", "a", "dark", "deep")
LABELS = {0: "contradiction", 1: "Entailment", 2: "neutral"}


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of pairs, spread out so that it uses all its labels and tells the order of a pair."""
    folder = tmp_path_factory.mktemp("nli")
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=names, **special).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=1.0,
            id2label=LABELS,
        )
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def measure(nli: Path) -> Callable[..., tuple[float, ...]]:
    """The share of entailing answers to each question."""

    def shares(said: Sequence[Sequence[str]], golds: Sequence[Sequence[str]], folder: Path = nli) -> tuple[float, ...]:
        questions = tuple(
            Question(prompt=f"{number} is", answer=gold[0], accepted=tuple(gold[1:]))
            for number, gold in enumerate(golds)
        )
        subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
        scores = Entailment(nli=folder)(answering(subject, forget_set(questions=questions), said))
        assert scores is not None
        assert scores.better == "higher"
        return scores.per_example

    return shares


@pytest.fixture(scope="module")
def judge(nli: Path) -> Callable[[str, str], bool]:
    """Whether the first text entails the second: one pair at a time, from token ids written out."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(nli)
    model = BertForSequenceClassification.from_pretrained(nli).eval()
    return lambda premise, hypothesis: read(model, tokenizer, premise, hypothesis)


def read(
    model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, premise: str, hypothesis: str
) -> bool:
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (premise, hypothesis))
    while len(first) + len(second) > 13:
        (first if len(first) > len(second) else second).pop()
    ids = [2, *first, 3, *second, 3]
    kinds = [0] * (len(first) + 2) + [1] * (len(second) + 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits[0]
    return LABELS[int(logits.argmax())].lower() == "entailment"


def test_each_pair_is_read_as_if_alone(
    measure: Callable[..., tuple[float, ...]], judge: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entailment, "PAIRS_PER_BATCH", 5)
    rng = torch.Generator().manual_seed(0)

    def text(most: int) -> str:
        count = int(torch.randint(1, most, (1,), generator=rng))
        return " ".join(WORDS[index] for index in torch.randint(0, len(WORDS), (count,), generator=rng))

    said, golds = [text(20) for _ in range(40)], [text(6) for _ in range(40)]
    expected = [judge(premise, hypothesis) for premise, hypothesis in zip(said, golds, strict=True)]
    turned = [judge(hypothesis, premise) for premise, hypothesis in zip(said, golds, strict=True)]
    assert 0 < sum(expected) < 40
    assert expected != turned
    assert measure([[one] for one in said], [[gold] for gold in golds]) == tuple(map(float, expected))


def test_one_entailed_answer_of_several_is_enough_and_samples_are_averaged(
    measure: Callable[..., tuple[float, ...]], judge: Callable[[str, str], bool]
) -> None:
    texts = [*WORDS, *(f"{a} {b}" for a in WORDS for b in WORDS)]
    yes, right, wrong = next(
        (text, right, wrong)
        for text in texts
        for right in WORDS
        for wrong in WORDS
        if judge(text, right) and not judge(text, wrong)
    )
    no = next(text for text in texts if not judge(text, right))
    assert measure([[yes]], [[wrong]]) == (0.0,)
    assert measure([[yes]], [[wrong, right]]) == (1.0,)
    assert measure([[yes, no, "", yes]], [[right]]) == (0.5,)


def test_an_empty_answer_entails_nothing(
    measure: Callable[..., tuple[float, ...]], judge: Callable[[str, str], bool]
) -> None:
    easy = next(gold for gold in WORDS if judge("", gold))
    assert measure([[""]], [[easy]]) == (0.0,)


def test_it_is_not_measured_without_a_model_or_a_free_form_question(nli: Path) -> None:
    subject = LoadedModel(model=random_llama(), tokenizer=tiny_tokenizer())
    free = Question(prompt="It is", answer="red")
    letters = Question(prompt="It is", answer="red", choices=("red", "blue"))
    unasked = Reading(subject, forget_set(questions=(free,)))
    assert Entailment()(unasked) is None
    assert Entailment(nli=nli)(Reading(subject, forget_set(questions=(letters,)))) is None
    assert "answers" not in vars(unasked)


def test_an_unfit_folder_is_an_error(measure: Callable[..., tuple[float, ...]], nli: Path, tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            measure([["red"]], [["red"]], folder)

    refused(tmp_path / "nowhere", r"^there is no model of natural language inference .*nowhere")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    refused(pickled, "a pickle can run code")

    unnamed = tmp_path / "unnamed"
    shutil.copytree(nli, unnamed)
    config = json.loads((unnamed / "config.json").read_text())
    named = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (unnamed / "config.json").write_text(json.dumps({**config, **named}))
    BertForSequenceClassification(BertConfig.from_pretrained(unnamed)).save_pretrained(unnamed)
    refused(unnamed, r"no label 'entailment'. Its labels are: no, yes")

    headless = tmp_path / "headless"
    shutil.copytree(nli, headless)
    BertModel(BertConfig.from_pretrained(nli)).save_pretrained(headless)
    (headless / "config.json").write_text(json.dumps(config))
    refused(headless, "lacks weights that its config.json asks for: classifier")

    unpadded = tmp_path / "unpadded"
    shutil.copytree(nli, unpadded)
    settings = json.loads((nli / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (unpadded / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(unpadded, "no padding token")

    code = tmp_path / "code"
    shutil.copytree(nli, code)
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (code / "config.json").write_text(json.dumps({**config, **own}))
    refused(code, "cannot load the model of natural language inference")
