"""Questions per second and peak memory of MMLU in lm-evaluation-harness and in Lethe; and that both answer the same.

    python benchmarks/evaluate.py ../shared/data/mmlu --per-subject 8
    python benchmarks/evaluate.py ../shared/data/mmlu --models builtin STORIES --parity

Each measurement is a process of its own with one thread, timed by the processor's time so that other work on the
machine counts little. Theirs: `simple_evaluate` with tasks already loaded, `--batch-size` rows.
"""

import contextlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from lethe import LoadedModel, load_model, load_tokenizer
from lethe.data.exams import Exam, read_exam
from lethe.evaluation.exam import sit
from lethe.evaluation.harness import write_tasks
from lethe.suites.world import MODEL_FOLDER
from lethe.system.machine import peak_mb

RANDOM = LlamaConfig(
    num_hidden_layers=12, hidden_size=768, intermediate_size=2048, num_attention_heads=12, vocab_size=2048,
    max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
"""About 88 M parameters, reading the built-in model's tokens; few-shot prompts fit into its context."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    mmlu: tyro.conf.Positional[Path]
    """Folder with test/ and dev/."""
    models: tuple[str, ...] = ("builtin", "random")
    """`builtin`, `random` (a Llama of 88 M parameters), or a model folder."""
    shots: tuple[int, ...] = (0, 5)
    """Solved examples in a prompt."""
    per_subject: int | None = None
    """First questions of each subject; all by default."""
    subjects: int = 57
    """First subjects."""
    batch_size: int = 8
    """Rows of the harness's batches."""
    repeats: int = 3
    """Runs of each; medians are reported."""
    parity: bool = False
    """Compare every log-likelihood and pick instead of taking times."""
    only: Literal["theirs", "ours"] | None = None
    """Measure one in this process and print it as JSON; what the processes started by this one do."""


def find_exam(settings: Settings) -> Exam:
    exam = read_exam(settings.mmlu)
    exam = exam.only(exam.subjects[: settings.subjects])
    if settings.per_subject is None:
        return exam
    rows = [[one for one in exam.questions if one.topic == name] for name in exam.subjects]
    return replace(exam, questions=tuple(one for row in rows for one in row[: settings.per_subject]))


def find_subject(model: str) -> LoadedModel:
    folder = MODEL_FOLDER if model in ("builtin", "random") else Path(model)
    tokenizer = load_tokenizer(folder)
    if model == "random":
        torch.manual_seed(0)
        return LoadedModel(model=LlamaForCausalLM(RANDOM).eval(), tokenizer=tokenizer)
    return LoadedModel(model=load_model(folder, dtype=torch.float32, device="cpu"), tokenizer=tokenizer)


class Theirs:
    """The harness on the same exam."""

    def __init__(self, subject: LoadedModel, exam: Exam, batch_size: int, folder: Path):
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        write_tasks(folder, exam, "local")
        self.lm: Any = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)
        self.manager = TaskManager(include_path=str(folder), include_defaults=False)

    def sit(self, shots: int, *, samples: bool = False) -> dict[str, Any]:
        """Its results; with samples, what it found for each question, too."""
        from lm_eval import simple_evaluate

        return simple_evaluate(
            model=self.lm,
            tasks=["local"],
            num_fewshot=shots,
            task_manager=self.manager,
            bootstrap_iters=0,
            log_samples=samples,
        )


def measure(settings: Settings, model: str, shots: int) -> dict[str, float]:
    """Seconds of the processor and MB of the exam, and MB before it."""
    exam, subject = find_exam(settings), find_subject(model)
    small = replace(exam, questions=exam.questions[:8])
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as folder:
        if settings.only == "theirs":
            Theirs(subject, small, settings.batch_size, Path(warm)).sit(shots)
            theirs = Theirs(subject, exam, settings.batch_size, Path(folder))
            theirs.manager.load(["local"])
        else:
            sit(subject, small, shots=shots)
        before, started = peak_mb(torch.device("cpu")), time.process_time()
        if settings.only == "theirs":
            theirs.sit(shots)
        else:
            sit(subject, exam, shots=shots)
        seconds = time.process_time() - started
    return {"seconds": seconds, "mb": peak_mb(torch.device("cpu")), "before": before, "questions": len(exam.questions)}


def compare(settings: Settings, model: str, shots: int) -> str:
    """Subject by subject: the harness keeps the logits of all questions, 17 GB of one 5-shot exam."""
    exam, subject = find_exam(settings), find_subject(model)
    parts = [_compared(subject, exam.only([name]), settings.batch_size, shots) for name in exam.subjects]
    count, picks, hits, right = (sum(part[key] for part in parts) for key in ("count", "picks", "hits", "right"))
    return (
        f"{count:.0f} questions, {len(parts)} subjects; largest difference of a log-likelihood "
        f"{max(part['difference'] for part in parts):.1e}, other picks {picks:.0f}, other hits {hits:.0f}, accuracy "
        f"{right / count:.6f} (theirs {sum(part['theirs'] for part in parts) / count:.6f})"
    )


def _compared(subject: LoadedModel, exam: Exam, batch_size: int, shots: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        found = Theirs(subject, exam, batch_size, Path(folder)).sit(shots, samples=True)
    samples = {name.removeprefix("local_"): rows for name, rows in found["samples"].items()}
    theirs = sorted(samples[exam.subjects[0]], key=lambda one: one["doc_id"])
    marks = sit(subject, exam, shots=shots)
    values = torch.tensor([[value for value, _ in row["filtered_resps"]] for row in theirs], dtype=torch.float64)
    ours = torch.tensor(marks.log_likelihoods, dtype=torch.float64)
    return {
        "count": len(theirs),
        "difference": float((values - ours).abs().max()),
        "picks": int((values.argmax(1) != torch.tensor(marks.picked)).sum()),
        "hits": sum(one != row["acc"] for one, row in zip(marks.hits, theirs, strict=True)),
        "right": sum(marks.hits),
        "theirs": sum(row["acc"] for row in theirs),
    }


def ask(settings: Settings, model: str, shots: int, only: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(settings.mmlu), "--models", model, "--shots", str(shots), "--only", only]
    command += ["--subjects", str(settings.subjects), "--batch-size", str(settings.batch_size)]
    command += ["--per-subject", str(settings.per_subject)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(settings: Settings) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if settings.only:
        print(json.dumps(measure(settings, settings.models[0], settings.shots[0])))
        return
    for model in settings.models:
        for shots in settings.shots:
            if settings.parity:
                print(f"{Path(model).name}, {shots}-shot: {compare(settings, model, shots)}", flush=True)
                continue
            runs = [
                {one: ask(settings, model, shots, one) for one in ("theirs", "ours")} for _ in range(settings.repeats)
            ]
            rate = {
                one: statistics.median(run[one]["questions"] / run[one]["seconds"] for run in runs) for one in runs[0]
            }
            ratios = sorted(run["theirs"]["seconds"] / run["ours"]["seconds"] for run in runs)
            mb = {one: statistics.median(run[one]["mb"] for run in runs) for one in runs[0]}
            print(
                f"{Path(model).name}, {shots}-shot, {runs[0]['ours']['questions']} questions: "
                f"harness {rate['theirs']:.1f}/s, lethe {rate['ours']:.1f}/s, ratio {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}); peak memory {mb['theirs']:.0f} and {mb['ours']:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
