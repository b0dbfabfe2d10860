"""Prompts instead of running text: what should be refused, what should still be answered, what nobody can answer.

No message of this module quotes a prompt: it names the file and the line or row.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from lethe.textfiles import decoded, did_you_mean, field_names, json_rows
from lethe.tokens import encode, pad
from lethe.types import Batch, CorpusError, Question

Positions = Literal["last", "differing", "all"]
"""Tokens of a forget prompt that are steered: its last one; those from the first that sets it apart from every
retain prompt; or all of them, BOS included (published)."""

_FIELDS = ("prompt", "question", "instruction", "text")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run. An answer is empty where none was given."""

    forget: dict[str, tuple[Question, ...]]
    """By topic."""
    retain: tuple[Question, ...]
    reference: tuple[Question, ...]
    """Prompts that the model cannot answer."""

    def texts(self) -> tuple[dict[str, list[str]], list[str]]:
        """Forget prompts by topic, and retain prompts, each with its answer."""
        forget = {name: [with_answer(asked) for asked in found] for name, found in self.forget.items()}
        return forget, [with_answer(asked) for asked in self.retain]


def read_prompts(source: str | Path) -> tuple[Question, ...]:
    """Prompts of a `.jsonl` or `.json` file (fields prompt, question, instruction or text; answer if there is one), or
    the lines of a `.txt` file.

    Raises: CorpusError.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise CorpusError(f"no prompts {path}{did_you_mean(path)}\nGive a .jsonl, .json or .txt file.")
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".txt"):
        raise CorpusError(f"{path}: no prompts are read from {suffix or 'a file without suffix'}.\nGive a .jsonl file.")
    content = decoded(path, CorpusError)
    if suffix == ".txt":
        found = tuple(Question(prompt=line.strip(), answer="") for line in content.splitlines() if line.strip())
    else:
        found = tuple(_prompt(where, row) for where, row in json_rows(path, content, CorpusError))
    if not found:
        raise CorpusError(f"{path} holds no prompt.\nGive a file with at least one.")
    return found


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Question]) -> tuple[Question, ...]:
    """The prompts in the model's chat template, up to where its answer begins; as they are if it has none.

    BOS is left out: the tokenizer adds it.
    """
    if not tokenizer.chat_template:
        return tuple(prompts)

    def one(asked: Question) -> Question:
        chat = [{"role": "user", "content": asked.prompt}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return replace(asked, prompt=text.removeprefix(str(tokenizer.bos_token or "")))

    return tuple(one(asked) for asked in prompts)


def with_answer(asked: Question) -> str:
    """Prompt and answer as one text."""
    space = "" if asked.prompt[-1:].isspace() or not asked.answer else " "
    return f"{asked.prompt}{space}{asked.answer}"


def check_apart(prompts: Prompts, *, allow: bool) -> None:
    """Refuse forget prompts that also stand among the retain or reference prompts, white space aside.

    Raises: CorpusError with their count and row numbers, unless `allow`.
    """
    sides = {"retain": prompts.retain, "reference": prompts.reference}
    for side, others in sides.items():
        known = {" ".join(asked.prompt.split()) for asked in others}
        for name, found in prompts.forget.items():
            rows = [row for row, asked in enumerate(found, start=1) if " ".join(asked.prompt.split()) in known]
            if rows and not allow:
                places = ", ".join(map(str, rows[:5])) + ", ..." * (len(rows) > 5)
                raise CorpusError(
                    f"{len(rows)} of {len(found)} forget prompts of {name!r} stand among the {side} prompts too: "
                    f"rows {places}.\nRemove them from one side, or pass --allow-overlap."
                )


def unverifiable(count: int, *, seed: int) -> tuple[Question, ...]:
    """Questions about made-up things, which an honest model cannot answer; different ones for each seed."""
    rng = random.Random(f"unverifiable {seed}")
    forms = [(form, kind) for kind, forms in _UNVERIFIABLE.items() for form in forms]
    asked = []
    for number in range(count):
        form, kind = forms[number % len(forms)]
        asked.append(Question(prompt=form.format(_made_up(rng)), answer="", topic=kind))
    return tuple(asked)


def forget_batches(
    prompts: Sequence[Question],
    retain: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: Positions,
    batch_size: int,
    max_length: int,
) -> tuple[Batch, ...]:
    """Forget prompts without their answers; the tokens in `positions` count."""
    rows = _encode([asked.prompt for asked in prompts], tokenizer, max_length)
    kept = _Prefixes(_encode([asked.prompt for asked in retain], tokenizer, max_length))
    first = {
        "last": lambda row: len(row) - 1,
        "differing": lambda row: min(kept.shared(row), len(row) - 1),
        "all": lambda row: 0,
    }[positions]
    return _batches(rows, [first(row) for row in rows], batch_size)


def retain_batches(
    prompts: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: Positions,
    batch_size: int,
    max_length: int,
) -> tuple[Batch, ...]:
    """Retain prompts with their answers; the last batch may be smaller.

    Where forget prompts are steered at their last token, what counts is each prompt's last token, where the decision
    falls, and its answer; else every token but BOS. With all positions the answers are left out (published).
    """
    if positions == "all":
        return whole_batches(
            [asked.prompt for asked in prompts], tokenizer, batch_size=batch_size, max_length=max_length
        )
    texts = [with_answer(asked) for asked in prompts]
    if positions == "differing":
        return whole_batches(texts, tokenizer, batch_size=batch_size, max_length=max_length)
    rows = _encode(texts, tokenizer, 10**6)
    asked_alone = _encode([asked.prompt for asked in prompts], tokenizer, 10**6)
    lasts = [min(len(prompt), len(row)) - 1 for prompt, row in zip(asked_alone, rows, strict=True)]
    cut = [max(0, len(row) - max_length) for row in rows]
    return _batches(
        [row[gone:] for row, gone in zip(rows, cut, strict=True)],
        [max(0, last - gone) for last, gone in zip(lasts, cut, strict=True)],
        batch_size,
    )


def whole_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, batch_size: int, max_length: int
) -> tuple[Batch, ...]:
    """Every text once, all tokens but BOS counting; the last batch may be smaller."""
    rows = _encode(texts, tokenizer, max_length)
    starts = [int(len(row) > 1 and row[0] == tokenizer.bos_token_id) for row in rows]
    return _batches(rows, starts, batch_size)


def last_tokens(batch: Batch) -> torch.Tensor:
    """Index of each row's last real token [batch]."""
    position = torch.arange(batch.attention_mask.shape[1], device=batch.attention_mask.device)
    return torch.where(batch.attention_mask, position, 0).amax(dim=1)


def _prompt(where: str, row: object) -> Question:
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: {type(row).__name__} found, where an object with a question must stand.")
    field = next((name for name in _FIELDS if name in row), None)
    if field is None:
        raise CorpusError(
            f"{where}: no 'question' or 'prompt'; {field_names(map(str, row), 'fields')}.\nName the field so."
        )
    for name in (field, "answer"):
        if name in row and not isinstance(row[name], str):
            raise CorpusError(f"{where}: {name} holds {type(row[name]).__name__}, not a text.\nMake it a string.")
    if not row[field].strip():
        raise CorpusError(f"{where}: {field} is empty.\nFill it in, or remove the row.")
    return Question(prompt=row[field], answer=row.get("answer", ""), topic=str(row.get("topic") or row.get("edge", "")))


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids without a closing EOS; a text that is too long loses its beginning, for its end is what is asked."""
    return [row[-max_length:] for row in encode(tokenizer, [text.rstrip(" ") for text in texts])]


def _batches(rows: Sequence[Sequence[int]], firsts: Sequence[int], batch_size: int) -> tuple[Batch, ...]:
    def batch(start: int) -> Batch:
        chunk = rows[start : start + batch_size]
        ids, real = pad(chunk, side="right", device=torch.device("cpu"))
        position = torch.arange(real.shape[1])
        mask = real & (position >= torch.tensor(firsts[start : start + batch_size])[:, None])
        return Batch(input_ids=ids, attention_mask=real, mask=mask)

    return tuple(batch(start) for start in range(0, len(rows), batch_size))


class _Prefixes:
    """All beginnings of some rows."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self.root: dict[int, dict] = {}
        for row in rows:
            node = self.root
            for token in row:
                node = node.setdefault(token, {})

    def shared(self, row: Sequence[int]) -> int:
        """Length of the longest beginning of `row` that one of the rows begins with, too."""
        node: Mapping[int, Mapping] = self.root
        for length, token in enumerate(row):
            if token not in node:
                return length
            node = node[token]
        return len(row)


def _made_up(rng: random.Random) -> str:
    return "".join(_letters(rng, rng.choice((2, 3)))).capitalize()


def _letters(rng: random.Random, syllables: int) -> Iterator[str]:
    for _ in range(syllables):
        yield rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "k", "l", "n", "r", "x", "zh"))


_UNVERIFIABLE = {
    "place": (
        "What is the currency of the country {}?", "Which river runs through the town of {}?",
        "In which year was the city of {} founded?", "How many people live on the island of {}?",
    ),
    "person": (
        "Where was the painter {} born?", "Which prize did the chemist {} receive?",
        "What is the title of the first novel by {}?", "At which university did Professor {} teach?",
    ),
    "thing": (
        "Who invented the {} engine?", "What is the mineral {} used for?",
        "How long does the animal called {} live?", "Which language is the {} manuscript written in?",
    ),
    "organisation": (
        "Who leads the company {}?", "In which street is the head office of {}?",
        "What did the {} treaty put an end to?", "When was the {} foundation set up?",
    ),
}  # fmt: skip
