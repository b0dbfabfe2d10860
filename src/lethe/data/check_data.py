"""Whether a run on some data would mean anything: counts, rows that are no text, duplicates, overlaps.

No finding quotes a row: it names the file and the rows by number.
"""

import json
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lethe.data import data_folder
from lethe.data.corpora import STAND_INS
from lethe.data.data_folder import Row
from lethe.data.near_duplicates import GRAM, NEAR, Grams, Index, Words, contained, near_duplicates, union
from lethe.errors import CorpusError, UsageError
from lethe.types import Question

FEWEST = 4
"""Rows of one batch with the published settings."""


OVERLAP = 0.1
"""Share of forget rows that may resemble a retain row before a run would mean nothing."""


CONTAINED = 0.8
"""Share of a question's 5-grams in one corpus from which it counts as copied from there."""


BROKEN = 0.5
"""Share of rows that are no text before a run would mean nothing."""


CONTROL = 0.01
"""Share of control and replacement characters from which a row is no text."""


HUGE = 1_000_000
"""Characters from which a row is likely to be a whole file."""


TEXT_FIELD = "text"
"""Field of a row that holds its text, unless another is named."""


SHORT = 10
"""Characters below which one character may fill half of a row."""


Level = Literal["stop", "warning", "note"]


Side = Literal["forget", "retain"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about the data that its user should know."""

    level: Level
    """`stop`: a run would fail or mean nothing."""
    where: str
    """The file or set."""
    what: str
    rows: tuple[int, ...] = ()
    """All rows that it is about: lines of a `.jsonl` file, else rows from 1."""


@dataclass(frozen=True, kw_only=True)
class TopicFacts:
    """One topic, or the retain corpus."""

    name: str
    rows: int
    characters: int
    shortest: int
    median: float
    longest: int
    """Lengths of rows in characters."""
    tokens: int | None
    """Without BOS and EOS; None without a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What was found out about some data."""

    forget: tuple[TopicFacts, ...]
    retain: TopicFacts | None
    questions: dict[str, int]
    """Number by set."""
    findings: tuple[Finding, ...]
    """Stops first."""

    @property
    def stops(self) -> tuple[Finding, ...]:
        """Why a run would fail or mean nothing; empty if it would not."""
        return tuple(found for found in self.findings if found.level == "stop")


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    side: Side
    source: str
    rows: tuple[Row, ...]
    grams: list[Grams] = field(repr=False)


def check(
    forget: Sequence[str | Path],
    retain: str | Path | None,
    questions: Sequence[Path] = (),
    *,
    text_field: str = TEXT_FIELD,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DataCheck:
    """Read everything and look for what would spoil a run; what cannot be read is a finding, too."""
    findings: list[Finding] = []
    words = Words()
    corpora: list[_Corpus] = []
    named: list[tuple[Side, str | Path]] = [("forget", source) for source in forget]
    if retain is not None:
        named.append(("retain", retain))
    for side, source in named:
        source = str(source)
        with _noting(source, findings):
            rows, asks = _rows(source, text_field)
            corpora.append(_Corpus(side=side, source=source, rows=rows, grams=[words.grams(row.text) for row in rows]))
            if asks:
                what = "prompts, for a method that reads prompts (lunar); a method that reads texts would refuse them"
                findings.append(Finding(level="note", where=source, what=what))
            elif blank := data_folder.blank_rows(source, text_field):
                findings.append(Finding(level="warning", where=source, what="blank, left out of every run", rows=blank))
    asked = _questions(questions, findings)
    for side in ("forget", "retain"):
        if side not in dict(named):
            what = f"there is no {side} corpus: add {side}.jsonl, or pass --{side}"
            findings.append(Finding(level="stop", where=side, what=what))
    for corpus in corpora:
        findings += _about_rows(corpus)
        findings += _duplicates(corpus)
    findings += _overlap(
        [corpus for corpus in corpora if corpus.side == "forget"],
        [corpus for corpus in corpora if corpus.side == "retain"],
    )
    findings += _about_questions(asked, corpora, words)
    topics: defaultdict[str, list[str]] = defaultdict(list)
    for corpus in corpora:
        for row in corpus.rows if corpus.side == "forget" else ():
            topics[row.topic or Path(corpus.source).stem].append(row.text)
    kept = [row.text for corpus in corpora if corpus.side == "retain" for row in corpus.rows]
    for name, texts in {**topics, **({"retain": kept} if kept else {})}.items():
        if len(texts) < FEWEST:
            what = f"{len(texts)} rows, fewer than one batch of {FEWEST}: add texts, or lower --batch-size"
            findings.append(Finding(level="warning", where=name, what=what))
    return DataCheck(
        forget=tuple(_facts(name, texts, tokenizer) for name, texts in topics.items()),
        retain=_facts("retain", kept, tokenizer) if kept else None,
        questions={name: len(found) for name, found in asked.items()},
        findings=tuple(sorted(findings, key=lambda found: ("stop", "warning", "note").index(found.level))),
    )


def _rows(source: str, text_field: str) -> tuple[tuple[Row, ...], bool]:
    """The rows of a corpus, and whether they are prompts, which some methods read in place of texts.

    Raises: CorpusError.
    """
    try:
        return data_folder.read_rows(source, text_field), False
    except CorpusError:
        path = Path(source).expanduser()
        # Who names a field has texts; with the wrong one it must not pass for anything else.
        if text_field == TEXT_FIELD and data_folder.is_table(path):
            with suppress(UsageError):
                return data_folder.read_prompt_rows(path), True
        raise


def _facts(name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> TopicFacts:
    lengths = [len(text) for text in texts]
    tokens = None
    if tokenizer is not None:
        tokens = 0
        for start in range(0, len(texts), 64):
            some = list(texts[start : start + 64])
            tokens += sum(map(len, tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]))
    return TopicFacts(
        name=name,
        rows=len(texts),
        characters=sum(lengths),
        shortest=min(lengths),
        median=float(statistics.median(lengths)),
        longest=max(lengths),
        tokens=tokens,
    )


def _about_rows(corpus: _Corpus) -> Iterable[Finding]:
    """Rows that are no running text, by what they are instead."""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for row in corpus.rows:
        if kind := _no_text(row.text):
            kinds[kind].append(row.number)
    share = sum(map(len, kinds.values())) / len(corpus.rows)
    level: Level = "stop" if share > BROKEN else "warning"
    for kind, rows in kinds.items():
        yield Finding(level=level, where=corpus.source, what=kind, rows=tuple(rows))
    huge = tuple(row.number for row in corpus.rows if len(row.text) > HUGE)
    if huge:
        what = f"longer than {HUGE} characters: is it a whole file? What does not fit a row of tokens is cut off"
        yield Finding(level="warning", where=corpus.source, what=what, rows=huge)


def _no_text(text: str) -> str:
    """What a row is instead of running text; empty if it is text."""
    counts = Counter(text)
    visible = {letter: count for letter, count in counts.items() if not letter.isspace()}
    odd = sum(
        count for letter, count in visible.items() if letter == "\ufffd" or unicodedata.category(letter) in ("Cc", "Co")
    )
    if odd > CONTROL * len(text):
        return "control characters: binary data, or a wrong encoding"
    if not any(map(str.isalpha, visible)):
        return "no letters: numbers or signs alone"
    if len(text) >= SHORT and max(visible.values()) > sum(visible.values()) / 2:
        return "mostly one character"
    if text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return ""
        return "JSON inside the text: name the inner field by --text-field, or unpack it"
    return ""


def _duplicates(corpus: _Corpus) -> Iterable[Finding]:
    """Rows that stand there before, word for word or nearly."""
    first: dict[str, int] = {}
    exact = []
    for place, row in enumerate(corpus.rows):
        if first.setdefault(" ".join(row.text.split()), place) != place:
            exact.append(place)
    again = set(exact)
    once = [place for place in range(len(corpus.rows)) if place not in again]
    near = [once[later] for later, _ in near_duplicates([corpus.grams[place] for place in once])]
    for places, what in (
        (exact, "the same text as an earlier row"),
        (near, f"near-duplicates of an earlier row (Jaccard similarity of {GRAM}-grams of {NEAR} or more)"),
    ):
        if places:
            rows = tuple(corpus.rows[place].number for place in places)
            yield Finding(level="warning", where=corpus.source, what=what, rows=rows)


def _overlap(forget: Sequence[_Corpus], retain: Sequence[_Corpus]) -> Iterable[Finding]:
    """Forget rows that should be kept as well."""
    kept = {" ".join(row.text.split()) for corpus in retain for row in corpus.rows}
    if not kept:
        return
    universe = [grams for corpus in (*forget, *retain) for grams in corpus.grams]
    index = Index(universe)
    for corpus in retain:
        for place, grams in enumerate(corpus.grams):
            index.add(place, grams)
    total = sum(len(corpus.rows) for corpus in forget)
    near: dict[str, tuple[int, ...]] = {}
    for corpus in forget:
        same = {place for place, row in enumerate(corpus.rows) if " ".join(row.text.split()) in kept}
        if same:
            numbers = tuple(corpus.rows[place].number for place in sorted(same))
            what = "forget rows that stand in the retain corpus too: remove them from one side"
            yield Finding(level="stop", where=corpus.source, what=what, rows=numbers)
        near[corpus.source] = tuple(
            row.number
            for place, (row, grams) in enumerate(zip(corpus.rows, corpus.grams, strict=True))
            if place not in same and next(index.like(grams), None) is not None
        )
    level: Level = "stop" if sum(map(len, near.values())) > OVERLAP * total else "warning"
    for source, numbers in near.items():
        if numbers:
            what = "forget rows that nearly stand in the retain corpus: they would be forgotten and kept at once"
            yield Finding(level=level, where=source, what=what, rows=numbers)


def _questions(files: Sequence[Path], findings: list[Finding]) -> dict[str, tuple[Question, ...]]:
    """All questions by set; a file that cannot be read is a finding."""
    found: defaultdict[str, tuple[Question, ...]] = defaultdict(tuple)
    for path in files:
        with _noting(str(path), findings):
            for name, some in data_folder.questions_by_set(path).items():
                found[name] += some
    return found


@contextmanager
def _noting(where: str, findings: list[Finding]) -> Iterator[None]:
    """Turn what stops the reading of a file into a finding."""
    try:
        yield
    except UsageError as error:
        # The place is named already.
        what = str(error).removeprefix(where).lstrip(",: ")
        missed = not Path(where).suffix
        hints = "".join(f"\n{hint}" for name, hint in STAND_INS.items() if missed and name in where)
        findings.append(Finding(level="stop", where=where, what=what + hints))


def _about_questions(
    asked: Mapping[str, Sequence[Question]], corpora: Sequence[_Corpus], words: Words
) -> Iterable[Finding]:
    """Questions in two sets or copied from a corpus, and forget questions that the forget corpus does not answer."""
    if not asked.get("forget"):
        what = "no questions on what should be forgotten: nothing will say whether it was"
        yield Finding(level="warning", where="questions", what=what)
    prompts = {name: [" ".join(one.prompt.split()) for one in found] for name, found in asked.items()}
    for name, found in prompts.items():
        again = len(found) - len(set(found))
        if again:
            yield Finding(level="warning", where=f"{name} questions", what=f"{again} of {len(found)} asked before")
    for name in ("adjacent", "retain"):
        shared = set(prompts.get("forget", ())) & set(prompts.get(name, ()))
        if shared:
            level: Level = "stop" if len(shared) == len(set(prompts["forget"])) else "warning"
            what = f"{len(shared)} are {name} questions, too: they should be forgotten and answered at once"
            yield Finding(level=level, where="forget questions", what=what)
    for side in ("forget", "retain"):
        everything = union([grams for corpus in corpora if corpus.side == side for grams in corpus.grams])
        for name, found in asked.items():
            whole = [f"{one.prompt} {one.answer}" for one in found]
            copied = sum(
                contained(words.grams(text), everything) >= CONTAINED for text in whole if words.count(text) >= GRAM
            )
            if copied:
                expected = (side == "forget") == (name == "forget")
                what = f"{copied} of {len(found)} stand nearly word for word in the {side} corpus" + (
                    ": they measure its wording" if expected else ": which side are they on?"
                )
                yield Finding(level="note" if expected else "warning", where=f"{name} questions", what=what)
    texts = [row.text for corpus in corpora if corpus.side == "forget" for row in corpus.rows]
    if asked.get("forget") and texts and not _answered(asked["forget"], texts, words):
        what = f"none of {len(asked['forget'])} answers stands in the forget corpus: do they ask for what is in it?"
        yield Finding(level="warning", where="forget questions", what=what)


def _answered(questions: Sequence[Question], texts: Sequence[str], words: Words) -> bool:
    """Whether the first words of any answer stand in any text."""
    lengths = {min(GRAM, words.count(one.answer)) for one in questions} - {0}
    grams = {n: union([words.grams(text, n) for text in texts]) for n in lengths}
    for one in questions:
        n = min(GRAM, words.count(one.answer))
        if n and contained(words.first(one.answer, n), grams[n]) > 0:
            return True
    return False
