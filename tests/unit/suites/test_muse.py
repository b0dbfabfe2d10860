"""MUSE: its files as sets, and its metrics by hand and against a second implementation."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel

from lethe import suites
from lethe.errors import InvalidValueError, QuestionError
from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.reading import Reading
from lethe.metrics.muse_memorisation import Knowmem, Verbmem
from lethe.metrics.priv_leak import PrivLeak
from lethe.metrics.protocol import Metric
from lethe.suites.muse import MUSE
from lethe.suites.protocol import Suite
from lethe.system.plugins import discover
from lethe.types import EvalSet, Question, Scores
from rigged_models import OF, bigram, chain, forget_set, retain_set, tiny_tokenizer

SOLVED = "Question: Who?\nAnswer: Ann\n\n"


def scores_of(metric: Metric, subject: LoadedModel, data: EvalSet) -> Scores:
    scores = metric(Reading(subject, data))
    assert isinstance(scores, Scores)
    return scores


def says(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> list[dict[str, Any]]:
    """The metrics are handed these continuations, by prompt; what they ask for is returned."""
    calls = []

    def generate(_: LoadedModel, prompts: list[str], tokens: list[int], *, lines: bool) -> list[str]:
        calls.append({"tokens": tokens, "lines": lines})
        return [texts[prompt] for prompt in prompts]

    monkeypatch.setattr("lethe.metrics.muse_memorisation.generate", generate)
    return calls


@pytest.fixture
def subject(tiny_model: Callable[..., PreTrainedModel]) -> LoadedModel:
    shape = {"vocab_size": 264, "max_position_embeddings": 300, "bos_token_id": 0, "eos_token_id": 1}
    retain_only = LoadedModel(model=tiny_model(seed=1, **shape), tokenizer=tiny_tokenizer())
    return LoadedModel(model=tiny_model(**shape), tokenizer=tiny_tokenizer(), retain_only=retain_only)


# Memorisation


def test_verbatim_memorisation_by_hand(subject: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = says(monkeypatch, {"a": "the red rivers\nran", "b": ""})
    found = scores_of(Verbmem(), subject, forget_set(passages=(("a", "the river ran fast"), ("b", "x"))))
    # In order stand "the ... ran" of four and four words: rivers is no river without stemming.
    assert found.per_example == pytest.approx((2 / 4, 0))
    assert calls == [{"tokens": [128, 128], "lines": False}]


def test_no_more_of_a_passage_counts_than_may_be_said(subject: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"w{number}" for number in range(100, 200)]
    says(monkeypatch, {"a": " ".join(words[:25])})
    found = scores_of(Verbmem(), subject, forget_set(passages=(("a", " ".join(words)),)))
    # A word and its space are 5 tokens of one letter each: 128 hold 25 of them and 3 letters of the next.
    assert found.value == pytest.approx(2 * 25 / (25 + 26))


def test_a_context_without_room_takes_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = says(monkeypatch, {"a": "x"})
    scores_of(Verbmem(), bigram({}), forget_set(passages=(("a", "x"),)))
    assert calls == [{"tokens": [32], "lines": False}]


def test_knowledge_memorisation_by_hand(subject: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"{SOLVED}Question: {letter}?\nAnswer:" for letter in "abc"]
    said = [" red wine\n\nQuestion: d?", " the wine\nof France Question: d?", "\nQuestion"]
    calls = says(monkeypatch, dict(zip(prompts, said, strict=True)))
    golds = ("red wine", "wine of Spain", "wine")
    asked = tuple(Question(prompt=prompt, answer=gold) for prompt, gold in zip(prompts, golds, strict=True))
    found = scores_of(Knowmem(), subject, retain_set(questions=asked))
    assert found.per_example == pytest.approx((1, 2 * 2 / (4 + 3), 0))
    assert calls == [{"tokens": [32, 32, 32], "lines": False}]


def test_nothing_is_measured_without_passages_or_solved_examples(subject: LoadedModel) -> None:
    plain = forget_set(questions=(Question(prompt="Question: a?\nAnswer:", answer="b"),))
    assert Verbmem()(Reading(subject, plain)) is None
    assert Knowmem()(Reading(subject, plain)) is None
    assert Verbmem()(Reading(subject, forget_set(passages=(("a", "\u6c34"),)))) is None
    solved = Question(prompt=f"{SOLVED}{plain.questions[0].prompt}", answer="\u6c34")
    assert Knowmem()(Reading(subject, replace(plain, questions=(solved,)))) is None


def test_a_continuation_goes_on_past_newlines_where_it_is_asked_to() -> None:
    subject = bigram({**chain(["a", "b", "Ċ", "c", "d"]), "d": {"</s>": 0.9}})
    assert generate(subject, ["a"], [3]) == ["b"]
    assert generate(subject, ["a"], [3], lines=False) == ["b\nc"]
    assert generate(subject, ["a", "Q"], [8, 0], lines=False)[0] == "b\ncd"


def test_metrics_agree_with_a_second_implementation(subject: LoadedModel) -> None:
    """Each prompt alone, with the whole text run again for every token."""
    passages = (("Ann sold", "oil to the men of the town."), ("Bob", "had none.\nSo he left."), ("Cy", "sang."))
    questions = tuple(
        Question(prompt=f"{SOLVED}Question: Who {verb}?\nAnswer:", answer=name)
        for verb, name in (("sold", "Ann and a man"), ("left", "Bob"))
    )
    data = forget_set(passages=passages, questions=questions)

    def goes_on(prompt: str, tokens: int) -> str:
        ids = subject.tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + tokens and ids[-1] != 1:
                ids.append(int(subject.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return subject.tokenizer.decode(ids[start:], skip_special_tokens=True)

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    verbatim = [scorer.score(rest, goes_on(start, 128))["rougeL"].fmeasure for start, rest in passages]
    answers = [
        goes_on(one.prompt, 32).split("\n\n")[0].split("\nQuestion")[0].split("Question:")[0] for one in questions
    ]
    known = [scorer.score(one.answer, text)["rougeL"].fmeasure for one, text in zip(questions, answers, strict=True)]
    assert scores_of(Verbmem(), subject, data).per_example == pytest.approx(verbatim)
    assert scores_of(Knowmem(), subject, data).per_example == pytest.approx(known)


# Privacy leakage

TEXTS = ("Ann sold oil to the men.", "Bob had none.", "Cy sang of the sea and of the town.", "Dee ran.", "Eli saw it.")
HOLDOUT = ("Flo bought wine.", "Gus was out in the rain.", "Hal knew.", "Ivy read a book that day.")


def naive_auc(subject: LoadedModel) -> float:
    """Share of pairs in which the held-out text seems likelier by the least likely 40 % of its tokens."""

    def likely(text: str) -> float:
        ids = torch.tensor([subject.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            steps = subject.model(ids).logits[0, :-1].double().log_softmax(-1)
        lowest = sorted(steps.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return sum(lowest[: int(0.4 * len(lowest))]) / int(0.4 * len(lowest))

    return sum(likely(other) > likely(text) for text in TEXTS for other in HOLDOUT) / (len(TEXTS) * len(HOLDOUT))


def test_privacy_leakage_agrees_with_a_second_implementation(subject: LoadedModel) -> None:
    assert subject.retain_only is not None
    ours, without = naive_auc(subject), naive_auc(subject.retain_only)
    assert ours != without
    data = forget_set(texts=TEXTS, holdout=HOLDOUT)
    found = scores_of(PrivLeak(), subject, data)
    assert found.value == pytest.approx(100 * (ours - without) / without)
    assert (found.n, found.better) == (len(TEXTS), "neither")
    assert found.stderr > 0
    assumed = scores_of(PrivLeak(assumed_auc=0.5), replace(subject, retain_only=None), data)
    assert assumed.value == pytest.approx(100 * (ours - 0.5) / 0.5)
    # A model that is there is measured, whatever was assumed.
    assert scores_of(PrivLeak(assumed_auc=0.9), subject, data) == found


def test_memorised_texts_leak_by_minus_a_hundred() -> None:
    texts, holdout = ("abcdef", "abcde"), ("qrstuv", "vutsr")
    knows = bigram(chain(list("abcdef")))
    data = forget_set(texts=texts, holdout=holdout)
    found = scores_of(PrivLeak(assumed_auc=0.5), knows, data)
    assert found.value == pytest.approx(-100)
    turned = replace(data, texts=holdout, holdout=texts)
    assert scores_of(PrivLeak(assumed_auc=0.5), knows, turned).value == pytest.approx(100)


def test_the_error_of_leakage_shrinks_with_the_number_of_texts(subject: LoadedModel) -> None:
    few = scores_of(PrivLeak(), subject, forget_set(texts=TEXTS, holdout=HOLDOUT))
    many = scores_of(PrivLeak(), subject, forget_set(texts=TEXTS * 9, holdout=HOLDOUT * 9))
    assert many.value == pytest.approx(few.value)
    assert many.stderr == pytest.approx(few.stderr / 3, rel=0.2)


def test_leakage_is_not_measured_without_what_it_needs(subject: LoadedModel) -> None:
    data = forget_set(texts=TEXTS, holdout=HOLDOUT)
    assert PrivLeak()(Reading(replace(subject, retain_only=None), data)) is None
    assert PrivLeak()(Reading(subject, replace(data, holdout=()))) is None
    assert PrivLeak()(Reading(subject, replace(data, texts=()))) is None
    assert PrivLeak()(Reading(subject, replace(data, holdout=("",)))) is None
    # A retain-only model that finds no held-out text likely leaves nothing to divide by.
    knows = bigram(chain(list("abcdef")))
    nothing = forget_set(texts=("abcdef",), holdout=("qrstuv",))
    assert PrivLeak()(Reading(replace(knows, retain_only=replace(knows)), nothing)) is None


def test_texts_are_read_beyond_512_tokens(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(vocab_size=264, max_position_embeddings=700, bos_token_id=0, eos_token_id=1)
    subject = LoadedModel(model=model, tokenizer=tiny_tokenizer())
    long = "".join(letter for letter in sorted(OF) if len(letter) == 1 and letter.isalpha() and letter.isascii()) * 14
    assert len(long) > 600
    same, other = long[:599], long[:550] + "z" * 49
    data = forget_set(texts=(same,), holdout=(other,))
    assert not math.isclose(scores_of(PrivLeak(assumed_auc=0.5), subject, data).value, 0)


# Files


def test_it_is_found_by_name() -> None:
    found = discover(suites)["muse"]
    assert found is MUSE
    assert isinstance(found(), Suite)


FILES: dict[str, list[Any]] = {
    "knowmem/forget_qa": [{"question": "Who left?", "answer": "Bob"}, {"question": "Who {sang}?", "answer": "Cy"}],
    "knowmem/forget_qa_icl": [{"question": "Who?", "answer": "Ann"}, {"question": "Where?", "answer": "here"}],
    "knowmem/retain_qa": [{"question": "Who ran?", "answer": "Dee"}],
    "knowmem/retain_qa_icl": [{"question": "Why?", "answer": "rain"}],
    "verbmem/forget": [{"prompt": "Ann sold", "gt": "oil.\nShe left."}],
    "privleak/forget": [{"text": "Ann sold oil."}, {"text": "Bob left."}],
    "privleak/holdout": [{"text": "Flo came."}],
}


def write(folder: Path, suffix: str, changed: dict[str, list[Any]] | None = None) -> Path:
    for name, rows in {**FILES, **(changed or {})}.items():
        path = folder / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix.endswith("parquet"):
            pyarrow = pytest.importorskip("pyarrow")
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", "-00000-of-00001.parquet"])
def test_two_sets_are_read(tmp_path: Path, suffix: str) -> None:
    if suffix.endswith("parquet"):
        pytest.importorskip("pyarrow.parquet")
    forget, retain = MUSE().sets(write(tmp_path, suffix))
    above = "Question: Who?\nAnswer: Ann\n\nQuestion: Where?\nAnswer: here\n\n"
    assert forget == EvalSet(
        name="forget",
        role="forget",
        questions=(
            Question(prompt=f"{above}Question: Who left?\nAnswer:", answer="Bob"),
            Question(prompt=f"{above}Question: Who {{sang}}?\nAnswer:", answer="Cy"),
        ),
        passages=(("Ann sold", "oil.\nShe left."),),
        texts=("Ann sold oil.", "Bob left."),
        holdout=("Flo came.",),
    )
    asked = Question(prompt="Question: Why?\nAnswer: rain\n\nQuestion: Who ran?\nAnswer:", answer="Dee")
    assert retain == retain_set(questions=(asked,))


def test_other_layouts_are_read_as_well(tmp_path: Path) -> None:
    """The books' retain set is number two, load_data.py writes texts alone, and both corpora lie side by side."""
    plain = {"privleak/forget": ["Ann sold oil.", "Bob left."], "privleak/holdout": ["Flo came."]}
    write(tmp_path / "news", ".json")
    books = write(tmp_path / "books", ".json", {**plain, "verbmem/forget": [{"prompt": "Cy", "gt": "sang."}]})
    for path in (books / "knowmem").glob("retain_qa*"):
        path.rename(path.with_name(path.name.replace("retain_", "retain2_")))
    (forget, retain), (news, _) = (MUSE(split=split).sets(tmp_path) for split in ("books", "news"))
    assert forget.passages == (("Cy", "sang."),)
    assert news.passages == (("Ann sold", "oil.\nShe left."),)
    assert forget.texts == news.texts
    assert len(retain.questions) == 1


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named_with_its_source(tmp_path: Path, name: str) -> None:
    write(tmp_path, ".json")
    (tmp_path / f"{name}.json").unlink()
    with pytest.raises(
        QuestionError, match=f"no {Path(name).name}.* in .*{Path(name).parent}.\n.*muse-bench/MUSE-News"
    ):
        MUSE().sets(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "secret"}], r"forget.jsonl, line 1: no 'gt'; there is prompt"),
        ([FILES["verbmem/forget"][0], {"prompt": "secret", "gt": ""}], "forget.jsonl, line 2: gt is empty"),
        ([{"prompt": "secret", "gt": 3}], "forget.jsonl, line 1: gt holds int, not a text"),
        (["secret"], "forget.jsonl, line 1: str found, where an object must stand"),
        ([], "forget.jsonl holds no row"),
    ],
)
def test_a_bad_row_is_named_and_not_quoted(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(QuestionError, match=message) as caught:
        MUSE().sets(write(tmp_path, ".jsonl", {"verbmem/forget": rows}))
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path, ".jsonl")
    (tmp_path / "verbmem" / "forget.jsonl").unlink()
    (tmp_path / "verbmem" / "forget.parquet").write_text("secret")
    with pytest.raises(QuestionError, match=r"forget.parquet is no parquet file") as caught:
        MUSE().sets(tmp_path)
    assert "secret" not in str(caught.value)


def test_another_corpus_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"news and books. Got 'wikis'"):
        MUSE(split="wikis")
