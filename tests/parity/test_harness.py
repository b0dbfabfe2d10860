"""The same exam sat here and in lm-evaluation-harness itself: same picks, same log-likelihoods, same accuracy."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethe import LoadedModel, load_model, load_tokenizer
from lethe.data.exams import Exam, Scoring, read_exam
from lethe.errors import UnknownNameError, UsageError
from lethe.evaluation.exam import Marks, sit
from lethe.evaluation.harness import run_harness, write_tasks
from lethe.suites.world import MODEL_FOLDER

DATA = Path(__file__).parents[3] / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
CLOSE = 1e-4
"""Largest difference of a log-likelihood; fp32 on a CPU."""
QUESTIONS = 12
"""Of each subject."""
SUBJECTS = ("abstract_algebra", "sociology", "high_school_us_history", "virology")
"""Short ones, one with a question whose answer stands twice, long ones."""

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: lethe-unlearn[eval]"),
    pytest.mark.skipif(not (DATA / "mmlu").exists(), reason="needs MMLU in ../shared/data/mmlu"),
    pytest.mark.filterwarnings("ignore"),
]

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def exam() -> Exam:
    whole = read_exam(DATA / "mmlu").only(SUBJECTS)
    # The last ones: row 198 of sociology has the same text twice, as the right and as a wrong choice.
    chosen = [q for name in SUBJECTS for q in [one for one in whole.questions if one.topic == name][-QUESTIONS:]]
    return Exam(questions=tuple(chosen), examples=whole.examples)


@pytest.fixture(scope="module", params=["built-in", "stories260K"])
def subject(request: pytest.FixtureRequest) -> LoadedModel:
    folder = MODEL_FOLDER if request.param == "built-in" else STORIES
    return LoadedModel(model=load_model(folder, dtype=torch.float32, device="cpu"), tokenizer=load_tokenizer(folder))


def tasks(folder: Path, exam: Exam, scoring: Scoring = "letter") -> Path:
    write_tasks(folder, exam, "local", scoring=scoring)
    return folder


def reference(
    subject: LoadedModel, folder: Path, subjects: Sequence[str], *, shots: int, chat: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's results, and its samples in the order of the questions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        lm = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = simple_evaluate(
            model=lm,
            tasks=["local"],
            num_fewshot=shots,
            apply_chat_template=chat,
            task_manager=manager,
            bootstrap_iters=0,
        )
    samples = found["samples"]
    return found, [one for name in subjects for one in sorted(samples[f"local_{name}"], key=lambda row: row["doc_id"])]


def check_same(marks: Marks, found: dict[str, Any], samples: list[dict[str, Any]], metric: str = "acc") -> None:
    theirs = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(marks.log_likelihoods), torch.tensor(theirs), rtol=0, atol=CLOSE)
    assert list(marks.hits) == [sample[metric] for sample in samples]
    scores = marks.scores()
    for name, score in scores.items():
        row = found["results"][f"local_{name}" if name else "local"]
        if name or metric == "acc":
            assert score.value == pytest.approx(row[f"{metric},none"], abs=1e-12)


@pytest.mark.parametrize("shots", [0, 5])
def test_the_harness_picks_the_same(subject: LoadedModel, exam: Exam, shots: int, tmp_path: Path) -> None:
    folder = tasks(tmp_path, exam)
    marks = sit(subject, exam, shots=shots)
    check_same(marks, *reference(subject, folder, exam.subjects, shots=shots))
    picked = torch.tensor(marks.log_likelihoods).argmax(1).tolist()
    assert list(marks.picked) == picked


@pytest.mark.parametrize("shots", [0, 3])
def test_with_a_context_that_holds_the_prompts_and_a_chat_template(exam: Exam, shots: int, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(STORIES)
    tokenizer.chat_template = CHAT
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )  # fmt: skip
        subject = LoadedModel(model=LlamaForCausalLM(config).eval(), tokenizer=tokenizer)
    short = Exam(questions=exam.questions[:QUESTIONS], examples=exam.examples)
    folder = tasks(tmp_path, short)
    check_same(sit(subject, short, shots=shots), *reference(subject, folder, short.subjects, shots=shots))
    chatted = reference(subject, folder, short.subjects, shots=shots, chat=True)
    check_same(sit(subject, short, shots=shots, chat=True), *chatted)
    assert chatted[1][0]["arguments"][0][1] == "A", "nothing stands before the letter"


def test_choices_by_their_text(subject: LoadedModel, exam: Exam, tmp_path: Path) -> None:
    short = Exam(questions=exam.questions[: 2 * QUESTIONS], examples=exam.examples)
    folder = tasks(tmp_path, short, scoring="cloze")
    marks = sit(subject, short, scoring="cloze", shots=1)
    check_same(marks, *reference(subject, folder, short.subjects, shots=1), metric="acc_norm")


def test_the_harness_on_a_model_in_memory(exam: Exam, tmp_path: Path) -> None:
    subject = LoadedModel(
        model=load_model(STORIES, dtype=torch.float32, device="cpu"), tokenizer=load_tokenizer(STORIES)
    )
    folder = tasks(tmp_path, exam)
    state = torch.random.get_rng_state()
    found = run_harness(subject, ["local"], shots=0, include=[folder])
    marks = sit(subject, exam).scores()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name for name in found if "/" in name} == {
        f"{'local_' * bool(name)}{name or 'local'}/acc" for name in marks
    }
    for name, score in marks.items():
        theirs = found[f"{'local_' * bool(name)}{name or 'local'}/acc"]
        assert (theirs.value, theirs.n, theirs.better) == (pytest.approx(score.value), score.n, "higher")
        if name:
            assert theirs.per_example == score.per_example
            assert theirs.stderr == pytest.approx(score.stderr)
    few = run_harness(subject, ["local_virology"], shots=0, limit=3, include=[folder])
    assert few["local_virology/acc"].n == 3
    with pytest.raises(UnknownNameError, match="no task 'local_virolgy': did you mean local_virology"):
        run_harness(subject, ["local_virolgy"], include=[folder])
    (folder / "local_3_test.jsonl").unlink()
    with pytest.raises(UsageError, match="could not run local_virology"):
        run_harness(subject, ["local_virology"], include=[folder])


def test_the_batch_size_is_applied(exam: Exam, tmp_path: Path) -> None:
    subject = LoadedModel(
        model=load_model(STORIES, dtype=torch.float32, device="cpu"), tokenizer=load_tokenizer(STORIES)
    )
    folder, seen = tasks(tmp_path, exam), []
    hook = subject.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    try:
        run_harness(subject, ["local_virology"], batch_size=5, include=[folder], limit=10)
    finally:
        hook.remove()
    assert max(seen) == 5
