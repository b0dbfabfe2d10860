"""Prompts: read, rendered, kept apart, cut into batches whose counted tokens are the steered ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from lethe import load_tokenizer, types
from lethe.data import prompt_corpora, prompts, unanswerable
from lethe.data.prompts import Prompts
from lethe.errors import CorpusError
from lethe.suites import world
from lethe.types import Question


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(world.MODEL_FOLDER)


def asked(*texts: str) -> tuple[Question, ...]:
    return tuple(Question(prompt=text, answer="") for text in texts)


@pytest.mark.parametrize("field", ["prompt", "question", "instruction", "text"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_prompt_may_stand_in_any_of_four_fields(tmp_path: Path, field: str, suffix: str) -> None:
    rows = [{field: "Who?", "answer": "Me"}, {field: "Why?"}]
    content = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"p{suffix}").write_text(content)
    found = prompts.read_prompts(tmp_path / f"p{suffix}")
    assert [(one.prompt, one.answer) for one in found] == [("Who?", "Me"), ("Why?", "")]


def test_a_text_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Who?\n\n  Why?  \n")
    assert [one.prompt for one in prompts.read_prompts(tmp_path / "p.txt")] == ["Who?", "Why?"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "question\nWho?", "no prompts are read from .csv"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"title": "x"}', "line 1: no 'question' or 'prompt'; there is title"),
        ("p.jsonl", '{"question": 3}', "line 1: question holds int, not a text"),
        ("p.jsonl", '{"question": " "}', "line 1: question is empty"),
        ("p.jsonl", '{"question": "q", "answer": ["a"]}', "line 1: answer holds list, not a text"),
        ("p.jsonl", '"Who?"', "line 1: str found"),
        ("p.jsonl", "{", "line 1, column 2: not JSON"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=said):
        prompts.read_prompts(tmp_path / name)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    with pytest.raises(CorpusError, match=r"did you mean prompts\.jsonl"):
        prompts.read_prompts(tmp_path / "promts.jsonl")


@pytest.mark.parametrize("side", ["retain", "reference"])
def test_forget_prompts_must_not_stand_on_another_side(side: str) -> None:
    sides = {"retain": asked("a"), "reference": asked("b"), side: asked("x", "same  text")}
    found = Prompts(forget={"t": asked("same text", "other")}, **sides)
    with pytest.raises(CorpusError, match=f"1 of 2 forget prompts of 't' stand among the {side} prompts too: rows 1"):
        prompts.check_apart(found, allow=False)
    prompts.check_apart(found, allow=True)


def test_a_chat_template_is_applied_without_its_bos(tokenizer: Any) -> None:
    assert prompts.render(tokenizer, asked("Who?")) == asked("Who?")
    chatty = load_tokenizer(world.MODEL_FOLDER)
    chatty.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (found,) = prompts.render(chatty, asked("Who?"))
    assert found.prompt == "[user] Who?\n[assistant]"


def test_unverifiable_questions_differ_and_repeat_by_seed() -> None:
    found = unanswerable.unverifiable(64, seed=1)
    assert len({one.prompt for one in found}) == 64
    assert found == unanswerable.unverifiable(64, seed=1)
    assert not {one.prompt for one in found} & {one.prompt for one in unanswerable.unverifiable(64, seed=2)}


def test_which_tokens_of_a_forget_prompt_count(tokenizer: Any) -> None:
    forget, retain = asked("Q: What is the home of Skarn? A:"), asked("Q: What is the colour of Skarn? A:")

    def counted(positions: Any, kept: tuple[Question, ...] = retain) -> str:
        (batch,) = prompt_corpora.forget_batches(
            forget, kept, tokenizer, positions=positions, batch_size=4, max_length=64
        )
        return tokenizer.decode(batch.input_ids[batch.mask]).strip()

    whole = tokenizer.decode(tokenizer(forget[0].prompt)["input_ids"]).strip()
    assert counted("all") == whole
    assert counted("last") == ":"
    differing = counted("differing")
    assert whole.endswith(differing)
    assert differing.startswith("home")
    # A prompt that is the beginning of a retain prompt still has its last token.
    assert counted("differing", forget) == ":"


def test_a_long_prompt_keeps_its_end(tokenizer: Any) -> None:
    (batch,) = prompt_corpora.forget_batches(
        asked("word " * 50 + "end"), (), tokenizer, positions="last", batch_size=1, max_length=8
    )
    assert batch.input_ids.shape == (1, 8)
    assert (
        tokenizer.decode(batch.input_ids[batch.mask]).strip()
        == tokenizer.decode(tokenizer("word end")["input_ids"][-1:]).strip()
    )


def test_whole_batches_hold_every_text_and_count_all_but_bos(tokenizer: Any) -> None:
    texts = ["one two", "three", "four five six"]
    found = prompt_corpora.whole_batches(texts, tokenizer, batch_size=2, max_length=64)
    assert [len(batch.input_ids) for batch in found] == [2, 1]
    for batch, rows in zip(found, (texts[:2], texts[2:]), strict=True):
        for row, text in enumerate(rows):
            ids = [i for i in tokenizer(text)["input_ids"] if i != tokenizer.bos_token_id]
            assert [i for i in batch.input_ids[row][batch.mask[row]].tolist() if i != tokenizer.eos_token_id] == ids


def test_the_last_token_is_found_on_either_side_of_padding(tiny_batch: Any) -> None:
    assert types.last_tokens(tiny_batch((9, 5, 7))).tolist() == [8, 4, 6]
    assert types.last_tokens(tiny_batch((9, 5, 7), side="left")).tolist() == [8, 8, 8]
