import os
from pathlib import Path

import pytest

from lethe.errors import RunFolderError
from lethe.system.locked_folder import LOCK, locked


def test_a_lock_that_its_holder_removed_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object) -> None:
        os.unlink(tmp_path / "a" / LOCK)

    monkeypatch.setattr("fcntl.flock", ended)
    with pytest.raises(RunFolderError, match="another process is writing to"), locked(tmp_path / "a", "writing to"):
        pass


def test_what_was_put_in_stays_and_an_empty_folder_goes(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        with locked(tmp_path / name, "writing to"):
            if name == "full":
                (tmp_path / name / "file").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/file"]
