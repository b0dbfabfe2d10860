"""Forget and retain corpora: files and datasets become texts, token rows, batches, and the order a run uses them in.

No message of this module quotes a text: it names the file and the line, the paragraph or the row.
"""

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from lethe.textfiles import decoded, did_you_mean, field_names, json_rows
from lethe.types import Batch, CorpusError, EmptyBatchError, InvalidValueError, Topic

Counted = Literal["no-bos", "real-tokens", "all-tokens"]
"""Which tokens count: all but BOS and padding, all but padding, or all, padding included (the published code)."""

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
"""A missing path that ends in one of these is a missing file, not the name of a hub dataset."""

KINDS = "a .jsonl, .json or .txt file, a dataset folder, or a hub dataset as name:config:split"


def read_texts(source: str | Path, *, text_field: str = "text", raw_lines: bool = False) -> list[str]:
    """The texts of a corpus, in its order, blank ones left out.

    `.jsonl` and `.json` (an array, or one object a line) give `text_field` of every object. `.txt` gives its
    paragraphs, the blocks between blank lines, as they stand. A folder that `datasets` can read, or a hub
    dataset as `name:config:split`, gives its column `text_field`. `raw_lines` takes the line of a `.jsonl`
    itself as the text, line end included: the published RMU code trains on quotes, escapes and key names of
    every corpus but its biology one. (That code keeps whitespace-only rows as well; Lethe never does.)
    Raises: CorpusError.
    """
    path = Path(source).expanduser()
    if path.is_file():
        texts = list(_file_texts(path, text_field, raw_lines))
    else:
        texts = list(_dataset_texts(source, text_field))
    kept = [text for text in texts if text.strip()]
    if not kept:
        found = f"all {_counted(len(texts), 'row')} blank" if texts else "no rows"
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
            f"{_counted(total, 'forget text')} found in the retain corpus too: {places}.\n"
            "They would be forgotten and kept at once: remove them from one side, or pass --allow-overlap."
        )


def encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chunk: bool = False,
    limit: int | None = None,
) -> list[list[int]]:
    """Token ids of each text with the tokenizer's own BOS and EOS, cut at the right to `max_length` tokens.

    `chunk` cuts a long text into consecutive rows instead of dropping its tail; each row gets BOS and EOS of
    its own. Texts that the tokenizer turns into nothing give no row. `limit` stops after that many rows.
    Raises: InvalidValueError if `max_length` leaves no room beside BOS and EOS.
    """
    rows: list[list[int]] = []
    # A few texts at a time: whole corpora of long texts need gigabytes inside the tokenizer before they are cut.
    for start in range(0, len(texts), 64):
        if limit is not None and len(rows) >= limit:
            break
        encoded = tokenizer(list(texts[start : start + 64]), return_special_tokens_mask=True, verbose=False)
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            rows += _cut(ids, special, max_length, chunk)
    return rows[:limit]


def batches(
    rows: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    count: Counted,
    padding_side: Literal["left", "right"],
    name: str = "corpus",
) -> tuple[Batch, ...]:
    """Consecutive rows as batches, each padded to its own longest row; a last incomplete batch is dropped.

    Masks come from the lengths of the rows, so it does not matter that the padding id (EOS, as published)
    is a real token elsewhere; BOS is a row's first token, and only there.
    Raises: EmptyBatchError, naming the corpus `name`, if no token of a batch counts.
    """
    padding = next((i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if isinstance(i, int)), 0)
    found = []
    for start in range(0, len(rows) - batch_size + 1, batch_size):
        of_batch = rows[start : start + batch_size]
        width = max(map(len, of_batch))
        ids = torch.full((batch_size, width), padding)
        real = torch.zeros(batch_size, width, dtype=torch.bool)
        mask = torch.full((batch_size, width), count == "all-tokens")
        for i, row in enumerate(of_batch):
            first = width - len(row) if padding_side == "left" else 0
            begins_with_bos = row[:1] == [tokenizer.bos_token_id]
            ids[i, first : first + len(row)] = torch.tensor(row)
            real[i, first : first + len(row)] = True
            mask[i, first + (count == "no-bos" and begins_with_bos) : first + len(row)] = True
        if not mask.any():
            raise EmptyBatchError(
                f"{name}: no token counts in batch {start // batch_size + 1}; its {batch_size} rows hold BOS alone.\n"
                "Remove the texts that this tokenizer turns into nothing."
            )
        found.append(Batch(input_ids=ids, attention_mask=real, mask=mask))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every step of a run trains on; a batch that comes again is the same object, so it is recorded once."""

    topics: tuple[Topic, ...]
    """Each with one batch for each of its steps."""
    retain: tuple[Batch, ...]
    """One batch for each step."""
    steps: int

    def at(self, step: int) -> tuple[Topic, Batch, Batch]:
        """Topic, forget batch and retain batch of a step, counted from 0: topics take turns."""
        topic = self.topics[step % len(self.topics)]
        return topic, topic.batches[step // len(self.topics)], self.retain[step]


def schedule(
    forget: Mapping[str, list[str]],
    retain: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    accumulate: int = 1,
    batch_size: int,
    epochs: int,
    max_lengths: Sequence[int],
    chunk: bool,
    count: Counted,
    padding_side: Literal["left", "right"],
    shuffle: bool,
    rng: torch.Generator,
) -> Schedule:
    """Cut the corpora into the batches that training needs; `forget` has the texts of each topic by name.

    `steps` are the optimizer's; each takes `accumulate` steps of the schedule. `max_lengths` has one entry for each
    topic and a last one for the retain corpus. A corpus with too few batches starts again from its first one, up to
    `epochs` times. With `shuffle` each corpus has an order of its own, and every step a retain batch of its own;
    without (published code) the corpora's order is kept, and one retain batch serves one step of each topic in turn.
    Raises: CorpusError if a corpus has too few rows; EmptyBatchError; InvalidValueError.
    """
    counts = {"topics": len(forget), "steps": steps, "accumulate": accumulate, "batch_size": batch_size}
    for flag, value in {**counts, "epochs": epochs}.items():
        if value < 1:
            raise InvalidValueError(f"{flag!r} must be at least 1. Got {value}.")
    if len(max_lengths) != len(forget) + 1:
        raise InvalidValueError(
            f"'max_lengths' must have {len(forget) + 1} entries, one for each topic and one for the retain corpus. "
            f"Got {len(max_lengths)}."
        )

    def of_corpus(name: str, texts: list[str], max_length: int, steps_a_batch: int) -> tuple[Batch, ...]:
        """As many batches as the steps need, repeated where the corpus is too short."""
        needed = math.ceil(steps * accumulate / steps_a_batch)
        limit = needed * batch_size
        if chunk:  # A text gives several rows, so the order is drawn after cutting.
            rows = _ordered(encode(texts, tokenizer, max_length=max_length, chunk=True), shuffle, rng)[:limit]
        else:
            rows = encode(_ordered(texts, shuffle, rng), tokenizer, max_length=max_length, limit=limit)
        if len(rows) < batch_size:
            raise CorpusError(
                f"{name} gives {_counted(len(rows), 'row')}, fewer than one batch of {batch_size}.\n"
                f"Add texts, or lower --batch-size."
            )
        found = batches(rows, tokenizer, batch_size=batch_size, count=count, padding_side=padding_side, name=name)
        if len(found) * epochs < needed:
            repeated = f", {len(found) * epochs} in {epochs} epochs" if epochs > 1 else ""
            accumulated = f" of {accumulate} batches" if accumulate > 1 else ""
            most = len(found) * epochs * steps_a_batch // accumulate
            raise CorpusError(
                f"{name} gives {_counted(len(found), 'batch')} of {batch_size} "
                f"({_counted(len(rows), 'row')}){repeated}; "
                f"{_counted(steps, 'step')}{accumulated} over {_counted(len(forget), 'topic')} need {needed}.\n"
                f"Lower {f'--steps to {most}' if most else '--accumulate'}, "
                f"or pass --epochs {math.ceil(needed / len(found))} to repeat it."
            )
        return tuple(itertools.islice(itertools.cycle(found), needed))

    topics = tuple(
        Topic(name=name, batches=of_corpus(f"forget corpus {name!r}", texts, max_length, len(forget)))
        for (name, texts), max_length in zip(forget.items(), max_lengths, strict=False)
    )
    steps_a_batch = 1 if shuffle else len(forget)
    kept = of_corpus("retain corpus", retain, max_lengths[-1], steps_a_batch)
    turns = steps * accumulate
    return Schedule(topics=topics, retain=tuple(kept[step // steps_a_batch] for step in range(turns)), steps=turns)


def _ordered(items: list[Any], shuffle: bool, rng: torch.Generator) -> list[Any]:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()] if shuffle else items


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('h') else 's'}"


def _first(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)


def _cut(ids: list[int], special: list[int], max_length: int, chunk: bool) -> list[list[int]]:
    """Rows of at most `max_length` ids; `special` marks what the tokenizer put around the text."""
    before = sum(1 for _ in itertools.takewhile(bool, special))
    after = sum(1 for _ in itertools.takewhile(bool, reversed(special[before:])))
    room = max_length - before - after
    if room < 1:
        raise InvalidValueError(
            f"'max_length' must be at least {before + after + 1}: the tokenizer adds {before + after} to each row. "
            f"Got {max_length}."
        )
    prefix, body, suffix = ids[:before], ids[before : len(ids) - after], ids[len(ids) - after :]
    starts = range(0, len(body) if chunk else min(len(body), 1), room)
    return [prefix + body[start : start + room] + suffix for start in starts]


def _file_texts(path: Path, text_field: str, raw_lines: bool) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt"):
        raise CorpusError(f"{path}: no corpus is read from {suffix or 'a file without suffix'}.\nGive {KINDS}.")
    content = decoded(path, CorpusError).replace("\r\n", "\n")
    if not content.strip():
        raise CorpusError(f"{path} is empty.\nGive a corpus with at least one text.")
    if suffix == ".txt":
        for has_text, lines in itertools.groupby(content.split("\n"), key=lambda line: bool(line.strip())):
            if has_text:
                yield "\n".join(lines)
    elif suffix == ".jsonl" and raw_lines:
        yield from io.StringIO(content)
    else:
        for where, row in json_rows(path, content, CorpusError):
            yield _text(where, row, text_field)


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
