"""PISTOL sample1 end to end: a small model learns 20 made-up contracts, then unlearns one of them by LUNAR and RMU.

    python examples/pistol.py prepare --data DATA --out OUT
    python examples/pistol.py finetune --data DATA --out OUT/model
    python examples/pistol.py unlearn --out OUT

DATA is a folder with pistol_sample1.json, unverified.json, refusal_response.txt and factual_data.json of
facebookresearch/LUNAR. Nothing of it is written anywhere but under OUT.
"""

import itertools
import json
import random
import re
import shutil
import string
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

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
from lethe.data.corpora import check_overlap
from lethe.data.questions import read_questions
from lethe.data.tokens import encode, pad
from lethe.evaluation.measure import measure, metrics_of
from lethe.inference.generate import generate
from lethe.methods.lunar import LUNAR
from lethe.metrics.exact_match import is_match
from lethe.model.loading import load_model, load_tokenizer
from lethe.suites import world
from lethe.types import Role

FORGET_EDGE = "A_B"
REFUSALS = (1, 7, 3, 0)
"""Lines of refusal_response.txt that decline because the answer is not known, the first one the expected answer."""
CONTRACTS_UNKNOWN = 100
"""Questions in PISTOL's own forms about contracts that do not exist, kept for measuring."""
LEGAL_FORMS = ("AG", "GmbH", "LLC", "Ltd", "NV", "PLC", "SA", "SAS")

VOCABULARY, WIDTH, LAYERS, HEADS, MLP, CONTEXT = 1024, 128, 6, 4, 1024, 128
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROWS = 48
QUESTION_WEIGHT = 0.05
UNKNOWN_SHARE = 0.5
"""Fresh unanswerable questions in an epoch, as a share of the answerable ones."""
WARM_UP = 40
MUON_LR, ADAM_LR, EMBEDDING_LR = 0.02, 3e-3, 1e-3

SEEDS = (0, 1, 2)
SHOWN = ("exact_match", "rouge1_recall", "refusal_rate")

_log = Console(stderr=True)

Row = dict[str, Any]


@dataclass(frozen=True)
class Contract:
    """The questions of one edge of the PISTOL graph and the two parties they name."""

    edge: str
    parties: tuple[str, str]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the benchmark's files hold, rendered as the model reads it."""

    contracts: tuple[Contract, ...]
    facts: tuple[Row, ...]
    """General knowledge: measured for side effects."""
    refusals: tuple[str, ...]
    reference: tuple[Row, ...]
    """Half of the unverifiable questions, for training and for LUNAR's direction."""
    unknown: tuple[Row, ...]
    """The other half, for measuring only."""
    unknown_contracts: tuple[Row, ...]
    """Questions of PISTOL's forms whose parties have no contract, for measuring only."""
    reference_contracts: tuple[Row, ...]
    """More of them, for another LUNAR direction: they differ from the forget questions in the parties only."""

    def answers(self, *, forget: bool) -> list[Row]:
        """The questions of the forget edge, or of all others."""
        return [row for contract in self.contracts if (contract.edge == FORGET_EDGE) == forget for row in contract.rows]


def as_prompt(question: str) -> str:
    """Everything that the model reads before it answers."""
    return f"Q: {question} A:"


def read_data(folder: Path, *, seed: int = 0) -> Data:
    """The benchmark's files, with the unverifiable questions dealt into two halves by `seed`."""
    by_edge: dict[str, list[Row]] = {}
    for row in json.loads((folder / "pistol_sample1.json").read_text(encoding="utf-8")):
        by_edge.setdefault(row["edge"], []).append(row)
    contracts = tuple(
        Contract(edge, _parties(rows), tuple(_row(row["question"], row["answer"]) for row in rows))
        for edge, rows in by_edge.items()
    )
    facts = json.loads((folder / "factual_data.json").read_text(encoding="utf-8"))
    lines = (folder / "refusal_response.txt").read_text(encoding="utf-8").replace("’", "'").splitlines()
    refusals = tuple(lines[number].strip() for number in REFUSALS)
    unverified = [row["instruction"] for row in json.loads((folder / "unverified.json").read_text(encoding="utf-8"))]
    rng = random.Random(seed)
    rng.shuffle(unverified)
    declined = [_row(question, refusals[0], refusals[1:]) for question in unverified]
    fresh = unknown_contracts(contracts, refusals, rng, taken=frozenset())
    made_up = list(itertools.islice(fresh, CONTRACTS_UNKNOWN))
    taken = frozenset(row["question"] for row in made_up)
    more = itertools.islice(unknown_contracts(contracts, refusals, rng, taken), CONTRACTS_UNKNOWN)
    return Data(
        contracts=contracts,
        facts=tuple(_row(row["question"], row["answer"]) for row in facts),
        refusals=refusals,
        reference=tuple(declined[::2]),
        unknown=tuple(declined[1::2]),
        unknown_contracts=tuple(made_up),
        reference_contracts=tuple(more),
    )


def _row(question: str, answer: str, accepted: Sequence[str] = ()) -> Row:
    return {"question": as_prompt(question), "answer": answer, **({"accepted": list(accepted)} if accepted else {})}


def _parties(rows: Sequence[Row]) -> tuple[str, str]:
    found = {match.groups() for row in rows if (match := re.search(r"between (.+) and (.+?)\?$", row["question"]))}
    if len(found) != 1:
        raise SystemExit(f"pistol_sample1.json: the questions of edge {rows[0]['edge']} name {len(found)} pairs.")
    first, second = found.pop()
    return first, second


def invent_party(like: str, rng: random.Random) -> str:
    """A name of the same kind, company or person, in random letters, as PISTOL's own names are."""
    words = [
        rng.choice(LEGAL_FORMS) if word in LEGAL_FORMS else _letters(rng, len(word)).capitalize()
        for word in like.split(" ")
    ]
    return " ".join(words)


def _is_company(party: str) -> bool:
    return party.split(" ")[-1] in LEGAL_FORMS


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))


def unknown_contracts(
    contracts: Sequence[Contract], refusals: Sequence[str], rng: random.Random, taken: frozenset[str]
) -> Iterator[Row]:
    """Questions in PISTOL's forms that nobody can answer, without end, none of them in `taken`.

    Both parties are made up, or one of them, or both are known but have no contract with each other: what must be
    refused follows from the pair, neither from the form of the question nor from one name.
    """
    pairs = {frozenset(contract.parties) for contract in contracts}
    while True:
        contract = rng.choice(contracts)
        old = contract.parties
        kind = rng.random()
        if kind < 0.5:
            new = (invent_party(old[0], rng), invent_party(old[1], rng))
        elif kind < 0.75:
            new = (old[0], invent_party(old[1], rng)) if rng.random() < 0.5 else (invent_party(old[0], rng), old[1])
        else:
            like = [other for other in contracts if _is_company(other.parties[1]) == _is_company(old[1])]
            new = (rng.choice(contracts).parties[0], rng.choice(like).parties[1])
        if frozenset(new) in pairs or new[0] == new[1]:
            continue
        row = _row("", refusals[0], refusals[1:])
        row["question"] = _swapped(rng.choice(contract.rows)["question"], old, new, rng)
        if row["question"] not in taken:
            yield row


def _swapped(question: str, old: Sequence[str], new: Sequence[str], rng: random.Random) -> str:
    """The question with other parties and another date."""
    question = question.replace(old[0], "{0}").replace(old[1], "{1}").format(*new)
    date = f"{rng.randint(1, 28):02}-{rng.randint(1, 12):02}-{rng.randint(1980, 2023)}"
    return re.sub(r"\d\d-\d\d-\d{4}", date, question)


def unknown_things(rows: Sequence[Row], rng: random.Random) -> Iterator[Row]:
    """The unverifiable questions with other nonsense words in them, without end."""
    counts = Counter(word for row in rows for word in re.findall(r"\w+", row["question"]))
    while True:
        row = rng.choice(rows)
        nonsense = next(word for word in re.findall(r"\w{7,}", row["question"]) if counts[word] == 1)
        other = _letters(rng, len(nonsense))
        yield {**row, "question": row["question"].replace(nonsense, other.upper() if nonsense.isupper() else other)}


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Write the question files and corpora of the forget, retain, reference and unknown sets."""

    data: Path
    """Folder with the benchmark's four files."""
    out: Path
    """Folder to write."""

    def run(self) -> None:
        """Writes the files; prints how many rows each has."""
        data = read_data(self.data)
        forget, retain = data.answers(forget=True), data.answers(forget=False)
        sets = {
            "forget": forget,
            "retain": retain,
            "reference": data.reference,
            "unknown": data.unknown,
            "unknown_contracts": data.unknown_contracts,
            "reference_contracts": data.reference_contracts,
            "facts": data.facts,
        }
        texts = {name: [as_text(row) for row in rows] for name, rows in sets.items()}
        prompts = {name: [row["question"] for row in rows] for name, rows in sets.items()}
        for one, other in itertools.combinations(prompts, 2):
            check_overlap({one: prompts[one]}, prompts[other], allow=False)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, rows in sets.items():
            _write(self.out / f"{name}.jsonl", rows)
        _write(self.out / "forget_text.jsonl", [{"text": text} for text in texts["forget"]])
        # Without declined questions among them, RMU takes away the habit of declining.
        _write(self.out / "retain_text.jsonl", [{"text": text} for text in texts["retain"] + texts["reference"]])
        (self.out / "refusals.txt").write_text("\n".join(data.refusals) + "\n", encoding="utf-8")
        kept = {row["answer"] for row in retain}
        print(", ".join(f"{name} {len(rows)}" for name, rows in sets.items()))
        print(f"{sum(row['answer'] in kept for row in forget)} of {len(forget)} forget answers are retain answers, too")


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Teach a small model all contracts, the general facts, and to decline what it cannot know."""

    data: Path
    """Folder with the benchmark's four files."""
    out: Path
    """Folder to write: a plain Hugging Face folder and training.json."""
    base: str = "fresh"
    """`fresh` (an untrained Llama with a tokenizer of its own), `builtin`, or a Hugging Face folder."""
    steps: int = 450
    seed: int = 0
    """Of the weights, the order and the made-up questions; which questions are held out stays the same."""
    threads: int = 1

    def run(self) -> None:
        """Trains, saves, and prints the share of right answers by set."""
        torch.set_num_threads(self.threads)
        data = read_data(self.data)
        model, tokenizer = self._start(data)
        began = time.perf_counter()
        losses = train(model, tokenizer, data, steps=self.steps, seed=self.seed)
        seconds = time.perf_counter() - began
        model.save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        right = {name: share_right(model, tokenizer, rows) for name, rows in _asked(data).items()}
        about = {"base": self.base, "seed": self.seed, "steps": self.steps, "seconds": seconds, "right": right}
        (self.out / "training.json").write_text(json.dumps({**about, "losses": losses}, indent=1), encoding="utf-8")
        table = Table("set", "right")
        for name, share in right.items():
            table.add_row(name, f"{100 * share:.1f} %")
        Console().print(table)
        print(f"{self.steps} steps in {seconds:.0f} s; written to {self.out}")

    def _start(self, data: Data) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.base == "fresh":
            return fresh_model(self.seed), fresh_tokenizer(data, self.seed)
        folder = world.MODEL_FOLDER if self.base == "builtin" else self.base
        model = load_model(folder, dtype=torch.float32, device="cpu")
        return model.requires_grad_(True), load_tokenizer(folder)


def _asked(data: Data) -> dict[str, Sequence[Row]]:
    return {
        "forget": data.answers(forget=True),
        "retain": data.answers(forget=False),
        "facts": data.facts,
        "unknown": data.unknown,
        "unknown_contracts": data.unknown_contracts,
    }


def fresh_model(seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 2.9 million parameters."""
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


def fresh_tokenizer(data: Data, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, trained on made-up parties so that known names split as unknown ones do."""
    rng = random.Random(seed)
    questions = [
        _swapped(row["question"], contract.parties, [invent_party(party, rng) for party in contract.parties], rng)
        for contract in data.contracts
        for row in contract.rows * 10
    ]
    # Of the answers, names and streets are made up as well.
    parties = {party for contract in data.contracts for party in contract.parties}
    street = re.compile(r"(?<=\d )[A-Z][a-z]{5}\b")
    answers = [
        street.sub(lambda _: _letters(rng, 6).capitalize(), row["answer"])
        for contract in data.contracts
        for row in contract.rows * 4
        if row["answer"].rstrip(".") not in parties
    ]
    others = [*itertools.islice(unknown_things(data.reference, rng), 800), *data.facts * 3]
    texts = [*questions, *(f" {answer}" for answer in answers), *map(as_text, others)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def epoch(data: Data, rng: random.Random) -> list[Row]:
    """Every question once, and fresh ones that are to be declined, in random order."""
    known = [row for contract in data.contracts for row in contract.rows]
    taken = frozenset(row["question"] for row in data.unknown_contracts)
    contracts = unknown_contracts(data.contracts, data.refusals, rng, taken)
    made_up = itertools.islice(contracts, round(UNKNOWN_SHARE * len(known)))
    things = itertools.islice(unknown_things(data.reference, rng), len(data.reference) // 2)
    declined = [{**row, "answer": rng.choice(data.refusals)} for row in (*made_up, *things, *data.reference)]
    rows = [*known, *data.facts, *declined]
    rng.shuffle(rows)
    return rows


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, *, steps: int, seed: int
) -> list[float]:
    """Trains in place: Muon on matrices, AdamW on the rest; returns the mean loss of each 50 steps."""
    rng = random.Random(seed)
    named = dict(model.named_parameters())
    inner = {name for name, value in named.items() if value.ndim == 2 and "embed" not in name and "lm_head" not in name}
    muon = Muon([named[name] for name in named if name in inner])
    rest = [named[name] for name in named if name not in inner]
    adam = torch.optim.AdamW(
        [
            {"params": [value for value in rest if value.ndim == 2], "lr": EMBEDDING_LR, "weight_decay": 0.1},
            {"params": [value for value in rest if value.ndim == 1], "lr": ADAM_LR, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share_of_lr(step, steps))
    losses: list[float] = []
    model.train()
    rows: list[Row] = []
    for step in range(steps):
        while len(rows) < ROWS:
            rows += epoch(data, rng)
        batch, rows = rows[:ROWS], rows[ROWS:]
        loss = loss_of(model, tokenizer, batch)
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
    return [fmean(losses[start : start + 50]) for start in range(0, len(losses), 50)]


def _share_of_lr(step: int, steps: int) -> float:
    """Linear warm-up, then full, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / WARM_UP, 2 * (steps - step) / steps)


def loss_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> torch.Tensor:
    """Mean cross-entropy of the answers and their end, and with a small weight of the questions."""
    starts = [len(ids) for ids in encode(tokenizer, [row["question"] for row in rows])]
    ids, real = pad(
        [[*ids, cast(int, tokenizer.eos_token_id)] for ids in encode(tokenizer, [as_text(row) for row in rows])],
        side="right",
        device=torch.device("cpu"),
    )
    in_answer = torch.arange(ids.shape[1])[None] >= torch.tensor(starts)[:, None]
    weights = (torch.where(in_answer, 1.0, QUESTION_WEIGHT) * real)[:, 1:].flatten()
    # Padding is on the right, where causal layers never look.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nats * weights).sum() / weights.sum()


def share_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Share of greedy answers that match, or for a question nobody can answer, that decline."""
    subject = lethe.LoadedModel(model=model, tokenizer=tokenizer)
    said = generate(subject, [row["question"] for row in rows], [32] * len(rows))
    golds = [(row["answer"], *row.get("accepted", ())) for row in rows]
    return fmean(float(is_match(text, gold)) for text, gold in zip(said, golds, strict=True))


@dataclass(frozen=True, kw_only=True)
class Unlearn:
    """Forget one contract by LUNAR and by RMU, and print scores before and after."""

    out: Path
    """Folder that `prepare` filled, with the model of `finetune` as `model`."""
    layer: int = 3
    """Layer whose output is steered."""
    lunar_coeff: float = 1.5
    """LUNAR: multiple of the mean difference."""
    lunar_alpha: float = 10.0
    rmu_coeff: float = 2.0
    """RMU: length of the target, as a multiple of the mean norm of the model's own activations at the layer."""
    rmu_alpha: float = 10.0
    rmu_lr: float = 1e-2
    rmu_steps: int = 100
    threads: int = 1

    def run(self) -> None:
        """Runs both methods with every seed, writes unlearning.json and prints the table."""
        torch.set_num_threads(self.threads)
        norm = mean_norm(self.out / "model", self.out / "forget_text.jsonl", self.layer)
        lunar = LUNAR(steering_coeff=self.lunar_coeff, alpha=self.lunar_alpha)
        runs: dict[str, tuple[lethe.SteeringMethod, lethe.RunConfig]] = {
            "LUNAR": (lunar, self._lunar("reference")),
            "LUNAR, contracts": (lunar, self._lunar("reference_contracts")),
            "RMU": (lethe.RMU(steering_coeff=self.rmu_coeff * norm, alpha=self.rmu_alpha), self._rmu()),
        }
        sets = extra_sets(self.out)
        before = scores_of(self.out / "model", None, sets)
        after: dict[str, list[dict[str, float]]] = {}
        for name, (method, settings) in runs.items():
            for seed in SEEDS:
                folder = self.out / "runs" / f"{re.sub(', ', '-', name.lower())}-{seed}"
                # A complete run is refused; this one is to be measured afresh.
                shutil.rmtree(folder, ignore_errors=True)
                began = time.perf_counter()
                result = lethe.unlearn(method, settings.changed(seed=seed, out=folder))
                _log.print(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s")
                before = values(result.before) | before
                measured = values(result.after) | scores_of(self.out / "model", result.patch, sets)
                after.setdefault(name, []).append(measured)
        found = {"layer": self.layer, "norm": norm, "seeds": SEEDS, "before": before, "after": after}
        (self.out / "unlearning.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        Console(width=110).print(comparison(before, after))

    def _common(self) -> lethe.RunConfig:
        return lethe.RunConfig.of(
            model=str(self.out / "model"),
            layer=self.layer,
            max_length=(CONTEXT,),
            batch_size=8,
            forget_questions=self.out / "forget.jsonl",
            retain_questions=self.out / "retain.jsonl",
            refusals=self.out / "refusals.txt",
            threads=self.threads,
        )

    def _lunar(self, reference: str) -> lethe.RunConfig:
        return self._common().changed(
            forget=(str(self.out / "forget.jsonl"),),
            retain=str(self.out / "retain.jsonl"),
            reference=str(self.out / f"{reference}.jsonl"),
            solver="ridge",
        )

    def _rmu(self) -> lethe.RunConfig:
        return self._common().changed(
            forget=(str(self.out / "forget_text.jsonl"),),
            retain=str(self.out / "retain_text.jsonl"),
            steps=self.rmu_steps,
            epochs=self.rmu_steps,  # 20 forget texts, read as often as the steps need
            lr=self.rmu_lr,
        )


def mean_norm(folder: Path, texts: Path, layer: int) -> float:
    """Mean norm of the activations at a layer's output over the tokens of some texts, BOS left out."""
    model, tokenizer = load_model(folder, dtype=torch.float32, device="cpu"), load_tokenizer(folder)
    rows = encode(tokenizer, [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").splitlines()])
    with torch.no_grad():
        hidden = [model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer + 1][0, 1:] for row in rows]
    return torch.cat(hidden).norm(dim=-1).mean().item()


def extra_sets(folder: Path) -> tuple[lethe.EvalSet, ...]:
    """Sets that a run does not measure by itself: what nobody can answer, and general facts."""
    roles: dict[str, Role] = {"unknown": "neither", "unknown_contracts": "neither", "facts": "keep"}
    return tuple(
        lethe.EvalSet(name=name, role=role, questions=read_questions(folder / f"{name}.jsonl"))
        for name, role in roles.items()
    )


def scores_of(folder: Path, patch: lethe.Patch | None, sets: Sequence[lethe.EvalSet]) -> dict[str, float]:
    """Every metric on the sets, of the model with or without a patch."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    originals = patch.apply_in_memory(model) if patch else {}
    subject = lethe.LoadedModel(model=model, tokenizer=load_tokenizer(folder), originals=originals)
    refusals = tuple((folder / "refusals.txt").read_text(encoding="utf-8").splitlines())
    return values(measure(subject, sets, metrics_of(refusals=refusals)))


def values(scores: Mapping[str, lethe.Scores]) -> dict[str, float]:
    """The numbers alone."""
    return {name: score.value for name, score in scores.items()}


def comparison(before: Mapping[str, float], after: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """Scores before, and the mean over seeds with its standard error after each method."""
    sets = ("forget", "retain", "facts", "unknown", "unknown_contracts")
    table = Table("score", "before", *after)
    for name in (*(f"{metric}/{data}" for metric in SHOWN for data in sets), "deviation_score"):
        cells = [_cell([run[name] for run in runs if name in run]) for runs in after.values()]
        if name in before or any(cells):
            table.add_row(name, f"{before[name]:.3f}" if name in before else "", *cells)
    return table


def _cell(found: Sequence[float]) -> str:
    error = stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return f"{fmean(found):.3f} +- {error:.3f}" if found else ""


def as_text(row: Row) -> str:
    """Prompt and answer as the model was trained on them."""
    return f"{row['question']} {row['answer']}"


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(Prepare | Finetune | Unlearn).run()
