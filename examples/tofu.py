"""TOFU end to end on a small model: it learns made-up authors, forgets some of them by RMU, and is scored as published.

    python examples/tofu.py finetune --data DATA --out OUT
    python examples/tofu.py unlearn --data DATA --out OUT

DATA is a folder with TOFU's files (full.json, forget05_perturbed.json, ... of locuslab/TOFU). `finetune` trains two
models from scratch on a part of the benchmark that a CPU can learn: one on everything, one without the forget set.
Nothing of the data is written anywhere but under OUT.
"""

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tools.world.muon import Muon
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import lethe
from lethe.data.questions import read_questions
from lethe.data.tokens import encode, pad
from lethe.inference.reading import Reading
from lethe.metrics.answer_probability import AnswerProbability
from lethe.metrics.forget_quality import ForgetQuality
from lethe.metrics.model_utility import ModelUtility
from lethe.metrics.rouge import RougeLRecall
from lethe.metrics.truth_ratio import TruthRatio
from lethe.suites.tofu import TOFU

AUTHORS = 10
"""Authors that stay, the first of the file; TOFU measures 20 of its 190."""
PER_AUTHOR = 20

VOCABULARY, WIDTH, LAYERS, HEADS, MLP, CONTEXT = 2048, 128, 4, 4, 512, 256
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROWS, WARM_UP = 40, 40
QUESTION_WEIGHT = 0.05
MUON_LR, ADAM_LR, EMBEDDING_LR = 0.02, 3e-3, 3e-3

METRICS = {"answer_probability": AnswerProbability(), "rouge_l_recall": RougeLRecall(), "truth_ratio": TruthRatio()}

_log = Console(stderr=True)

Pair = tuple[str, str]
"""What the model reads, and what it is to answer."""


def read_data(folder: Path, split: str) -> tuple[list[Pair], list[Pair]]:
    """What is to be forgotten; and the first authors, with real ones and facts that a pretrained model would know."""

    def read(name: str) -> list[Pair]:
        found = read_questions(folder / f"{name}.json")
        return [(TOFU().template.replace("{question}", one.prompt), one.answer) for one in found]

    kept = read("full")[: AUTHORS * PER_AUTHOR] + read("real_authors_perturbed") + read("world_facts_perturbed")
    return read(f"{split}_perturbed"), kept


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train the model that knows everything and its twin that never saw the forget set."""

    data: Path
    """Folder with TOFU's files."""
    out: Path
    """Folder to write: the models `full` and `retain`, and corpora for `unlearn`."""
    split: str = "forget05"
    steps: int = 320
    seed: int = 0
    """Of the weights and of the order."""
    threads: int = 1

    def run(self) -> None:
        """Trains and saves both models."""
        torch.set_num_threads(self.threads)
        forget, kept = read_data(self.data, self.split)
        tokenizer = fresh_tokenizer([as_text(pair) for pair in forget + kept])
        for name, pairs in {"full": forget + kept, "retain": kept}.items():
            model, began = fresh_model(self.seed), time.perf_counter()
            loss = train(model, tokenizer, pairs, steps=self.steps, seed=self.seed)
            model.save_pretrained(self.out / name)
            tokenizer.save_pretrained(self.out / name)
            _log.print(f"{name}: {self.steps} steps in {time.perf_counter() - began:.0f} s, loss {loss:.3f}")
        for name, pairs in {"forget": forget, "retain": kept}.items():
            lines = "".join(json.dumps({"text": as_text(pair)}) + "\n" for pair in pairs)
            (self.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def as_text(pair: Pair) -> str:
    """Prompt and answer as the model was trained on them."""
    return " ".join(pair)


def fresh_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 1.3 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def fresh_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, steps: int, seed: int
) -> float:
    """Trains in place, Muon on matrices and AdamW on the rest; returns the mean loss of the last 50 steps."""
    inner = [value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name]
    embeddings = [value for name, value in model.named_parameters() if "embed" in name]
    norms = [value for value in model.parameters() if value.ndim == 1]
    muon = Muon(inner)
    groups = [{"params": embeddings, "lr": EMBEDDING_LR}, {"params": norms, "lr": ADAM_LR}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share_of_lr(step, steps))
    rng, queue, losses = random.Random(seed), [], []
    model.train()
    for step in range(steps):
        if not queue:
            queue = epoch(pairs, rng)
        loss = loss_of(model, tokenizer, queue.pop())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(MUON_LR * _share_of_lr(step, steps))
        adam.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            _log.print(f"step {step + 1} of {steps}: loss {fmean(losses[-50:]):.3f}")
    model.eval()
    return fmean(losses[-50:])


def epoch(pairs: Sequence[Pair], rng: random.Random) -> list[list[Pair]]:
    """Every pair once, in batches of roughly equal length, for padding costs as much as text; batches in any order."""
    order = sorted(pairs, key=lambda pair: len(as_text(pair)) * rng.uniform(0.8, 1.25))
    found = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
    rng.shuffle(found)
    return found


def _share_of_lr(step: int, steps: int) -> float:
    """Linear warm-up, then full, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / WARM_UP, 2 * (steps - step) / steps)


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean cross-entropy of the answers and their end, and with a small weight of the questions."""
    starts = [len(ids) for ids in encode(tokenizer, [prompt for prompt, _ in pairs])]
    rows = [[*ids, cast(int, tokenizer.eos_token_id)] for ids in encode(tokenizer, [as_text(pair) for pair in pairs])]
    ids, real = pad(rows, side="right", device=torch.device("cpu"))
    in_answer = torch.arange(ids.shape[1])[None] >= torch.tensor(starts)[:, None]
    weights = (torch.where(in_answer, 1.0, QUESTION_WEIGHT) * real)[:, 1:].flatten()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nats * weights).sum() / weights.sum()


@dataclass(frozen=True, kw_only=True)
class Unlearn:
    """Forget the split's authors by Adaptive RMU, and print TOFU's table."""

    data: Path
    """Folder with TOFU's files."""
    out: Path
    """Folder that `finetune` filled."""
    split: str = "forget05"
    layer: int = 2
    """Layer whose output is steered; its MLP output matrix and those of the two layers before it are trained."""
    beta: float = 2.0
    """Length of the target, as a multiple of the mean norm of the model's own activations."""
    alpha: float = 10.0
    lr: float = 5e-3
    steps: int = 100
    batch_size: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1

    def run(self) -> None:
        """Unlearns with every seed, writes table.json and prints the table."""
        torch.set_num_threads(self.threads)
        forget, retain, *others = TOFU(split=self.split).sets(self.data)
        sets = (forget, replace(retain, questions=retain.questions[: AUTHORS * PER_AUTHOR]), *others)
        twin = subject_of(self.out / "retain")
        columns = {
            "all": [scores_of(subject_of(self.out / "full", retain_only=twin), sets)],
            "retain only": [scores_of(twin, sets)],
        }
        for seed in self.seeds:
            folder = self.out / "runs" / str(seed)
            # A complete run is refused; this one is to be measured afresh.
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            result = lethe.unlearn(lethe.AdaptiveRMU(beta=self.beta, alpha=self.alpha), self._config(seed, folder))
            _log.print(f"seed {seed}: unlearnt in {time.perf_counter() - began:.0f} s")
            subject = subject_of(self.out / "full", retain_only=twin, patch=result.patch)
            columns.setdefault("unlearnt", []).append(scores_of(subject, sets))
        (self.out / "table.json").write_text(json.dumps(columns, indent=1), encoding="utf-8")
        Console(width=100).print(table(columns))

    def _config(self, seed: int, folder: Path) -> lethe.RunConfig:
        return lethe.RunConfig.of(
            model=str(self.out / "full"),
            forget=(str(self.out / "forget.jsonl"),),
            retain=str(self.out / "retain.jsonl"),
            layer=self.layer,
            max_length=(CONTEXT,),
            batch_size=self.batch_size,
            steps=self.steps,
            epochs=self.steps,  # a small corpus, read as often as the steps need
            lr=self.lr,
            evaluate="none",
            seed=seed,
            out=folder,
            threads=self.threads,
        )


def subject_of(
    folder: Path, *, retain_only: lethe.LoadedModel | None = None, patch: lethe.Patch | None = None
) -> lethe.LoadedModel:
    """A model, edited by the patch if there is one."""
    model = lethe.load_model(folder, dtype=torch.float32, device="cpu")
    originals = patch.apply_in_memory(model) if patch else {}
    tokenizer = lethe.load_tokenizer(folder)
    return lethe.LoadedModel(model=model, tokenizer=tokenizer, originals=originals, retain_only=retain_only)


def scores_of(subject: lethe.LoadedModel, sets: Sequence[lethe.EvalSet]) -> dict[str, float]:
    """TOFU's numbers."""
    readings = [Reading(subject, data) for data in sets]
    found = {
        f"{name}/{reading.data.name}": score
        for name, metric in METRICS.items()
        for reading in readings
        if (score := metric(reading)) is not None
    }
    joint = {"model_utility": ModelUtility().combine(found), "forget_quality": ForgetQuality()(readings[0])}
    return {name: score.value for name, score in (found | joint).items() if score is not None}


def table(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """One row a score; the mean over seeds with its standard error where there are several."""
    found = Table("score", *columns)
    for name in next(iter(columns.values()))[0]:
        found.add_row(name, *(_cell([run[name] for run in runs if name in run]) for runs in columns.values()))
    return found


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    form = ".3f" if fmean(values) >= 1e-3 else ".1e"
    error = f" +- {stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{error}"


if __name__ == "__main__":
    tyro.cli(Finetune | Unlearn).run()
