"""lm-evaluation-harness run on a model in memory, edited or not: its tasks and its numbers, without an export."""

import contextlib
import copy
import difflib
import importlib
import io
import json
import logging
import math
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lethe.data.exams import Exam, Scoring, description
from lethe.data.questions import LETTERS
from lethe.errors import InvalidValueError, LetheError, UnknownNameError, UsageError
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import measuring
from lethe.types import Scores

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas")
"""What task files call data that lies here, by their `dataset_path`."""


SHARES = ("acc", "acc_norm")
"""Metrics of the harness that are parts of a whole."""


def run_harness(
    subject: LoadedModel,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    include: Sequence[Path] = (),
    manager: Any = None,
) -> dict[str, Scores]:
    """What lm-evaluation-harness measures on some of its tasks and groups of tasks, by the name `task/metric`.

    Without `shots` each task has its own number of solved examples; `limit` takes the first questions of each task;
    task files of one's own, for local data say, are found in the folders `include`. `manager` is what `find_tasks`
    returned for these tasks, where it was asked already.

    Raises: UsageError without lm-eval, or if it cannot run a task; UnknownNameError for a task that it does not have;
        InvalidValueError.
    """
    if batch_size < 1:
        raise InvalidValueError(f"'batch_size' must be at least 1. Got {batch_size}.")
    manager = manager or find_tasks(tasks, include)
    with _quiet(), measuring(subject.model):
        evaluator, models = _module("evaluator"), _module("models.huggingface")
        # The batch size belongs here: simple_evaluate leaves its own aside when the model is loaded already.
        lm = models.HFLM(pretrained=subject.model, tokenizer=copy.deepcopy(subject.tokenizer), batch_size=batch_size)
        try:
            with _no_copies():
                found = evaluator.simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    num_fewshot=shots,
                    limit=limit,
                    apply_chat_template=chat,
                    task_manager=manager,
                    bootstrap_iters=1000,
                )
        except LetheError:
            raise
        except Exception as error:
            # The message may quote a question, so only its kind is told.
            raise UsageError(
                f"lm-evaluation-harness could not run {', '.join(tasks)} ({type(error).__name__}).\n"
                "Data from the hub must have been fetched once; for local data give task files with --include."
            ) from None
    return _scores(found or {})


def find_tasks(tasks: Sequence[str], include: Sequence[Path] = ()) -> Any:
    """The harness's own list of task files, once all of these tasks stand in it.

    Raises: UsageError without lm-eval or a folder; UnknownNameError for a task that it does not have.
    """
    missing = [str(folder) for folder in include if not folder.is_dir()]
    if missing:
        raise UsageError(f"no folder {', '.join(missing)}.\nGive the folder that holds the task files (.yaml).")
    with _quiet():
        task_files = _module("tasks")
        folders = [str(folder) for folder in include]
        try:
            # The harness's own thousands of task files take ten seconds to read, which one's own may not need.
            manager = task_files.TaskManager(include_path=folders, include_defaults=False)
            if not all(manager.match_tasks([task]) for task in tasks):
                manager = task_files.TaskManager(include_path=folders)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise UsageError(
                f"the task files in {', '.join(folders)} cannot be read ({type(error).__name__}).\n"
                "Each must be YAML with a 'task' or a 'group'."
            ) from None
    for task in tasks:
        if not manager.match_tasks([task]):
            near = ", ".join(difflib.get_close_matches(task, manager.all_tasks, n=3))
            raise UnknownNameError(
                f"lm-evaluation-harness has no task '{task}'{near and f': did you mean {near}?'}\n"
                "`lm-eval ls tasks` lists them; task files of your own are found in the folders of --include."
            )
    return manager


def task_data(include: Sequence[Path]) -> list[Path]:
    """Every file in folders of task files, and every file here that one of these task files names."""
    inside = [path for folder in include for path in sorted(folder.rglob("*")) if path.is_file()]
    named: list[Path] = []
    for path in inside:
        if path.suffix in (".yaml", ".yml"):
            words = re.findall(r"[^\s'\"\[\]{},]+", path.read_text(encoding="utf-8", errors="replace"))
            named += [Path(word) for word in words if os.path.isfile(word)]
    return sorted({*inside, *named})


def write_tasks(folder: Path, exam: Exam, name: str, *, scoring: Scoring = "letter") -> tuple[str, ...]:
    """Task files for an exam, one task a subject and the group `name` of all; their names, the group's first.

    The folder then holds the questions, too. Subjects without solved examples can be asked without such only.
    """
    options = "{% for choice in choices %}{{letters[loop.index0]}}. {{choice}}\n{% endfor %}"
    letter = {
        "doc_to_text": "{% set letters = '" + LETTERS + "' %}{{question.strip()}}\n" + options + "Answer:",
        "doc_to_choice": "{{'" + LETTERS + "'[:choices|length]|list}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    cloze = {"doc_to_text": "Question: {{question.strip()}}\nAnswer:", "doc_to_choice": "{{choices}}"}
    names = []
    for number, subject in enumerate(exam.subjects):
        splits = {"test": [one for one in exam.questions if one.topic == subject]}
        splits |= {"dev": list(exam.examples[subject])} if subject in exam.examples else {}
        files = {split: folder / f"{name}_{number}_{split}.jsonl" for split in splits}
        for split, questions in splits.items():
            rows = [{"question": one.prompt, "choices": one.choices, "answer": one.gold} for one in questions]
            files[split].write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        names.append(f"{name}_{subject or number}")
        task = {
            "task": names[-1],
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
            "test_split": "test",
            **({"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}} if "dev" in splits else {}),
            "output_type": "multiple_choice",
            "doc_to_target": "answer",
            "description": description(subject, scoring),
            **(letter if scoring == "letter" else cloze),
        }
        (folder / f"{name}_{number}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    group = {"group": name, "task": names, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return (name, *names)


def _scores(found: Mapping[str, Any]) -> dict[str, Scores]:
    scores = {}
    for task, row in found["results"].items():
        for name, value in row.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{chosen}")
            better = found["higher_is_better"].get(task, {}).get(metric)
            samples = [one for one in found.get("samples", {}).get(task, ()) if one["filter"] == chosen]
            values = [one.get(metric) for one in samples]
            scores[f"{task}/{metric}" + f"/{chosen}" * (chosen != "none")] = Scores(
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else math.nan,
                n=int(row.get("sample_len") or len(samples)),
                better="neither" if better is None else "higher" if better else "lower",
                unit="share" if metric in SHARES else "",
                per_example=tuple(map(float, values)) if all(isinstance(one, int | float) for one in values) else (),
            )
    return scores


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as error:
        raise UsageError('the harness needs one more package: pip install "lethe-unlearn[eval]"') from error


@contextlib.contextmanager
def _no_copies() -> Iterator[None]:
    """Local data of a task leaves no copy in the user's cache: it may be a forget set."""
    import datasets

    load = datasets.load_dataset
    with tempfile.TemporaryDirectory() as folder:

        def load_dataset(path: str, *args: Any, **settings: Any) -> Any:
            is_local = path in LOCAL_FORMATS or Path(path).exists()
            own = {"cache_dir": folder, "keep_in_memory": True} if is_local else {}
            return load(path, *args, **{**settings, **own})

        try:
            datasets.load_dataset = load_dataset
            yield
        finally:
            datasets.load_dataset = load


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the harness prints, logs and warns of goes nowhere, and its seeds do not outlast it."""
    logger = logging.getLogger("lm_eval")
    level, drawn, counted = logger.level, random.getstate(), np.random.get_state()  # its own source
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL)
            yield
    finally:
        logger.setLevel(level)
        random.setstate(drawn)
        np.random.set_state(counted)
