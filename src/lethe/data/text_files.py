"""Files as corpora and questions are read from them: decoded, cut into the rows of a table, missed by a letter.

No message of this module quotes a file's content: it names the file and the line or row.
"""

import csv
import difflib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lethe.errors import UsageError

TABLES = (".json", ".jsonl", ".csv", ".parquet")
"""Suffixes of files whose rows have named columns."""


TABLE = "a .jsonl, .json, .csv or .parquet file"


LONGEST_CELL = 10_000_000
"""Characters of a CSV cell that are still read; a quote never closed makes one cell of the rest of the file."""


def decoded(path: Path, failure: type[UsageError]) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises: `failure` if the file cannot be read or a byte is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}.") from None
    without_bom = content.removeprefix(b"\xef\xbb\xbf")
    try:
        return without_bom.decode("utf-8")
    except UnicodeDecodeError as error:
        line = without_bom.count(b"\n", 0, error.start) + 1
        byte = len(content) - len(without_bom) + error.start
        raise failure(f"{path}, line {line}: byte {byte} is not UTF-8.\nSave the file as UTF-8.") from None


def table_rows(
    path: Path, failure: type[UsageError], columns: Callable[[Sequence[str]], Sequence[str] | None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Each row of a file with one of the suffixes TABLES, with its place in the file; most rows are dicts by column.

    Of a `.csv` whose first row is no header, `columns` gives their names for that row; None for a header.
    Raises: `failure` if the file cannot be read as what its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(path, failure)
    content = decoded(path, failure)
    return csv_rows(path, content, failure, columns) if suffix == ".csv" else json_rows(path, content, failure)


def csv_rows(
    path: Path,
    content: str,
    failure: type[UsageError],
    columns: Callable[[Sequence[str]], Sequence[str] | None] | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV file with its place in the file, as `table_rows` says; a header is not counted.

    Raises: `failure` if it is not CSV, or a row has other cells than the first one.
    """
    csv.field_size_limit(LONGEST_CELL)
    reader = (row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row)
    number = 0
    try:
        first = next(reader, [])
        unnamed = columns(first) if columns is not None and first else None
        for number, cells in enumerate(itertools.chain([first], reader) if unnamed else reader, start=1):
            where = f"{path}, row {number}"
            if len(cells) != len(first):
                raise failure(
                    f"{where}: {counted(len(cells), 'cell')}, where the first row has {len(first)}.\n"
                    "Put cells with commas in quotes."
                )
            yield where, dict(zip(unnamed or first, cells, strict=True))
    except csv.Error as error:
        raise failure(f"{path}, row {number + 1}: not CSV ({error}).\nWrite the file again.") from None


def json_rows(path: Path, content: str, failure: type[UsageError]) -> Iterator[tuple[str, Any]]:
    """Each row with its place in the file: the items of a `.json` file's array, or one value a line.

    Raises: `failure` if a line is not JSON.
    """
    is_array = path.suffix.lower() == ".json" and content.lstrip().startswith("[")
    for number, line in enumerate([content] if is_array else content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            line_number = error.lineno if is_array else number
            raise failure(
                f"{path}, line {line_number}, column {error.colno}: not JSON ({error.msg}).\n"
                f"{'The file' if is_array else 'Each line'} must be {'one array' if is_array else 'one object'}."
            ) from None
        except (ValueError, RecursionError):
            where = path if is_array else f"{path}, line {number}"
            raise failure(
                f"{where}: JSON that cannot be read: a number of thousands of digits, or brackets nested as deep.\n"
                "Write the row anew."
            ) from None
        rows = enumerate(found, start=1) if is_array else [(number, found)]
        for place, value in rows:
            where = f"{path}, {'row' if is_array else 'line'} {place}"
            if "\\u" in line and not _is_unicode(value):
                raise failure(f"{where} holds half a surrogate pair (\\ud800 to \\udfff).\nRemove it.")
            yield where, value


def _is_unicode(value: Any) -> bool:
    """Whether a tokenizer can read every string in it: JSON can spell half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parquet_rows(path: Path, failure: type[UsageError]) -> Iterator[tuple[str, Any]]:
    """Each row of a parquet file with its place.

    Raises: `failure` without pyarrow, or for a file that is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise failure(f'{path}: parquet files need one more package: pip install "lethe-unlearn[eval]"') from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):
        raise failure(f"{path} is no parquet file, or a damaged one.\nFetch it again.") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def field_names(names: Iterable[str], noun: str) -> str:
    """`there is a, b`; only the number of names where one of them looks like text."""
    names = list(names)
    if all(re.fullmatch(r"[\w.-]{1,40}", name) for name in names):
        return f"there is {', '.join(names) or 'none'}"
    return f"there are {len(names)} {noun}, not all with plain names (is the header missing?)"


def did_you_mean(path: Path) -> str:
    """`: did you mean NAME?` after a path that does not exist; a full stop if nothing near it has such a name."""
    missed = path.parent.is_dir() and not path.exists()
    there = [other.name for other in path.parent.iterdir()] if missed else []
    near = difflib.get_close_matches(path.name, there, n=1)
    return f": did you mean {near[0]}?" if near else "."


def counted(n: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('h') else 's'}"
