"""Reading corpora, their errors, and the batches and order that a run gets from them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lethe.data.batches import Schedule, batches, encode_rows
from lethe.data.corpora import check_overlap, read_texts
from lethe.data.settings import Batching
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError, EmptyBatchError, InvalidValueError
from lethe.types import Batch

DATA = Path(__file__).parents[4] / "shared" / "data"
SECRET = "SECRET"
"""Stands in every text of the files with errors, and in none of the messages."""


def tiny_tokenizer(template: str = "<s> $A", bos: str | None = "<s>", eos: str | None = "</s>") -> Any:
    """Words w0 ... w99 are ids 3 ... 102; <s> is 1 and </s> is 2."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": 3 + i for i in range(100)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos)


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        read_texts(*args, **kwargs)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "the cause may quote the corpus"
    return str(caught.value)


# Reading files


def test_jsonl_gives_the_field_in_order_and_leaves_out_blank_lines_and_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": " \\n"}\n{"text": " two\\n", "id": 3}')
    assert read_texts(path) == ["one", " two\n"]
    assert read_texts(str(path)) == ["one", " two\n"]


def test_jsonl_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\r\n')
    assert read_texts(path) == ["a\u2028b\x85c", "d"]


def test_raw_lines_are_the_lines_themselves_with_their_ends(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a\u2028 \\"b\\""}\n\n{"other": 1}\n')
    assert read_texts(path, raw_lines=True) == ['{"text": "a\u2028 \\"b\\""}\n', '{"other": 1}\n']


@pytest.mark.parametrize("content", ['[{"body": "a"},\n {"body": "b"}]', '{"body": "a"}\n{"body": "b"}\n'])
def test_json_is_an_array_or_one_object_a_line(tmp_path: Path, content: str) -> None:
    assert read_texts(write(tmp_path, "a.json", content), text_field="body") == ["a", "b"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_txt_gives_paragraphs_as_they_stand(tmp_path: Path, end: str) -> None:
    content = "\n \n = Title = \n\n\n first line \nsecond line\n\t\nlast".replace("\n", end)
    assert read_texts(write(tmp_path, "a.txt", content)) == [" = Title = ", " first line \nsecond line", "last"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path, "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert read_texts(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}')) == ["one"]
    assert read_texts(write(tmp_path, "a.json", b'\xef\xbb\xbf[{"text": "one"}]')) == ["one"]


@pytest.mark.skipif(not (DATA / "wikitext2").exists(), reason="needs WikiText-2 in ../shared/data/wikitext2")
def test_wikitext_has_its_paragraphs_and_headings() -> None:
    texts = read_texts(DATA / "wikitext2" / "test_raw.txt")
    assert len(texts) == 2891
    assert texts[0] == " = Robert Boulter = "
    assert not any("\n" in text or "\r" in text for text in texts)


# Errors of files

ERRORS = {
    "empty": ("a.jsonl", " \n", "{path}: no rows.\nGive a corpus with at least one text."),
    "empty array": ("a.json", "[]", "{path}: no rows.\nGive a corpus with at least one text."),
    "blank rows": (
        "a.jsonl",
        '{"text": " "}\n{"text": ""}',
        "{path}: all 2 rows blank.\nGive a corpus with at least one text.",
    ),
    "suffix": (
        "a.docx",
        SECRET,
        "{path}: no corpus is read from .docx.\n"
        "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset "
        "as name:config:split.",
    ),
    "no suffix": (
        "a",
        SECRET,
        "{path}: no corpus is read from a file without suffix.\n"
        "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, "
        "or a hub dataset as name:config:split.",
    ),
    "no such field": (
        "a.jsonl",
        '{"text": "SECRET"}\n\n{"body": "SECRET", "id": 1}',
        "{path}, line 3: no field 'text'; there is body, id.\nPass --text-field with the one that holds the text.",
    ),
    "no field at all": (
        "a.jsonl",
        "{}",
        "{path}, line 1: no field 'text'; there is none.\nPass --text-field with the one that holds the text.",
    ),
    "text for a field name": (
        "a.json",
        '[{"SECRET is made of": 1}]',
        "{path}, row 1: no field 'text'; there are 1 fields, not all with plain names (is the header missing?).\n"
        "Pass --text-field with the one that holds the text.",
    ),
    "broken line": (
        "a.jsonl",
        '{"text": "SECRET"}\n{"text": "SECRET" "SECRET"}',
        "{path}, line 2, column 19: not JSON (Expecting ',' delimiter).\nEach line must be one object.",
    ),
    "object over several lines": (
        "a.json",
        '{\n"text": "SECRET"}',
        "{path}, line 1, column 2: not JSON (Expecting property name enclosed in double quotes).\n"
        "Each line must be one object.",
    ),
    "broken array": (
        "a.json",
        '[{"text": "SECRET"},\n {"text": "SECRET"}',
        "{path}, line 2, column 20: not JSON (Expecting ',' delimiter).\nThe file must be one array.",
    ),
    "not an object": (
        "a.json",
        '[{"text": "x"}, "SECRET"]',
        "{path}, row 2: str found, where an object with a field 'text' must stand.",
    ),
    "array in a line": (
        "a.jsonl",
        '["SECRET"]',
        "{path}, line 1: list found, where an object with a field 'text' must stand.",
    ),
    "field is no text": (
        "a.jsonl",
        '{"text": "x"}\n{"text": ["SECRET"]}',
        "{path}, line 2: field 'text' holds list, not a text.\n"
        "Make it a string, or pass --text-field with another field.",
    ),
    "half a surrogate pair": (
        "a.jsonl",
        '{"text": "SECRET \\ud800"}',
        "{path}, line 1 holds half a surrogate pair (\\ud800 to \\udfff).\nRemove it.",
    ),
    "not UTF-8": (
        "a.txt",
        b"SECRET\ncaf\xe9\n",
        "{path}, line 2: byte 10 is not UTF-8.\nSave the file as UTF-8.",
    ),
    "not UTF-8 after a byte order mark": (
        "a.jsonl",
        b"\xef\xbb\xbfSECRET\n\ncaf\xe9\n",
        "{path}, line 3: byte 14 is not UTF-8.\nSave the file as UTF-8.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_file_line_and_fix_and_quote_no_text(tmp_path: Path, case: str) -> None:
    name, content, message = ERRORS[case]
    path = write(tmp_path, name, content)
    assert refusal(path) == message.replace("{path}", str(path))


def test_csv_and_parquet_give_the_column(tmp_path: Path) -> None:
    rows = [{"n": "1", "body": "one, and"}, {"n": "2", "body": " "}, {"n": "3", "body": "three"}]
    (tmp_path / "a.csv").write_text('n,body\n1,"one, and"\n2, \n3,three\n')
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert read_texts(tmp_path / name, text_field="body") == ["one, and", "three"]


def test_raw_lines_of_an_empty_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "\n")
    assert refusal(path, raw_lines=True).startswith(f"{path}: all 1 row blank.")


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "cyber.jsonl", "")
    kinds = (
        "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset as name:config:split."
    )
    assert refusal(tmp_path / "cybr.jsonl") == f"no corpus {tmp_path}/cybr.jsonl: did you mean cyber.jsonl?\n{kinds}"
    assert refusal(f"{tmp_path}/zzz.txt") == f"no corpus {tmp_path}/zzz.txt.\n{kinds}"
    assert (
        refusal(tmp_path / "no" / "a.txt")
        == f"no corpus {tmp_path}/no/a.txt: there is no folder {tmp_path}/no.\n{kinds}"
    )


def test_a_relative_path_without_suffix_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "cyber").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal("data/cybr").startswith("no corpus data/cybr: did you mean cyber?")
    assert refusal("cybr.jsonl").startswith("no corpus cybr.jsonl.")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.txt", "x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal(path) == f"{path} cannot be read: Permission denied."


# Dataset folders and hub datasets


def test_dataset_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", " ", "two"], "n": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "saved"))
    assert read_texts(tmp_path / "saved") == ["one", "two"]

    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    assert read_texts(tmp_path / "splits" / "test") == ["one", "two"]
    assert read_texts(f"{tmp_path}/splits::test") == ["one", "two"]
    assert refusal(tmp_path / "splits") == (
        f"{tmp_path}/splits has the splits train, test.\nName one, as {tmp_path}/splits::train"
    )
    assert refusal(f"{tmp_path}/splits::dev").startswith(f"{tmp_path}/splits has the splits train, test.\n")

    (tmp_path / "parquet").mkdir()
    rows.to_parquet(str(tmp_path / "parquet" / "a.parquet"))
    assert read_texts(tmp_path / "parquet") == ["one", "two"]
    assert refusal(tmp_path / "parquet", text_field="n") == (
        f"{tmp_path}/parquet, row 1: field 'n' holds int, not a text.\n"
        "Make it a string, or pass --text-field with another field."
    )
    assert refusal(tmp_path / "parquet", text_field="body") == (
        f"{tmp_path}/parquet, row 1: no field 'body'; there is text, n.\n"
        "Pass --text-field with the one that holds the text."
    )


@pytest.mark.parametrize(("name", "content"), [("a.csv", 'n,text\n1,"one, and"\n2,two\n'), ("a.jsonl", None)])
def test_folders_of_csv_and_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    (tmp_path / "folder").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one, and", "two"))
    write(tmp_path / "folder", name, content or rows)
    assert read_texts(tmp_path / "folder") == ["one, and", "two"]
    assert not any(cache.rglob("*.arrow")), "a copy of the corpus stayed behind"


def test_folders_that_are_no_datasets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    write(tmp_path / "broken", "a.jsonl", '{"text": "SECRET"\n')
    for name in ("empty", "broken"):
        message = re.sub(r"\(Dat\w+|\(Empty\w+", "(ITS KIND", refusal(tmp_path / name))
        assert message == (
            f"{tmp_path}/{name} is no dataset folder (ITS KIND).\n"
            "It must come from save_to_disk, or hold parquet, jsonl or csv files with equal columns."
        )
    assert SECRET not in caplog.text


def test_a_hub_dataset_is_asked_for_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    asked = []

    def load_dataset(name: str, config: str | None) -> Any:
        asked.append((name, config))
        rows = [{"text": "one"}]
        return {"test": rows} if config == "only" else {"train": [], "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_texts("org/wiki:raw:test") == ["one"]
    assert read_texts("wiki::test") == ["one"]
    assert read_texts("org/wiki:only") == ["one"]
    assert asked == [("org/wiki", "raw"), ("wiki", None), ("org/wiki", "only")]
    assert refusal("org/wiki:raw") == "org/wiki has the splits train, test.\nName one, as org/wiki:raw:train"


def test_a_hub_dataset_that_does_not_come_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")

    def load_dataset(name: str, config: str | None) -> Any:
        raise ConnectionError("Couldn't reach 'org/wiki' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("org/wiki") == (
        "org/wiki is neither a file or folder here nor a dataset that the hub gives "
        "(ConnectionError: Couldn't reach 'org/wiki' on the Hub).\n"
        "Give a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset as name:config:split."
    )


def test_without_the_package_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("org/wiki") == (
        'org/wiki: dataset folders and hub datasets need one more package: pip install "lethe-unlearn[eval]"'
    )


# Overlap


def test_overlap_is_counted_by_topic_and_row_and_whitespace_does_not_hide_it() -> None:
    forget = {"bio": ["a b", "c", "SECRET \n d"], "cyber": ["e"], "chem": [f"x{i}" for i in range(9)]}
    with pytest.raises(CorpusError) as caught:
        check_overlap(forget, ["SECRET d", " a  b\n", *(f"x{i}" for i in range(2, 9))], allow=False)
    assert str(caught.value) == (
        "9 forget texts found in the retain corpus too: 'bio' rows 1, 3; 'chem' rows 3, 4, 5, 6, 7, ....\n"
        "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap."
    )
    check_overlap(forget, ["a b"], allow=True)
    check_overlap(forget, ["a", "b c", "A B"], allow=False)


# Token rows


def test_rows_begin_with_bos_and_are_cut_at_the_right(tokenizer: Any) -> None:
    tokenizer.truncation_side = "left"
    assert encode_rows(["w0 w1 w2 w3", "w4"], tokenizer, max_length=3) == [[1, 3, 4], [1, 7]]


def test_chunks_lose_no_token_and_each_has_its_own_bos_and_eos(tokenizer: Any) -> None:
    texts = ["w0 w1 w2 w3 w4", "w5", "w6 w7"]
    assert encode_rows(texts, tokenizer, max_length=3, chunk=True) == [[1, 3, 4], [1, 5, 6], [1, 7], [1, 8], [1, 9, 10]]
    both = tiny_tokenizer("<s> $A </s>")
    assert encode_rows(texts[:1], both, max_length=4, chunk=True) == [[1, 3, 4, 2], [1, 5, 6, 2], [1, 7, 2]]
    assert encode_rows(texts[:1], both, max_length=4) == [[1, 3, 4, 2]]
    neither = tiny_tokenizer("$A")
    assert encode_rows(texts[:1], neither, max_length=2, chunk=True) == [[3, 4], [5, 6], [7]]


def test_special_tokens_inside_a_text_are_text() -> None:
    assert encode_rows(["<s> w0 </s>"], tiny_tokenizer("<s> $A </s>"), max_length=9, chunk=True) == [[1, 1, 3, 2, 2]]


def test_texts_without_tokens_give_no_row_and_limit_counts_rows(tokenizer: Any) -> None:
    texts = ["\u00a0", *(f"w{i}" for i in range(90))]
    assert encode_rows(texts, tokenizer, max_length=4, limit=2) == [[1, 3], [1, 4]]
    assert len(encode_rows(texts, tokenizer, max_length=4, limit=80)) == 80
    assert len(encode_rows(texts, tokenizer, max_length=4)) == 90


def test_texts_beyond_the_limit_are_not_tokenized(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    tokenize = type(tokenizer).__call__

    def watched(self: Any, texts: list[str], **settings: Any) -> Any:
        seen.extend(texts)
        return tokenize(self, texts, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    assert len(encode_rows(["w0"] * 999, tokenizer, max_length=4, limit=100)) == 100
    assert 100 <= len(seen) < 200


def test_a_length_that_fits_no_token_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        encode_rows(["w0"], tokenizer, max_length=1)
    assert str(caught.value) == "'max_length' must be at least 2: the tokenizer adds 1 to each row. Got 1."


# Batches

ROWS = [[1, 5], [1, 6, 2, 7], [1, 8, 9], [1, 2], [1, 3, 4]]


def rows_of(batch: Batch) -> list[list[int]]:
    return [ids[real].tolist() for ids, real in zip(batch.input_ids, batch.attention_mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", ["no-bos", "real-tokens", "all-tokens"])
def test_batches_pad_to_their_own_longest_row_and_count_what_was_asked(tokenizer: Any, side: Any, count: Any) -> None:
    found = batches(ROWS, tokenizer, batch_size=2, count=count, padding_side=side)
    assert [rows_of(batch) for batch in found] == [ROWS[:2], ROWS[2:4]], "a last incomplete batch is dropped"
    assert [tuple(batch.input_ids.shape) for batch in found] == [(2, 4), (2, 3)]
    left = side == "left"
    assert found[0].input_ids.tolist() == [[2, 2, 1, 5] if left else [1, 5, 2, 2], [1, 6, 2, 7]]
    assert found[0].attention_mask.tolist() == [[not left] * 2 + [left] * 2, [True] * 4]
    expected = {
        "no-bos": [[False, False, False, True] if left else [False, True, False, False], [False, True, True, True]],
        "real-tokens": [[False, False, True, True] if left else [True, True, False, False], [True] * 4],
        "all-tokens": [[True] * 4, [True] * 4],
    }
    assert found[0].mask.tolist() == expected[count]


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_come_from_lengths_where_bos_eos_and_padding_are_one_id(side: Any) -> None:
    tokenizer = tiny_tokenizer("<s> $A", bos="<s>", eos="<s>")
    tokenizer.pad_token = "<s>"
    (batch,) = batches([[1, 5, 1], [1, 1, 1, 1, 6]], tokenizer, batch_size=2, count="no-bos", padding_side=side)
    assert rows_of(batch) == [[1, 5, 1], [1, 1, 1, 1, 6]]
    assert batch.mask.sum(1).tolist() == [2, 4], "only the first token of a row is BOS"
    assert batch.mask[0].tolist() == ([False] * 3 + [True] * 2 if side == "left" else [False, True, True, False, False])


def test_without_bos_the_first_token_counts() -> None:
    tokenizer = tiny_tokenizer("$A", bos=None, eos=None)
    (batch,) = batches([[5, 6], [7]], tokenizer, batch_size=2, count="no-bos", padding_side="right")
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.input_ids.tolist() == [[5, 6], [7, 0]]


def test_padding_is_eos_as_published_even_if_there_is_a_padding_token(tokenizer: Any) -> None:
    tokenizer.pad_token = "<unk>"
    (batch,) = batches([[1, 5], [1]], tokenizer, batch_size=2, count="all-tokens", padding_side="right")
    assert batch.input_ids.tolist() == [[1, 5], [1, 2]]


def test_a_batch_without_a_counted_token_is_refused(tokenizer: Any) -> None:
    rows = [[1, 5], [1, 6], [1], [1]]
    with pytest.raises(EmptyBatchError) as caught:
        batches(rows, tokenizer, batch_size=2, count="no-bos", padding_side="left", name="forget corpus 'bio'")
    assert str(caught.value) == (
        "forget corpus 'bio': no token counts in batch 2; its 2 rows hold BOS alone.\n"
        "Remove the texts that this tokenizer turns into nothing."
    )
    assert len(batches(rows, tokenizer, batch_size=2, count="real-tokens", padding_side="left")) == 2


# The schedule of a run


def plan(
    forget: dict[str, list[str]],
    retain: list[str],
    *,
    seed: int = 0,
    steps: int = 4,
    accumulate: int = 1,
    **changes: Any,
) -> Schedule:
    corpora = TextCorpora(forget=forget, retain=retain, tokenizer=tiny_tokenizer())
    batching = Batching(**{"batch_size": 2, "max_length": (8,), **changes})
    return corpora.schedule(batching, torch.Generator().manual_seed(seed), steps=steps, accumulate=accumulate)


def words(start: int, n: int) -> list[str]:
    return [f"w{i}" for i in range(start, start + n)]


def all_rows(found: Schedule) -> list[tuple[str, list[list[int]], list[list[int]]]]:
    steps = [found.at(step) for step in range(found.steps)]
    return [(topic.name, rows_of(forget), rows_of(retain)) for topic, forget, retain in steps]


def test_in_order_topics_take_turns_and_share_each_retain_batch() -> None:
    found = plan({"bio": words(0, 6), "cyber": words(10, 6)}, words(20, 6), steps=5, shuffle=False)
    assert all_rows(found) == [
        ("bio", [[1, 3], [1, 4]], [[1, 23], [1, 24]]),
        ("cyber", [[1, 13], [1, 14]], [[1, 23], [1, 24]]),
        ("bio", [[1, 5], [1, 6]], [[1, 25], [1, 26]]),
        ("cyber", [[1, 15], [1, 16]], [[1, 25], [1, 26]]),
        ("bio", [[1, 7], [1, 8]], [[1, 27], [1, 28]]),
    ]
    assert found.at(0)[2] is found.at(1)[2]
    assert found.at(0)[2] is not found.at(2)[2]


def test_shuffled_every_corpus_has_its_own_order_and_every_step_its_own_rows() -> None:
    found = plan({"a": words(0, 40), "b": words(0, 40)}, words(0, 80), steps=40)
    by_topic = {name: [row for n, rows, _ in all_rows(found) if n == name for row in rows] for name in "ab"}
    retain = [row for _, _, rows in all_rows(found) for row in rows]
    whole = [[1, 3 + i] for i in range(40)]
    assert by_topic["a"] != whole
    assert by_topic["a"] != by_topic["b"]
    assert sorted(by_topic["a"]) == sorted(by_topic["b"]) == whole
    assert sorted(retain) == [[1, 3 + i] for i in range(80)]


def test_the_generator_decides_the_order() -> None:
    forget, retain = {"a": words(0, 30), "b": words(30, 30)}, words(60, 40)
    assert all_rows(plan(forget, retain, seed=1)) == all_rows(plan(forget, retain, seed=1))
    assert all_rows(plan(forget, retain, seed=1)) != all_rows(plan(forget, retain, seed=2))
    before = torch.random.get_rng_state()
    plan(forget, retain)
    assert torch.equal(before, torch.random.get_rng_state())


def test_each_topic_and_the_retain_corpus_have_their_own_length() -> None:
    texts = [" ".join(words(0, 50))] * 8
    found = plan({"a": texts, "b": texts}, texts, max_length=(5, 7, 3))
    widths = [tuple(batch.input_ids.shape[1] for batch in found.at(step)[1:]) for step in range(2)]
    assert widths == [(5, 3), (7, 3)]


def test_chunks_are_shuffled_after_cutting() -> None:
    texts = [" ".join(words(0, 20)), " ".join(words(20, 20))]
    found = plan({"a": texts}, texts, chunk=True, max_length=(5, 5), steps=5)
    rows = [row for _, forget, _ in all_rows(found) for row in forget]
    assert sorted(rows) == [[1, *range(i, i + 4)] for i in range(3, 43, 4)]
    assert rows != sorted(rows)


def test_epochs_come_again_as_the_same_objects() -> None:
    found = plan({"a": words(0, 5)}, words(10, 7), steps=6, epochs=3)
    steps = [found.at(step) for step in range(6)]
    assert all(steps[i][1] is steps[i % 2][1] for i in range(6))
    assert all(steps[i][2] is steps[i % 3][2] for i in range(6))
    assert len({id(forget) for _, forget, _ in steps}) == 2
    assert len({id(retain) for _, _, retain in steps}) == 3


SHORT = {
    "forget": (
        {"forget": {"a": words(0, 40), "b": words(0, 7)}, "retain": words(0, 90), "steps": 9},
        "forget corpus 'b' gives 3 batches of 2 (7 rows); 9 steps over 2 topics need 5.\n"
        "Lower --steps to 6, or pass --epochs 2 to repeat it.",
    ),
    "retain": (
        {"forget": {"a": words(0, 9)}, "retain": words(0, 3)},
        "retain corpus gives 1 batch of 2 (3 rows); 4 steps over 1 topic need 4.\n"
        "Lower --steps to 1, or pass --epochs 4 to repeat it.",
    ),
    "retain in order": (
        {"forget": {"a": words(0, 9), "b": words(0, 9)}, "retain": words(0, 3), "shuffle": False},
        "retain corpus gives 1 batch of 2 (3 rows); 4 steps over 2 topics need 2.\n"
        "Lower --steps to 2, or pass --epochs 2 to repeat it.",
    ),
    "even repeated": (
        {"forget": {"a": words(0, 4)}, "retain": words(0, 99), "steps": 7, "epochs": 3},
        "forget corpus 'a' gives 2 batches of 2 (4 rows), 6 in 3 epochs; 7 steps over 1 topic need 7.\n"
        "Lower --steps to 6, or pass --epochs 4 to repeat it.",
    ),
    "accumulated": (
        {"forget": {"a": words(0, 40)}, "retain": words(0, 11), "accumulate": 2},
        "retain corpus gives 5 batches of 2 (11 rows); 4 steps of 2 batches over 1 topic need 8.\n"
        "Lower --steps to 2, or pass --epochs 2 to repeat it.",
    ),
    "too few for one accumulated step": (
        {"forget": {"a": words(0, 40)}, "retain": words(0, 4), "accumulate": 4},
        "retain corpus gives 2 batches of 2 (4 rows); 4 steps of 4 batches over 1 topic need 16.\n"
        "Lower --accumulate, or pass --epochs 8 to repeat it.",
    ),
    "less than a batch": (
        {"forget": {"a": words(0, 1)}, "retain": words(0, 9), "epochs": 9},
        "forget corpus 'a' gives 1 row, fewer than one batch of 2.\nAdd texts, or lower --batch-size.",
    ),
}


@pytest.mark.parametrize("case", SHORT)
def test_a_short_corpus_says_what_it_has_what_is_needed_and_what_to_pass(case: str) -> None:
    settings, message = SHORT[case]
    with pytest.raises(CorpusError) as caught:
        plan(**settings)
    assert str(caught.value) == message
    steps, epochs = re.search(r"--steps to (\d+)", message), re.search(r"--epochs (\d+)", message)
    if steps and epochs:  # The advice must work.
        plan(**(settings | {"steps": int(steps[1])}))
        plan(**(settings | {"epochs": int(epochs[1])}))


@pytest.mark.parametrize("name", ["steps", "accumulate", "batch_size", "epochs"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^'{name}' must be at least 1. Got 0.$"):
        plan({"a": words(0, 9)}, words(0, 9), **{name: 0})


def test_topics_and_lengths_must_match() -> None:
    with pytest.raises(InvalidValueError, match=r"^'topics' must be at least 1. Got 0.$"):
        plan({}, words(0, 9))
    with pytest.raises(InvalidValueError) as caught:
        plan({"a": words(0, 9)}, words(0, 9), max_length=(8, 8, 8, 8))
    assert str(caught.value) == ("'max_length' needs one number, or 2 for 1 topic and the retain corpus. Got 4.")


def test_an_empty_batch_names_its_corpus() -> None:
    corpora = TextCorpora(forget={"a": words(0, 2)}, retain=["<s>", "<s>"], tokenizer=tiny_tokenizer("$A"))
    batching = Batching(batch_size=2, max_length=(4,), padding_side="left", shuffle=False)
    with pytest.raises(EmptyBatchError, match=r"^retain corpus: no token counts in batch 1"):
        corpora.schedule(batching, torch.Generator(), steps=1)
