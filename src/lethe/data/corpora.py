"""Forget and retain corpora: files and datasets become texts, token rows, batches, and the order a run uses them in.

No message of this module quotes a text: it names the file and the line, the paragraph or the row.
"""

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from lethe.data.text_files import TABLES, counted, decoded, did_you_mean, field_names, table_rows
from lethe.errors import CorpusError

Row = TypeVar("Row")


FILE_SUFFIXES = (*TABLES, ".txt")
"""A missing path that ends in one of these is a missing file, not the name of a hub dataset."""


KINDS = "a .jsonl, .json, .csv, .parquet or .txt file, a dataset folder, or a hub dataset as name:config:split"


PARSED = "bio-forget-corpus"
"""Part of the name of the one corpus whose JSON the published RMU code parses; of others it trains on the raw lines."""


STAND_INS: Mapping[str, str] = {
    "bio-forget-corpus": (
        "WMDP's biology forget corpus is given on request only. Its cyber forget corpus is public and can stand in, "
        "as can any .jsonl of yours; numbers from a stand-in are not comparable with published ones."
    ),
}
"""By a part of its name, what may take the place of a hub dataset that is not given to everybody."""


def read_texts(source: str | Path, *, text_field: str = "text", raw_lines: bool = False) -> list[str]:
    """The texts of a corpus, in its order, blank ones left out.

    `.jsonl`, `.json` (an array, or one object a line), `.csv` and `.parquet` give `text_field` of every row. `.txt`
    gives its paragraphs, the blocks between blank lines, as they stand. A folder that `datasets` can read, or a hub
    dataset as `name:config:split`, gives its column `text_field`. `raw_lines` takes the line of a `.jsonl`
    itself as the text, line end included: the published RMU code trains on quotes, escapes and key names of
    every corpus but its biology one (PARSED). (That code keeps whitespace-only rows as well; Lethe never does.)
    Raises: CorpusError.
    """
    path = Path(source).expanduser()
    if path.is_file():
        texts = list(_file_texts(path, text_field, raw_lines))
    else:
        texts = list(_dataset_texts(source, text_field))
    kept = [text for text in texts if text.strip()]
    if not kept:
        found = f"all {counted(len(texts), 'row')} blank" if texts else "no rows"
        raise CorpusError(f"{source}: {found}.\nGive a corpus with at least one text.")
    return kept


def check_overlap(forget: Mapping[str, list[str]], retain: list[str], *, allow: bool) -> None:
    """Refuse forget texts that also stand in the retain corpus, whitespace aside.

    Raises: CorpusError with their count and row numbers, unless `allow`; rows count from 1, blank ones left out.
    """
    if allow:
        return
    kept = {" ".join(text.split()) for text in retain}
    shared = {
        name: [row for row, text in enumerate(texts, start=1) if " ".join(text.split()) in kept]
        for name, texts in forget.items()
    }
    total = sum(map(len, shared.values()))
    if total:
        places = "; ".join(f"{name!r} rows {_first(rows)}" for name, rows in shared.items() if rows)
        raise CorpusError(
            f"{counted(total, 'forget text')} found in the retain corpus too: {places}.\n"
            "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap."
        )


def in_turn(topics: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of all topics in turn, so that the first ones are fair to each."""
    longest = max(map(len, topics), default=0)
    return [topic[i] for i in range(longest) for topic in topics if i < len(topic)]


def _first(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)


def _file_texts(path: Path, text_field: str, raw_lines: bool) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        lines = decoded(path, CorpusError).replace("\r\n", "\n").split("\n")
        for has_text, block in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if has_text:
                yield "\n".join(block)
    elif suffix == ".jsonl" and raw_lines and PARSED not in str(path):
        yield from io.StringIO(decoded(path, CorpusError).replace("\r\n", "\n"))
    elif suffix in TABLES:
        yield from (text for _, _, text in text_rows(path, text_field))
    else:
        raise CorpusError(f"{path}: no corpus is read from {suffix or 'a file without suffix'}.\nGive {KINDS}.")


def text_rows(path: Path, text_field: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each row of a file of one of the formats TABLES: its place, the row itself and its text, which may be blank.

    Raises: CorpusError.
    """
    for where, row in table_rows(path, CorpusError):
        yield where, row, _text(where, row, text_field)


def _text(where: str, row: Any, text_field: str) -> str:
    if not isinstance(row, dict):
        raise CorpusError(
            f"{where}: {type(row).__name__} found, where an object with a field {text_field!r} must stand."
        )
    if text_field not in row:
        raise CorpusError(
            f"{where}: no field {text_field!r}; {field_names(row, 'fields')}.\n"
            "Pass --text-field with the one that holds the text."
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise CorpusError(
            f"{where}: field {text_field!r} holds {type(text).__name__}, not a text.\n"
            "Make it a string, or pass --text-field with another field."
        )
    return text


def _dataset_texts(source: str | Path, text_field: str) -> Iterator[str]:
    is_folder = Path(source).expanduser().is_dir()
    name, config, split = ([str(source), "", ""] if is_folder else [*str(source).split(":"), "", ""])[:3]
    folder = Path(name).expanduser()
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and folder.suffix not in FILE_SUFFIXES
    if not folder.is_dir() and (not is_id or (folder.parent != Path() and folder.parent.is_dir())):
        raise CorpusError(_missing(folder))
    found = _open_dataset(name, folder, config)
    if isinstance(found, dict):
        if split not in found and (split or len(found) != 1):
            splits = list(found)
            raise CorpusError(f"{name} has the splits {', '.join(splits)}.\nName one, as {name}:{config}:{splits[0]}")
        found = found[split or next(iter(found))]
    for number, row in enumerate(found, start=1):
        yield _text(f"{source}, row {number}", row, text_field)


def _open_dataset(name: str, folder: Path, config: str) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CorpusError(
            f'{name}: dataset folders and hub datasets need one more package: pip install "lethe-unlearn[eval]"'
        ) from None
    try:
        if not folder.is_dir():
            return datasets.load_dataset(name, config or None)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(folder))
        with TemporaryDirectory() as cache:  # No copy of a forget corpus stays behind in the user's cache.
            return datasets.load_dataset(str(folder), config or None, cache_dir=cache, keep_in_memory=True)
    except (OSError, ValueError, DatasetsError) as error:
        kind, reason = type(error).__name__, (str(error).splitlines() or [""])[0]
        if folder.is_dir():  # The reason is left out: it may quote rows.
            raise CorpusError(
                f"{name} is no dataset folder ({kind}).\n"
                "It must come from save_to_disk, or hold parquet, jsonl or csv files with equal columns."
            ) from None
        raise CorpusError(
            f"{name} is neither a file or folder here nor a dataset that the hub gives ({kind}: {reason[:200]})"
            f"{did_you_mean(folder)}\n"
            f"Give {KINDS}."
        ) from None


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no corpus {path}: there is no folder {path.parent}.\nGive {KINDS}."
    return f"no corpus {path}{did_you_mean(path)}\nGive {KINDS}."
