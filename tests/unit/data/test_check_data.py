"""The data check: counts, rows that are no text, duplicates, overlaps, questions; when a run would mean nothing."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lethe.cli.main import main
from lethe.data.check_data import DataCheck, Finding, check
from lethe.data.near_duplicates import NEAR, Index, Words, contained, near_duplicates, union
from lethe.model.loading import load_tokenizer
from lethe.suites import world

SECRET = "zyxwv"


def texts(count: int, *, seed: int = 0, length: int = 40) -> list[str]:
    """Rows of random words; every one holds the secret."""
    rng = random.Random(seed)
    return [" ".join([SECRET, *(f"w{rng.randrange(10**6)}x" for _ in range(length))]) for _ in range(count)]


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in rows))
    return path


def look(folder: Path, forget: Sequence[Any], retain: Sequence[Any], questions: Sequence[Any] = ()) -> DataCheck:
    files = [jsonl(folder / "questions.jsonl", questions)] if questions else []
    found = check([jsonl(folder / "forget.jsonl", forget)], jsonl(folder / "retain.jsonl", retain), files)
    assert SECRET not in repr(found), "a finding quotes a row"
    return found


def about(found: DataCheck, words: str) -> Finding:
    """The one finding that says this."""
    (one,) = [finding for finding in found.findings if words in finding.what]
    return one


def changed(text: str, count: int = 1) -> str:
    """The text with its last words replaced."""
    return " ".join([*text.split()[:-count], *(f"other{i}" for i in range(count))])


# Similarity


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)


def grams_by_hand(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def test_near_duplicates_are_those_of_comparing_all_pairs() -> None:
    rng = random.Random(1)
    rows = []
    for text in texts(60, length=30):
        rows += [text, changed(text, rng.randrange(1, 9)), " ".join(["same opening words of every row", text[:60]])]
    rng.shuffle(rows)
    words = Words()
    sets = [words.grams(row) for row in rows]
    hands = [grams_by_hand(row) for row in rows]
    assert [len(found) for found in sets] == [len(found) for found in hands]
    expected, kept = [], []
    for row, mine in enumerate(hands):
        like = next((other for other in kept if jaccard(mine, hands[other]) >= NEAR), None)
        if like is None:
            kept.append(row)
        else:
            expected.append((row, like))
    assert len(expected) > 10
    assert near_duplicates(sets) == expected


def test_exactly_the_threshold_is_near() -> None:
    # 5-grams of a to i: 5; those of a to h: 4, all shared: 4 / 5.
    words = Words()
    nine, eight, seven = (words.grams(" ".join("abcdefghi"[:n])) for n in (9, 8, 7))
    index = Index([nine, eight, seven])
    index.add(3, nine)
    assert list(index.like(eight)) == [3]
    assert list(index.like(seven)) == []


def test_case_and_punctuation_do_not_part_texts_but_order_does() -> None:
    words = Words()
    assert np.array_equal(words.grams("One, two three FOUR five six!"), words.grams("one two three four five six"))
    assert not np.array_equal(words.grams("a b c d e"), words.grams("b a c d e"))
    assert words.grams("...").size == 0
    assert words.count("漢字かな") == 4


def test_containment_is_the_share_of_the_smaller() -> None:
    words = Words()
    whole = union([words.grams("a b c d e f g h i j")])
    assert contained(words.grams("b c d e f g"), whole) == 1
    assert contained(words.grams("b c d e f x"), whole) == 0.5
    assert contained(words.grams(""), whole) == 0


# Corpora


def test_good_data_is_counted_and_nothing_stops(tmp_path: Path) -> None:
    forget = [{"text": text, "topic": "ab"[i % 2]} for i, text in enumerate(["12345 a", "b" * 3 + " c", *texts(6)])]
    question = {"question": "Which word stands in all of the rows?", "answer": SECRET}
    found = look(tmp_path, forget, texts(9, seed=1), [question, {**question, "question": "Which?", "set": "retain"}])
    assert [(facts.name, facts.rows, facts.shortest, facts.tokens) for facts in found.forget] == [
        ("a", 4, 7, None),
        ("b", 4, 5, None),
    ]
    assert found.retain is not None
    assert found.retain.rows == 9
    assert found.retain.characters == sum(map(len, texts(9, seed=1)))
    assert found.questions == {"forget": 1, "retain": 1}
    assert (found.findings, found.stops) == ((), ())


def test_tokens_are_counted_by_topic(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world.MODEL_FOLDER)
    path = jsonl(tmp_path / "forget.jsonl", rows := texts(70, length=3))
    found = check([path], None, tokenizer=tokenizer)
    expected = sum(len(tokenizer(row, add_special_tokens=False)["input_ids"]) for row in rows)
    assert [facts.tokens for facts in found.forget] == [expected]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1234 5678, 9.10", "no letters"),
        ("-" * 40 + "a", "mostly one character"),
        (json.dumps({"inner": SECRET}), "JSON inside the text"),
        (json.dumps([SECRET]), "JSON inside the text"),
        ("ab\x00\x01\x02cd", "control characters"),
        ("\ufffd\ufffd caf\ufffd", "control characters"),
    ],
)
def test_a_row_that_is_no_text_is_named_by_its_line(tmp_path: Path, row: str, words: str) -> None:
    found = look(tmp_path, [*texts(4), row], texts(5, seed=1))
    assert (about(found, words).level, about(found, words).rows) == ("warning", (5,))


@pytest.mark.parametrize("row", ["[x] is read aloud", "{not json", "naïve café\n\tß", "Ünïcödé", "ok"])
def test_unusual_text_is_text(tmp_path: Path, row: str) -> None:
    found = look(tmp_path, [*texts(4), row], texts(5, seed=1))
    assert [finding.where for finding in found.findings] == ["questions"]


def test_more_rows_that_are_no_text_than_are_stop_a_run(tmp_path: Path) -> None:
    found = look(tmp_path, [*texts(3), "1", "22", "-" * 20, "4 4"], texts(5, seed=1))
    assert {finding.level for finding in found.findings if finding.where.endswith("forget.jsonl")} == {"stop"}


def test_blank_rows_are_named_by_their_line(tmp_path: Path) -> None:
    assert about(look(tmp_path, ["", *texts(4), " "], texts(5, seed=1)), "blank").rows == (1, 6)


def test_a_huge_row_is_named(tmp_path: Path) -> None:
    huge = " ".join(["word"] * 250_000) + f" {SECRET}"
    found = look(tmp_path, [*texts(4), huge], texts(5, seed=1))
    assert about(found, "longer than 1000000 characters").rows == (5,)


def test_duplicates_are_told_from_near_duplicates(tmp_path: Path) -> None:
    rows = texts(5)
    found = look(tmp_path, [*rows, f" {rows[0]}\n", changed(rows[1]), changed(rows[2], 20)], texts(5, seed=1))
    assert about(found, "the same text as an earlier row").rows == (6,)
    assert about(found, "near-duplicates").rows == (7,)
    assert not found.stops


def test_too_few_rows_are_named(tmp_path: Path) -> None:
    assert about(look(tmp_path, texts(3), texts(5, seed=1)), "3 rows, fewer").where == "forget"


def test_one_forget_row_that_should_be_kept_too_stops_a_run(tmp_path: Path) -> None:
    rows = texts(20)
    found = look(tmp_path, rows, [*texts(5, seed=1), f"{rows[3]} "])
    assert [(stop.rows, stop.level) for stop in found.stops] == [((4,), "stop")]


@pytest.mark.parametrize(("count", "level"), [(2, "warning"), (3, "stop")])
def test_near_overlap_stops_a_run_from_a_tenth_on(tmp_path: Path, count: int, level: str) -> None:
    rows = texts(20)
    found = look(tmp_path, rows, [*texts(5, seed=1), *(changed(row) for row in rows[:count])])
    one = about(found, "nearly stand in the retain corpus")
    assert (one.level, one.rows) == (level, tuple(range(1, count + 1)))


def test_a_corpus_that_is_both_sides_stops_a_run(tmp_path: Path) -> None:
    found = look(tmp_path, texts(6), texts(6))
    assert [stop.rows for stop in found.stops] == [(1, 2, 3, 4, 5, 6)]


# Questions


def ask(prompt: str, answer: str = SECRET, **more: Any) -> dict[str, Any]:
    return {"question": prompt, "answer": answer, **more}


def test_a_question_in_two_sets_is_a_warning_and_all_of_them_a_stop(tmp_path: Path) -> None:
    one, two = ask("Which word?"), ask("And which other word?")
    found = look(tmp_path, texts(5), texts(5, seed=1), [one, two, {**one, "set": "retain"}])
    assert about(found, "1 are retain questions, too").level == "warning"
    found = look(tmp_path, texts(5), texts(5, seed=1), [one, {**one, "set": "adjacent"}])
    assert about(found, "1 are adjacent questions, too").level == "stop"


def test_a_question_asked_twice_is_counted(tmp_path: Path) -> None:
    found = look(tmp_path, texts(5), texts(5, seed=1), [ask("Which word?"), ask("Which  word?")])
    assert about(found, "1 of 2 asked before").where == "forget questions"


def test_questions_copied_from_a_corpus_are_counted_by_side(tmp_path: Path) -> None:
    forget, retain = texts(5), texts(5, seed=1)
    of_forget, of_retain = (" ".join(rows[0].split()[:12]) for rows in (forget, retain))
    asked = [ask(of_forget, forget[0].split()[12]), ask(of_retain, retain[0].split()[12]), ask("Which word of all?")]
    found = look(tmp_path, forget, retain, asked)
    assert about(found, "in the forget corpus").what.startswith("1 of 3")
    assert about(found, "in the forget corpus").level == "note"
    assert about(found, "in the retain corpus").level == "warning"


def test_answers_that_the_forget_corpus_does_not_hold_are_a_warning(tmp_path: Path) -> None:
    found = look(tmp_path, texts(5), texts(5, seed=1), [ask("Which?", "elsewhere"), ask("What?", "nowhere at all")])
    assert about(found, "none of 2 answers").level == "warning"
    found = look(tmp_path, texts(5), texts(5, seed=1), [ask("Which?", "elsewhere"), ask("What?", SECRET.upper())])
    assert not found.findings


def test_no_questions_are_a_warning(tmp_path: Path) -> None:
    assert about(look(tmp_path, texts(5), texts(5, seed=1)), "no questions on what").level == "warning"


# What cannot be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b'{"text": "zyxwv', "line 1, column 10: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": 3}', "holds int, not a text"),
        (b'{"body": "zyxwv"}', "no field 'text'; there is body"),
        (b'"zyxwv"', "str found"),
    ],
)
def test_every_unreadable_file_is_a_stop_beside_the_others(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("forget", "retain", "questions"):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    found = check([tmp_path / "forget.jsonl"], tmp_path / "retain.jsonl", [tmp_path / "questions.jsonl"])
    assert [Path(stop.where).stem for stop in found.stops] == ["forget", "retain", "questions"]
    assert all(message in stop.what for stop in found.stops[:2])
    assert SECRET not in repr(found)


def test_missing_sides_and_files_are_stops(tmp_path: Path) -> None:
    found = check([], tmp_path / "none.jsonl", [tmp_path / "none.csv"])
    assert [(stop.where, stop.what.splitlines()[0]) for stop in found.stops] == [
        (str(tmp_path / "none.jsonl"), f"no corpus {tmp_path / 'none.jsonl'}."),
        (str(tmp_path / "none.csv"), f"no question file {tmp_path / 'none.csv'}."),
        ("forget", "there is no forget corpus: add forget.jsonl, or pass --forget"),
    ]


def test_prompts_are_checked_as_a_method_that_reads_them_would(tmp_path: Path) -> None:
    asked = [{"question": f"{text}?", "answer": "a stone", "topic": "t"} for text in texts(5)]
    kept = [{"prompt": f"{text}?", "answer": "a stone"} for text in texts(5, seed=1)]
    found = look(tmp_path, asked, [*kept, asked[2]])
    assert [(one.name, one.rows) for one in found.forget] == [("t", 5)]
    assert about(found, "stand in the retain corpus too").rows == (3,)
    notes = [Path(one.where).stem for one in found.findings if one.what.startswith("prompts, for a method")]
    assert notes == ["forget", "retain"]
    (stop, _) = check([tmp_path / "forget.jsonl"], tmp_path / "retain.jsonl", text_field="body").stops
    assert stop.what.startswith("line 1: no field 'body'"), "a field that was named is no slip"
    broken = look(tmp_path, [*asked, {"answer": "a stone"}], kept)
    assert "no field 'text'" in about(broken, "line 1").what, "neither prompts nor texts"


def test_a_corpus_that_is_not_given_to_everybody_has_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def gated(*_: Any) -> None:
        raise ConnectionError("401 Client Error")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    found = check(["cais/wmdp-bio-forget-corpus"], None)
    assert "401 Client Error" in found.stops[0].what
    assert "numbers from a stand-in are not comparable" in found.stops[0].what
    assert "stand-in" not in check(["org/other"], None).stops[0].what


# The command


def run(*argv: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in argv])
    return int(ended.value.code or 0)


def test_the_command_exits_with_0_on_warnings_and_2_on_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = texts(5)
    look(tmp_path, rows, texts(5, seed=1))
    assert run("data", "check", tmp_path) == 0
    out = capsys.readouterr().out
    assert "warning: questions: no questions" in out
    jsonl(tmp_path / "retain.jsonl", rows)
    assert run("data", "check", tmp_path, "--json") == 2
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["meaningless"], found["findings"][0]["rows"]) == (True, [1, 2, 3, 4, 5])
    assert f"Mend {tmp_path / 'forget.jsonl'}." in captured.err
    assert SECRET not in out + captured.out + captured.err


def test_flags_stand_for_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget, retain = jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "b.txt"
    retain.write_text("\n\n".join(texts(5, seed=1)))
    assert run("data", "check", "--forget", forget, "--retain", retain, "--json") == 0
    assert json.loads(capsys.readouterr().out)["retain"]["rows"] == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "check"], "no data is named."),
        (["data", "check", "nowhere"], "no folder nowhere."),
        (["data", "chek", "x"], "there is no 'lethe data chek'. Did you mean 'check'?"),
        (["data", "rank", "--forget", "a.jsonl"], "ranking compares two sides."),
        (["data", "rank", "--top", "0"], "'top' must be at least 1. Got 0."),
        (["data", "rank", "--out", "nowhere/a.csv"], "nowhere/a.csv cannot be written: there is no folder nowhere."),
    ],
)
def test_wrong_arguments_are_answered(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_help_lists_both_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data") == 0
    assert {"check", "rank"} <= set(capsys.readouterr().out.split())
