"""A folder of own data: what is found in it, which topics and sets it has, and what a run makes of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lethe.data import data_folder
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError, QuestionError, UsageError
from lethe.evaluation import eval_sets
from lethe.methods.rmu import RMU
from lethe.model.loading import load_tokenizer
from lethe.runs import inputs
from lethe.runs.config import RunConfig
from lethe.runs.config_file import plain, read_run_config
from lethe.suites import world
from lethe.types import EvalSet

FORGET = [{"text": "alpha hides", "topic": "letters"}, {"text": "  "}, {"text": "one hides", "topic": "numbers"}]
RETAIN = [{"text": "bread is baked"}, {"text": "soup is cooked"}]
QUESTIONS = [
    {"question": "What hides?", "answer": "alpha"},
    {"question": "What is baked?", "answer": "bread", "set": "retain"},
    {"question": "What follows alpha?", "answer": "beta", "set": "adjacent"},
]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "forget.jsonl", FORGET)
    jsonl(tmp_path / "retain.jsonl", RETAIN)
    jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    return tmp_path


def config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.of(**{"model": "builtin", "data": folder, "layer": 5, **changes})


def read_corpora(config: RunConfig, **changes: Any) -> tuple[dict[str, list[str]], list[str]]:
    return inputs.read_corpora(config.data, config.base.model, **changes)


def sets_of(config: RunConfig) -> dict[str, EvalSet]:
    """By name."""
    forget, retain = read_corpora(config)
    corpora = TextCorpora(forget=forget, retain=retain, tokenizer=load_tokenizer(world.MODEL_FOLDER))
    return {data.name: data for data in eval_sets.sets(config.base.model, config.data, config.evaluation, corpora)}


def test_the_values_of_the_field_topic_are_topics(folder: Path) -> None:
    assert data_folder.forget_texts(folder) == {"letters": ["alpha hides"], "numbers": ["one hides"]}


def test_a_row_without_topic_is_of_the_one_named_like_the_file(folder: Path) -> None:
    jsonl(folder / "forget.jsonl", [{"text": "a"}, {"text": "b", "topic": "t"}, {"text": "c", "topic": None}])
    assert data_folder.forget_texts(folder) == {"forget": ["a", "c"], "t": ["b"]}


def test_every_file_of_the_forget_folder_is_a_topic(folder: Path) -> None:
    (folder / "forget.jsonl").unlink()
    jsonl(folder / "forget" / "two.jsonl", [{"text": "b"}])
    jsonl(folder / "forget" / "one.jsonl", [{"text": "a"}])
    assert data_folder.forget_texts(folder) == {"one": ["a"], "two": ["b"]}


def test_rows_keep_their_line_although_blank_ones_are_left_out(folder: Path) -> None:
    assert [row.number for row in data_folder.read_rows(folder / "forget.jsonl")] == [1, 3]
    assert data_folder.blank_rows(folder / "forget.jsonl") == (2,)


def test_paragraphs_are_rows_without_topics(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert [(row.number, row.text, row.topic) for row in data_folder.read_rows(tmp_path / "a.txt")] == [
        (1, "first", ""),
        (2, "second", ""),
    ]
    assert data_folder.blank_rows(tmp_path / "a.txt") == ()


def test_as_published_the_lines_themselves_are_the_texts(folder: Path) -> None:
    found = data_folder.forget_texts(folder, raw_lines=True)
    assert found["forget"][0] == json.dumps(FORGET[0]) + "\n"
    assert read_corpora(config(folder, as_published=True))[0] == found


def test_prompts_have_topics_too(folder: Path) -> None:
    rows = [{"question": "Who?", "answer": "x", "topic": "people"}, {"question": "What?", "answer": "y", "edge": "no"}]
    jsonl(folder / "forget.jsonl", rows)
    found = data_folder.forget_prompts(folder)
    assert {name: [one.prompt for one in asked] for name, asked in found.items()} == {
        "people": ["Who?"],
        "forget": ["What?"],
    }


def test_questions_are_parted_by_their_field_set(folder: Path) -> None:
    found = data_folder.questions(folder)
    assert {name: [one.answer for one in asked] for name, asked in found.items()} == {
        "forget": ["alpha"],
        "adjacent": ["beta"],
        "retain": ["bread"],
    }
    (folder / "questions.jsonl").unlink()
    assert data_folder.questions(folder) == {}


# What a run makes of it


def test_a_run_reads_the_folder(folder: Path) -> None:
    forget, retain = read_corpora(config(folder))
    assert (forget, retain) == (data_folder.forget_texts(folder), ["bread is baked", "soup is cooked"])
    sets = sets_of(config(folder))
    assert [one.answer for one in sets["forget"].questions] == ["alpha"]
    assert [one.answer for one in sets["adjacent"].questions] == ["beta"]
    assert [one.answer for one in sets["retain"].questions] == ["bread"]


def test_a_model_of_ones_own_needs_no_other_flag(folder: Path) -> None:
    forget, retain = read_corpora(config(folder, model="./mine"))
    assert (len(forget), len(retain)) == (2, 2)


def test_what_is_named_wins_over_the_folder(folder: Path, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other" / "mine.jsonl", [{"text": "other text"}])
    mine = jsonl(tmp_path / "other" / "asked.jsonl", [{"question": "Else?", "answer": "other"}])
    changed = config(folder, forget=(str(other),), retain_questions=mine)
    forget, retain = read_corpora(changed)
    assert (forget, retain) == ({"mine": ["other text"]}, ["bread is baked", "soup is cooked"])
    sets = sets_of(changed)
    assert [one.answer for one in sets["retain"].questions] == ["other"]
    assert [one.answer for one in sets["forget"].questions] == ["alpha"]
    assert read_corpora(config(folder, retain=str(other)))[1] == ["other text"]
    assert set(read_corpora(config(folder, forget=("builtin:exploits",)))[0]) == {"exploits"}


def test_a_method_that_reads_prompts_takes_them_from_the_folder(folder: Path) -> None:
    jsonl(folder / "forget.jsonl", [{"question": "Who hides?", "answer": "alpha"}])
    jsonl(folder / "retain.jsonl", [{"question": "What is baked?", "answer": "bread"}])
    found = inputs.read_prompts(config(folder).data, "builtin", load_tokenizer(world.MODEL_FOLDER))
    assert [one.answer for one in found.forget["forget"]] == ["alpha"]
    assert [one.answer for one in found.retain] == ["bread"]


def test_the_folder_stands_in_the_config_of_a_run(folder: Path, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain(RMU(), config(folder))))
    assert read_run_config(path).data.data == folder


# What is wrong with a folder


def test_a_missing_part_is_named_with_its_flag(folder: Path) -> None:
    (folder / "retain.jsonl").unlink()
    with pytest.raises(CorpusError) as error:
        read_corpora(config(folder))
    assert str(error.value) == f"{folder} holds no retain.jsonl.\nAdd it, or pass --retain FILE."
    (folder / "forget.jsonl").unlink()
    with pytest.raises(CorpusError) as error:
        data_folder.forget_texts(folder)
    assert str(error.value) == (
        f"{folder} holds no forget.jsonl and no forget/*.jsonl.\nAdd it, or pass --forget FILE."
    )
    # An evaluation reads what is there.
    assert read_corpora(config(folder, model="./mine"), required=False) == ({}, [])


def test_an_empty_folder_is_answered_with_the_names_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as error:
        read_corpora(config(tmp_path))
    assert str(error.value) == (
        f"{tmp_path} holds neither forget.jsonl nor forget/*.jsonl, retain.jsonl or questions.jsonl.\n"
        "Name the files so, or name each by its own flag: --forget, --retain, --forget-questions."
    )


def test_a_folder_that_is_not_there_is_answered_with_one_of_a_similar_name(folder: Path) -> None:
    near = folder.parent / f"{folder.name}x"
    with pytest.raises(CorpusError) as error:
        data_folder.find(near)
    assert str(error.value) == (
        f"no folder {near}: did you mean {folder.name}?\nGive one with forget.jsonl and retain.jsonl."
    )


def test_two_forget_corpora_are_one_too_many(folder: Path) -> None:
    jsonl(folder / "forget" / "one.jsonl", [{"text": "a"}])
    with pytest.raises(CorpusError, match=r"holds forget.jsonl and forget/ with 1 .jsonl.\nKeep one of the two."):
        data_folder.find(folder)


@pytest.mark.parametrize("topic", [7, "x" * 61, "two\nlines", ["a"]])
def test_a_topic_that_is_no_name_is_refused_unquoted(folder: Path, topic: Any) -> None:
    jsonl(folder / "forget.jsonl", [{"text": "fine"}, {"text": "a", "topic": topic}])
    with pytest.raises(CorpusError) as error:
        data_folder.forget_texts(folder)
    assert str(error.value) == (
        f"{folder / 'forget.jsonl'}, line 2: field 'topic' is no name of at most 60 characters.\n"
        "Names of topics stand in reports: give a short one, or leave the field out."
    )


@pytest.mark.parametrize("name", ["Forget", "unknown", 3, None, ["retain"]])
def test_an_unknown_set_is_refused_unquoted(folder: Path, name: Any) -> None:
    jsonl(folder / "questions.jsonl", [{"question": "q", "answer": "a", "set": name}])
    with pytest.raises(QuestionError) as error:
        data_folder.questions(folder)
    assert str(error.value) == (
        f"{folder / 'questions.jsonl'}, line 1: no set of this name.\n"
        "'set' is forget, adjacent, retain, or left out for forget."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "secr', "line 2, column 10: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: byte 24 is not UTF-8"),
        (b'{"body": "secret"}\n', "line 1: no field 'text'; there is body"),
        (b'{"text": 5}\n', "line 1: field 'text' holds int, not a text"),
        (b'["secret"]\n', "line 1: list found, where an object"),
        (b"", "no rows"),
        (b'{"text": " "}\n', "all 1 row blank"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_their_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "forget.jsonl").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_corpora(config(folder))
    assert str(folder / "forget.jsonl") in str(error.value)
    assert message in str(error.value)
    assert "secr" not in str(error.value)


def test_a_csv_has_sets_too(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("question,answer,set\na,b,retain\nc,d,forget\n")
    found = data_folder.questions_by_set(path)
    assert {name: [one.prompt for one in questions] for name, questions in found.items()} == {
        "forget": ["c"],
        "retain": ["a"],
    }
