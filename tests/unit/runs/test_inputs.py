"""From the names in a config to the things they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lethe.errors import CorpusError, InvalidLayerError, QuestionError, UnknownModuleError
from lethe.evaluation import eval_sets
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.suites.world import exam as world

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def words() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2} | {f"w{i}": 3 + i for i in range(90)}, "?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", bos_token="<s>", eos_token="</s>")


def corpus(folder: Path, name: str, texts: list[str]) -> str:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(**settings: Any) -> RunConfig:
    defaults: dict[str, Any] = {"model": "some/model", "retain": "r.jsonl"}
    return RunConfig(**defaults | settings)


# Corpora


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"forget": ("builtin",), "retain": "r.jsonl"}, "--forget"),
        ({"forget": ("f.jsonl", "builtin"), "retain": "r.jsonl"}, "--forget"),
        ({"forget": ("f.jsonl",), "retain": "builtin"}, "--retain"),
        ({"forget": ("builtin",), "retain": "builtin"}, "--forget and --retain"),
    ],
)
def test_the_built_in_corpora_are_for_the_built_in_model(settings: dict[str, Any], missing: str) -> None:
    with pytest.raises(CorpusError) as caught:
        inputs.read_corpora(config(**settings))
    assert str(caught.value) == (
        f"the built-in corpora tell of a made-up world that some/model does not know.\nPass {missing} FILE."
    )


def test_corpora_that_are_not_required_may_be_missing(tmp_path: Path) -> None:
    forget = corpus(tmp_path, "f.jsonl", ["w1 w2"])
    assert inputs.read_corpora(config(forget=(forget,), retain="builtin"), required=False) == ({"f": ["w1 w2"]}, [])
    assert inputs.read_corpora(config(retain="builtin"), required=False) == ({}, [])


def test_the_built_in_model_has_two_topics_of_its_own() -> None:
    forget, retain = inputs.read_corpora(RunConfig(model="builtin"))
    assert forget == world.forget_texts()
    assert retain == world.retain_texts()
    assert len(forget) == 2


def test_topics_go_by_file_names_in_the_order_given(tmp_path: Path) -> None:
    paths = [corpus(tmp_path, name, [name]) for name in ("b.jsonl", "a.jsonl")]
    paths += [corpus(tmp_path / "other", name, [f"other {name}"]) for name in ("a.jsonl",)]
    retain = corpus(tmp_path, "r.jsonl", ["w9"])
    forget, kept = inputs.read_corpora(config(forget=(*paths, "builtin"), retain=retain, model="builtin"))
    assert list(forget) == ["b", "a", "a'", *world.forget_texts()]
    assert (forget["a"], forget["a'"], kept) == (["a.jsonl"], ["other a.jsonl"], ["w9"])


def test_as_published_takes_raw_lines_of_all_but_the_biology_corpus(tmp_path: Path) -> None:
    names = ("bio-forget-corpus.jsonl", "cyber-forget-corpus.jsonl")
    settings = {
        "forget": tuple(corpus(tmp_path, name, [f"w1 {name}"]) for name in names),
        "retain": corpus(tmp_path, "r.jsonl", ["w9"]),
    }
    plainly, _ = inputs.read_corpora(config(**settings))
    published, retain = inputs.read_corpora(config(**settings, as_published=True))
    bio, cyber = plainly
    assert published[bio] == plainly[bio] == ["w1 bio-forget-corpus.jsonl"]
    assert plainly[cyber] == ["w1 cyber-forget-corpus.jsonl"]
    assert published[cyber] == ['{"text": "w1 cyber-forget-corpus.jsonl"}\n']
    assert retain == ["w9"]


def test_overlap_is_refused_unless_allowed(tmp_path: Path) -> None:
    settings = {
        "forget": (corpus(tmp_path, "f.jsonl", ["w1", "w2"]),),
        "retain": corpus(tmp_path, "r.jsonl", ["w3", " w2 "]),
    }
    with pytest.raises(CorpusError) as caught:
        inputs.read_corpora(config(**settings))
    assert str(caught.value) == (
        "1 forget text found in the retain corpus too: 'f' rows 2.\n"
        "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap."
    )
    assert inputs.read_corpora(config(**settings, allow_overlap=True))[1] == ["w3", " w2 "]


def test_the_text_field_holds_for_both_sides(tmp_path: Path) -> None:
    for name in ("f.jsonl", "r.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "x", "body": name}))
    found = inputs.read_corpora(
        config(forget=(f"{tmp_path}/f.jsonl",), retain=f"{tmp_path}/r.jsonl", text_field="body")
    )
    assert found == ({"f": ["f.jsonl"]}, ["r.jsonl"])


# Schedule

TEXTS = [f"w{i}" for i in range(60)]


def test_accumulated_batches_are_steps_of_the_schedule() -> None:
    plan = inputs.training_schedule(config(steps=3, accumulate=4, batch_size=2), {"a": TEXTS}, TEXTS, words())
    assert plan.steps == 12
    assert len(plan.topics[0].batches) == len(plan.retain) == 12


def test_too_few_rows_for_accumulated_steps_say_how_many_steps_they_are_enough_for() -> None:
    with pytest.raises(CorpusError) as caught:
        inputs.training_schedule(config(steps=9, accumulate=3, batch_size=2), {"a": TEXTS}, TEXTS[:25], words())
    assert str(caught.value) == (
        "retain corpus gives 12 batches of 2 (25 rows); 9 steps of 3 batches over 1 topic need 27.\n"
        "Lower --steps to 4, or pass --epochs 3 to repeat it."
    )
    inputs.training_schedule(config(steps=4, accumulate=3, batch_size=2), {"a": TEXTS}, TEXTS[:25], words())


def test_the_order_follows_the_seed_and_as_published_the_corpus() -> None:
    def rows(**settings: Any) -> list[int]:
        plan = inputs.training_schedule(config(steps=5, batch_size=2, **settings), {"a": TEXTS}, TEXTS, words())
        return [int(ids) for batch in plan.topics[0].batches for ids in batch.input_ids[:, 1]]

    assert rows() == rows() != rows(seed=1)
    assert rows(as_published=True) == rows(as_published=True, seed=1) == list(range(3, 13))


def test_as_published_pads_on_the_left_and_counts_padding() -> None:
    texts = ["w1 w2 w3", "w4"]
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2}
    ours = inputs.training_schedule(config(**settings), {"a": texts}, texts, words()).retain[0]
    theirs = inputs.training_schedule(config(**settings, as_published=True), {"a": texts}, texts, words()).retain[0]
    assert theirs.attention_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert theirs.mask.all()
    assert ours.attention_mask[:, :2].all()
    assert int(ours.mask.sum()) == 4


# Model


@pytest.mark.parametrize(
    ("stored", "asked", "device", "found"),
    [
        ("bfloat16", "auto", CPU, "bfloat16"),
        ("float32", "auto", CPU, "float32"),
        ("float16", "auto", CPU, "float32"),
        ("float16", "auto", GPU, "float16"),
        ("float16", "float16", CPU, "float16"),
        ("float32", "bfloat16", CPU, "bfloat16"),
    ],
)
def test_the_number_type(stored: str, asked: str, device: torch.device, found: str, tmp_path: Path) -> None:
    # The first tensor by name is a mask of integers.
    tensors = {"a.mask": torch.ones(2, dtype=torch.int64), "b.weight": torch.ones(2, dtype=getattr(torch, stored))}
    save_file(tensors, tmp_path / "model.safetensors")
    assert inputs.find_dtype(asked, tmp_path, None, device) == getattr(torch, found)


@pytest.fixture
def saved(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(("layer", "trained"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (4, [2, 3, 4])])
def test_the_slice_ends_at_the_layer_and_begins_at_the_first_trained_one(
    layer: int, trained: list[int], saved: str
) -> None:
    layers = inputs.load_slice(config(model=saved, layer=layer), CPU, torch.float32)
    assert (layers.start_at_layer, layers.stop_at_layer) == (trained[0], layer + 1)
    assert list(layers.trained) == [f"model.layers.{number}.mlp.down_proj.weight" for number in trained]
    assert len(layers.model.model.layers) == layer + 1


def test_named_matrices_of_named_layers(saved: str) -> None:
    settings = config(model=saved, layer=3, train_layers=(1, 3), train_modules=("self_attn.o_proj",))
    layers = inputs.load_slice(settings, CPU, torch.bfloat16)
    assert list(layers.trained) == [f"model.layers.{number}.self_attn.o_proj.weight" for number in (1, 3)]
    assert all(parameter.dtype == torch.bfloat16 for parameter in layers.trained.values())


def test_a_layer_that_the_model_does_not_have(saved: str) -> None:
    with pytest.raises(InvalidLayerError) as caught:
        inputs.load_slice(config(model=saved, layer=5), CPU, torch.float32)
    assert str(caught.value) == f"'layer' must be in [0, 4] for {saved}, which has 5 layers. Got 5."


def test_a_matrix_that_the_layer_does_not_have(saved: str) -> None:
    settings = config(model=saved, layer=3, train_modules=("mlp.c_proj",))
    with pytest.raises(UnknownModuleError, match=r"^layer 1 has no matrix named mlp\.c_proj\.\nLayer 1 has: mlp\."):
        inputs.load_slice(settings, CPU, torch.float32)


# Questions


def test_the_built_in_exam_is_scored_by_cloze_and_has_four_sets() -> None:
    settings = RunConfig(model="builtin", limit=3)
    found = eval_sets.sets(settings, *inputs.read_corpora(settings))
    assert [data.name for data in found] == ["forget", "adjacent", "retain", "unknown"]
    assert all(len(data.questions) == 3 and data.scoring == "cloze" for data in found)
    assert [len(data.texts) for data in found] == [eval_sets.TEXTS, eval_sets.TEXTS, eval_sets.TEXTS, 0]


def test_the_halves_of_the_exam_share_no_question() -> None:
    halves = [
        {question.prompt for data in eval_sets.sets(settings, {}, []) for question in data.questions}
        for settings in (RunConfig(model="builtin", split="dev"), RunConfig(model="builtin", split="test"))
    ]
    assert halves[0]
    assert not halves[0] & halves[1]


def test_texts_of_topics_are_measured_in_turn() -> None:
    found = eval_sets.sets(config(), {"a": ["a1", "a2", "a3"], "b": ["b1"]}, ["r1"])
    assert {data.name: data.texts for data in found} == {"forget": ("a1", "b1", "a2", "a3"), "retain": ("r1",)}


def test_question_files_fill_the_sets(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}?", "answer": "yes"}) + "\n" for i in range(9)))
    settings = config(adjacent_questions=path, limit=4, scoring="letter")
    found = {data.name: data for data in eval_sets.sets(settings, {"a": ["a1"]}, ["r1"])}
    assert list(found) == ["forget", "adjacent", "retain"]
    assert [len(found[name].questions) for name in found] == [0, 4, 0]
    assert found["adjacent"].scoring == "letter"


def test_a_question_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match=r"^no question file .*q\.csv\.\nGive a "):
        eval_sets.sets(config(retain_questions=tmp_path / "q.csv"), {"a": ["a1"]}, ["r1"])


def test_every_topic_counts(tmp_path: Path) -> None:
    rows = [{"text": "a b", "topic": "x"}, {"text": "c d", "topic": "y"}, {"text": "e f", "topic": "z"}]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "retain.jsonl").write_text('{"text": "g h"}', encoding="utf-8")
    assert inputs.count_topics(RunConfig(model="builtin")) == 2
    assert inputs.count_topics(RunConfig(model="builtin", forget=("builtin:exploits", "mine.txt"))) == 2
    assert inputs.count_topics(RunConfig(model="builtin", data=tmp_path)) == 3
