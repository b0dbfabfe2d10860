"""What is kept between calls is found again, and only where nothing that it depends on has changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lethe.errors import ModelError, SaveError
from lethe.evaluation import score_cache
from lethe.evaluation.score_cache import ScoreCache, default_folder

KEY = {"task": "exam", "shots": 5, "names": ("a", "b")}


def never() -> Any:
    raise AssertionError("measured again")


@pytest.fixture
def cache(tmp_path: Path) -> Callable[[], ScoreCache]:
    """Opens the same folder again, as another call of the command would."""
    return lambda: ScoreCache(tmp_path / "kept", pytest.fail)


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").glob("*/*.json"))


def test_what_was_found_once_is_read_again(cache: Callable[[], ScoreCache], tmp_path: Path) -> None:
    value = {"a": [1.5, float("inf")], "none": None}
    assert cache().once(KEY, lambda: value) == value
    again = cache()
    assert again.once(KEY, never) == value
    assert again.reused == 1
    assert again.once({**KEY, "shots": 0}, lambda: 2) == 2
    assert again.reused == 1
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"\xff\xff", b"[]", b"null", b'{"key": {}, "value": 1}', b'{"value": 1}'],
    ids=["empty", "cut", "bytes", "list", "null", "other key", "no key"],
)
def test_a_damaged_entry_is_found_anew(damaged: bytes, cache: Callable[[], ScoreCache], tmp_path: Path) -> None:
    cache().once(KEY, lambda: 1.0)
    (entry,) = entries(tmp_path)
    entry.write_bytes(damaged)
    assert cache().once(KEY, lambda: 2.0) == 2.0
    assert cache().once(KEY, never) == 2.0


def test_another_version_measures_again(cache: Callable[[], ScoreCache], monkeypatch: pytest.MonkeyPatch) -> None:
    cache().once(KEY, lambda: 1.0)
    monkeypatch.setattr(score_cache, "_software", lambda: {"lethe": "9"})
    assert cache().once(KEY, lambda: 2.0) == 2.0


def test_the_source_counts_as_version() -> None:
    version, _, source = score_cache._software()["lethe"].partition(" ")
    assert version == score_cache.__version__
    assert len(source) == 16


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    cache = ScoreCache(None, pytest.fail)
    assert [cache.once(KEY, lambda: 1), cache.once(KEY, lambda: 2)] == [1, 2]
    assert cache.files_hash([tmp_path / "absent"]) == ""


def test_a_failed_measurement_leaves_no_entry(cache: Callable[[], ScoreCache], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="measured again"):
        cache().once(KEY, never)
    assert entries(tmp_path) == []


def test_a_full_disk_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    cache = ScoreCache(tmp_path / "kept", warned.append)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    assert cache.once(KEY, lambda: 1.0) == 1.0
    assert len(warned) == 1
    assert warned[0].startswith(f"the cache keeps nothing: {tmp_path / 'kept'}/")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_processes_may_keep_the_same_entry_at_one_moment(
    cache: Callable[[], ScoreCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def another_comes_between(number: int) -> None:
        calls.append(number)
        if len(calls) == 1:
            cache().once(KEY, lambda: [1.5])
        sync(number)

    monkeypatch.setattr(os, "fsync", another_comes_between)
    assert cache().once(KEY, lambda: [1.5]) == [1.5]
    assert len(calls) == 2
    assert cache().once(KEY, never) == [1.5]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == entries(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        ScoreCache(tmp_path / "file" / "kept", pytest.fail)


def old_file(path: Path, text: str) -> Path:
    path.write_text(text)
    os.utime(path, (1, 1))
    return path


def test_a_file_is_read_once_until_it_changes(
    cache: Callable[[], ScoreCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    content_hash = score_cache._content_hash
    monkeypatch.setattr(score_cache, "_content_hash", lambda path: read.append(path.name) or content_hash(path))
    monkeypatch.setattr(score_cache, "SETTLED_NS", 0)
    file = old_file(tmp_path / "weights", "one")
    first = cache().files_hash([file])
    assert cache().files_hash([file]) == first
    assert read == ["weights"]
    # Same size, and the time of change put back: only the system's own time tells.
    old_file(file, "two")
    assert cache().files_hash([file]) != first
    assert old_file(file, "one")
    assert cache().files_hash([file]) == first
    (tmp_path / "kept" / "hashes.json").write_text("{")
    assert cache().files_hash([file]) == first


def test_the_hash_of_a_file_that_just_changed_is_not_kept(cache: Callable[[], ScoreCache], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_text("one")
    cache().files_hash([file])
    assert not (tmp_path / "kept" / "hashes.json").exists()


def test_a_file_that_cannot_be_read_is_named(cache: Callable[[], ScoreCache], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent cannot be read: No such file or directory\.$"):
        cache().files_hash([tmp_path / "absent"])


def test_a_model_is_its_weights_settings_and_tokenizer(
    cache: Callable[[], ScoreCache], foreign_model: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(foreign_model, tmp_path / "copy"))
    first = cache().model_hash(foreign_model)
    assert cache().model_hash(copy) == first
    (copy / "README.md").write_text("no part of it")
    assert cache().model_hash(copy) == first
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "x"}))
    assert cache().model_hash(copy) != first


@pytest.mark.parametrize(("named", "expected"), [("/x", "/x"), ("x", "~/.cache"), ("", "~/.cache")])
def test_the_default_folder_follows_xdg(named: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert default_folder() == Path(expected).expanduser() / "lethe" / "scores"
