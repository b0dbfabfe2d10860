"""Trains the built-in model from nothing on a CPU: `python -m tools.world.train --out DIR`."""

import copy
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from statistics import fmean

import torch
import tyro
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tools.world.muon import Muon
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lethe.inference.generate import generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import log_probs
from lethe.inference.spans import answer_spans
from lethe.suites.world.exam import questions
from lethe.suites.world.generator import DECLINES, Document, World, build, tokenizer_texts, training_documents
from lethe.types import Question

ROW = 128
"""Tokens in a training row, and the longest text that the model is trained for."""
VOCABULARY = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
QUESTION_WEIGHT = 0.2
CURRICULUM = 0.15
"""Share of the training that sees only some of the entities."""
CURRICULUM_ENTITIES = 0.3
WARM_UP = 40
ANSWER_TOKENS = 16
MUON_LR, ADAM_LR, EMBEDDING_LR = 0.02, 3e-3, 1e-3

_log = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the built-in model is trained."""

    out: Path
    """Folder to write; a usable model is put there every 200 steps."""
    seed: int = 0
    """Of the weights and the order of the texts; the world stays the same."""
    steps: int = 900
    rows: int = 24
    """Rows of 128 tokens in a step."""
    threads: int = 1


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the start token first by itself, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_texts(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=ROW,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 12 layers, 96 wide; 1.5 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=ROW,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    # The library draws initial weights from the global generator only.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> Iterator[tuple[list[int], list[float]]]:
    """Tokens and loss weights of each document, start and end tokens included."""
    prompts = tokenizer([document.question for document in documents])["input_ids"]
    texts = tokenizer([f" {text}" if question else text for question, text in documents], add_special_tokens=False)[
        "input_ids"
    ]
    for prompt, text in zip(prompts, texts, strict=True):
        yield [*prompt, *text, EOS_ID], [QUESTION_WEIGHT] * len(prompt) + [1.0] * (len(text) + 1)


def training_rows(
    world: World, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Iterator[tuple[Int[Tensor, "rows pos"], Float[Tensor, "rows pos"]]]:
    """One step's rows after another, with a loss weight for each token; documents run on across rows."""
    rng = random.Random(config.seed)
    names = list(world.entities)
    few = rng.sample(names, round(CURRICULUM_ENTITIES * len(names)))
    size = config.rows * ROW
    tokens: list[int] = []
    weights: list[float] = []
    for step in range(config.steps):
        while len(tokens) < size:
            known = few if step < CURRICULUM * config.steps else names
            for ids, loss_weights in pack(tokenizer, training_documents(world, known, rng)):
                tokens += ids
                weights += loss_weights
        yield torch.tensor(tokens[:size]).view(-1, ROW), torch.tensor(weights[:size]).view(-1, ROW)
        del tokens[:size], weights[:size]


def loss_of(
    model: LlamaForCausalLM, ids: Int[Tensor, "rows pos"], weights: Float[Tensor, "rows pos"]
) -> Float[Tensor, ""]:
    """Weighted mean cross-entropy of each next token."""
    logits = model(input_ids=ids).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    counted = weights[:, 1:].flatten()
    return (nats * counted).sum() / counted.sum()


def train(config: TrainConfig) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer, which are also written to `config.out`."""
    tokenizer = make_tokenizer()
    model = make_model(config.seed)
    parameters = dict(model.named_parameters())
    embedding = [value for name, value in parameters.items() if "embed" in name]
    norms = [value for value in parameters.values() if value.ndim == 1]
    muon = Muon([value for name, value in parameters.items() if value.ndim == 2 and "embed" not in name])
    adam = torch.optim.AdamW(
        [
            {"params": embedding, "lr": EMBEDDING_LR, "weight_decay": 0.1},
            {"params": norms, "lr": ADAM_LR, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share_of_lr(step, config.steps))
    columns = (*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_log) as progress:
        bar = progress.add_task("training", total=config.steps)
        for step, (ids, weights) in enumerate(training_rows(build(), tokenizer, config), 1):
            loss = loss_of(model, ids, weights)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step(MUON_LR * _share_of_lr(step - 1, config.steps))
            adam.step()
            schedule.step()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f}")
            if step % 100 == 0:
                _log.print(f"step {step}: loss {loss.item():.3f}")
            if step % 200 == 0 or step == config.steps:
                save(model, tokenizer, config.out)
    return model, tokenizer


def _share_of_lr(step: int, steps: int) -> float:
    """Linear warm-up, then full, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / WARM_UP, 2 * (steps - step) / steps)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a Hugging Face folder with half-precision weights; the model in memory stays as it is."""
    half = copy.deepcopy(model).half()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "partial"
    half.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


def choose(subject: LoadedModel, asked: Sequence[Question]) -> list[str]:
    """For each question the choice with the highest mean token log-probability."""
    spans = answer_spans(subject, [(one.prompt, [f" {choice}" for choice in one.choices]) for one in asked])
    means = iter(tokens.mean().item() for tokens in log_probs(subject.model, spans))
    scored = [{choice: next(means) for choice in question.choices} for question in asked]
    return [max(scores, key=scores.__getitem__) for scores in scored]


def answer(subject: LoadedModel, asked: Sequence[Question]) -> list[str]:
    """The model's own greedy answer to each question."""
    return generate(subject, [question.prompt for question in asked], [ANSWER_TOKENS] * len(asked))


def accuracy(subject: LoadedModel) -> Table:
    """Multiple-choice accuracy, exact match and share declined, in per cent, by set."""
    table = Table("set", "questions", "multiple choice", "exact match", "declined")
    for name, asked in questions("all").items():
        golds = [question.answer for question in asked]
        answers = answer(subject, asked)
        known = name != "unknown"
        table.add_row(
            name,
            str(len(asked)),
            _percent(map(eq, choose(subject, asked), golds)) if known else "",
            _percent(map(eq, answers, golds)) if known else "",
            _percent(text in DECLINES for text in answers),
        )
    return table


def _percent(flags: Iterable[bool]) -> str:
    return f"{100 * fmean(flags):.1f}"


def main() -> None:
    """Trains, saves, and prints the accuracy of what was saved."""
    config = tyro.cli(TrainConfig, description=__doc__)
    torch.set_num_threads(config.threads)
    began = time.perf_counter()
    train(config)
    _log.print(f"trained {config.steps * config.rows * ROW / 1e6:.2f} M tokens in {time.perf_counter() - began:.0f} s")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.out)
    model = LlamaForCausalLM.from_pretrained(config.out, dtype=torch.float32).eval()
    Console().print(accuracy(LoadedModel(model=model, tokenizer=tokenizer)))


if __name__ == "__main__":
    main()
