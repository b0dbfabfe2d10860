"""From the names in a config to the things they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lethe.data.batches import Schedule
from lethe.data.prompt_corpora import PromptCorpora
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError, QuestionError
from lethe.evaluation import eval_sets
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.solvers.gradient import Gradient
from lethe.suites.world import exam as world
from lethe.types import EvalSet


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
    return RunConfig.of(**defaults | settings)


def read(settings: RunConfig, **options: Any) -> tuple[dict[str, list[str]], list[str]]:
    return inputs.read_corpora(settings.data, settings.base.model, **options)


def schedule(settings: RunConfig, forget: dict[str, list[str]], retain: list[str]) -> Schedule:
    corpora = TextCorpora(forget=forget, retain=retain, tokenizer=words())
    assert isinstance(settings.solver, Gradient)
    return corpora.schedule(
        settings.batching,
        torch.Generator().manual_seed(settings.seed),
        steps=settings.solver.steps,
        accumulate=settings.solver.accumulate,
    )


def sets(settings: RunConfig, forget: dict[str, list[str]], retain: list[str]) -> tuple[EvalSet, ...]:
    corpora = TextCorpora(forget=forget, retain=retain, tokenizer=words())
    return eval_sets.sets(settings.base.model, settings.data, settings.evaluation, corpora)


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
        read(config(**settings))
    assert str(caught.value) == (
        f"the built-in corpora tell of a made-up world that some/model does not know.\nPass {missing} FILE."
    )


def test_corpora_that_are_not_required_may_be_missing(tmp_path: Path) -> None:
    forget = corpus(tmp_path, "f.jsonl", ["w1 w2"])
    assert read(config(forget=(forget,), retain="builtin"), required=False) == ({"f": ["w1 w2"]}, [])
    assert read(config(retain="builtin"), required=False) == ({}, [])


def test_the_built_in_model_has_two_topics_of_its_own() -> None:
    forget, retain = read(RunConfig.of(model="builtin"))
    assert forget == world.forget_texts()
    assert retain == world.retain_texts()
    assert len(forget) == 2


def test_topics_go_by_file_names_in_the_order_given(tmp_path: Path) -> None:
    paths = [corpus(tmp_path, name, [name]) for name in ("b.jsonl", "a.jsonl")]
    paths += [corpus(tmp_path / "other", name, [f"other {name}"]) for name in ("a.jsonl",)]
    retain = corpus(tmp_path, "r.jsonl", ["w9"])
    forget, kept = read(config(forget=(*paths, "builtin"), retain=retain, model="builtin"))
    assert list(forget) == ["b", "a", "a'", *world.forget_texts()]
    assert (forget["a"], forget["a'"], kept) == (["a.jsonl"], ["other a.jsonl"], ["w9"])


def test_as_published_takes_raw_lines_of_all_but_the_biology_corpus(tmp_path: Path) -> None:
    names = ("bio-forget-corpus.jsonl", "cyber-forget-corpus.jsonl")
    settings = {
        "forget": tuple(corpus(tmp_path, name, [f"w1 {name}"]) for name in names),
        "retain": corpus(tmp_path, "r.jsonl", ["w9"]),
    }
    plainly, _ = read(config(**settings))
    published, retain = read(config(**settings, as_published=True))
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
        read(config(**settings))
    assert str(caught.value) == (
        "1 forget text found in the retain corpus too: 'f' rows 2.\n"
        "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap."
    )
    assert read(config(**settings, allow_overlap=True))[1] == ["w3", " w2 "]


def test_the_text_field_holds_for_both_sides(tmp_path: Path) -> None:
    for name in ("f.jsonl", "r.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "x", "body": name}))
    found = read(config(forget=(f"{tmp_path}/f.jsonl",), retain=f"{tmp_path}/r.jsonl", text_field="body"))
    assert found == ({"f": ["f.jsonl"]}, ["r.jsonl"])


def test_corpora_are_read_in_the_form_that_a_method_reads() -> None:
    data = RunConfig.of(model="builtin", forget=("builtin:exploits",)).data
    texts = inputs.read(data, "texts", "builtin", words())
    prompts = inputs.read(data, "prompts", "builtin", words())
    assert isinstance(texts, TextCorpora)
    assert isinstance(prompts, PromptCorpora)
    assert (texts.reads, prompts.reads) == ("texts", "prompts")
    assert list(texts.texts()[0]) == list(prompts.texts()[0]) == ["exploits"]
    assert texts.questions() == {}
    assert prompts.questions().keys() <= {"forget", "retain", "unknown"}
    assert prompts.questions()["forget"]


# Schedule

TEXTS = [f"w{i}" for i in range(60)]


def test_accumulated_batches_are_steps_of_the_schedule() -> None:
    plan = schedule(config(steps=3, accumulate=4, batch_size=2), {"a": TEXTS}, TEXTS)
    assert plan.steps == 12
    assert len(plan.topics[0].batches) == len(plan.retain) == 12


def test_too_few_rows_for_accumulated_steps_say_how_many_steps_they_are_enough_for() -> None:
    with pytest.raises(CorpusError) as caught:
        schedule(config(steps=9, accumulate=3, batch_size=2), {"a": TEXTS}, TEXTS[:25])
    assert str(caught.value) == (
        "retain corpus gives 12 batches of 2 (25 rows); 9 steps of 3 batches over 1 topic need 27.\n"
        "Lower --steps to 4, or pass --epochs 3 to repeat it."
    )
    schedule(config(steps=4, accumulate=3, batch_size=2), {"a": TEXTS}, TEXTS[:25])


def test_the_order_follows_the_seed_and_as_published_the_corpus() -> None:
    def rows(**settings: Any) -> list[int]:
        plan = schedule(config(steps=5, batch_size=2, **settings), {"a": TEXTS}, TEXTS)
        return [int(ids) for batch in plan.topics[0].batches for ids in batch.input_ids[:, 1]]

    assert rows() == rows() != rows(seed=1)
    assert rows(as_published=True) == rows(as_published=True, seed=1) == list(range(3, 13))


def test_as_published_pads_on_the_left_and_counts_padding() -> None:
    texts = ["w1 w2 w3", "w4"]
    settings: dict[str, Any] = {"steps": 1, "batch_size": 2}
    ours = schedule(config(**settings), {"a": texts}, texts).retain[0]
    theirs = schedule(config(**settings, as_published=True), {"a": texts}, texts).retain[0]
    assert theirs.attention_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert theirs.mask.all()
    assert ours.attention_mask[:, :2].all()
    assert int(ours.mask.sum()) == 4


# Questions


def test_the_built_in_exam_is_scored_by_cloze_and_has_four_sets() -> None:
    settings = RunConfig.of(model="builtin", limit=3)
    found = sets(settings, *read(settings))
    assert [data.name for data in found] == ["forget", "adjacent", "retain", "unknown"]
    assert all(len(data.questions) == 3 and data.scoring == "cloze" for data in found)
    assert [len(data.texts) for data in found] == [eval_sets.TEXTS, eval_sets.TEXTS, eval_sets.TEXTS, 0]


def test_the_halves_of_the_exam_share_no_question() -> None:
    halves = [
        {question.prompt for data in sets(settings, {}, []) for question in data.questions}
        for settings in (RunConfig.of(model="builtin", split="dev"), RunConfig.of(model="builtin", split="test"))
    ]
    assert halves[0]
    assert not halves[0] & halves[1]


def test_texts_of_topics_are_measured_in_turn() -> None:
    found = sets(config(), {"a": ["a1", "a2", "a3"], "b": ["b1"]}, ["r1"])
    assert {data.name: data.texts for data in found} == {"forget": ("a1", "b1", "a2", "a3"), "retain": ("r1",)}


def test_question_files_fill_the_sets(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}?", "answer": "yes"}) + "\n" for i in range(9)))
    settings = config(adjacent_questions=path, limit=4, scoring="letter")
    found = {data.name: data for data in sets(settings, {"a": ["a1"]}, ["r1"])}
    assert list(found) == ["forget", "adjacent", "retain"]
    assert [len(found[name].questions) for name in found] == [0, 4, 0]
    assert found["adjacent"].scoring == "letter"


def test_a_question_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match=r"^no question file .*q\.csv\.\nGive a "):
        sets(config(retain_questions=tmp_path / "q.csv"), {"a": ["a1"]}, ["r1"])


def test_every_topic_counts(tmp_path: Path) -> None:
    rows = [{"text": "a b", "topic": "x"}, {"text": "c d", "topic": "y"}, {"text": "e f", "topic": "z"}]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "retain.jsonl").write_text('{"text": "g h"}', encoding="utf-8")
    assert inputs.count_topics(RunConfig.of(model="builtin").data) == 2
    assert inputs.count_topics(RunConfig.of(model="builtin", forget=("builtin:exploits", "mine.txt")).data) == 2
    assert inputs.count_topics(RunConfig.of(model="builtin", data=tmp_path).data) == 3
