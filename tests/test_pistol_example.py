"""The PISTOL example: what it makes of the benchmark's files, and that its trainer learns."""

import importlib.util
import itertools
import random
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lethe.data.questions import read_questions
from lethe.data.tokens import encode

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "lunar"

pytestmark = pytest.mark.skipif(
    not (DATA / "pistol_sample1.json").is_file(), reason=f"the PISTOL data is not in {DATA}"
)


@pytest.fixture(scope="module")
def pistol():
    spec = importlib.util.spec_from_file_location("pistol_example", ROOT / "examples" / "pistol.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(pistol):
    return pistol.read_data(DATA)


@pytest.fixture(scope="module")
def tokenizer(pistol, data):
    return pistol.fresh_tokenizer(data, seed=0)


def test_prepared_files_are_question_files_of_the_published_sizes_that_share_no_prompt(pistol, tmp_path):
    pistol.Prepare(data=DATA, out=tmp_path).run()
    names = ("forget", "retain", "reference", "unknown", "unknown_contracts", "reference_contracts", "facts")
    prompts = {name: [question.prompt for question in read_questions(tmp_path / f"{name}.jsonl")] for name in names}
    assert {name: len(found) for name, found in prompts.items()} == {
        "forget": 20,
        "retain": 380,
        "reference": 100,
        "unknown": 99,
        "unknown_contracts": 100,
        "reference_contracts": 100,
        "facts": 169,
    }
    every = [prompt for found in prompts.values() for prompt in found]
    assert len(set(every)) == len(every)
    assert all(prompt.startswith("Q: ") and prompt.endswith(" A:") for prompt in every)
    assert len((tmp_path / "refusals.txt").read_text().splitlines()) == len(pistol.REFUSALS)


def test_a_forget_prompt_among_the_retain_prompts_is_refused(pistol, data, tmp_path, monkeypatch):
    twice = (*data.contracts, pistol.Contract("A_B2", data.contracts[0].parties, data.contracts[0].rows))
    monkeypatch.setattr(pistol, "read_data", lambda folder: pistol.Data(**{**vars(data), "contracts": twice}))
    with pytest.raises(pistol.lethe.LetheError, match="20 forget texts found in the retain corpus"):
        pistol.Prepare(data=DATA, out=tmp_path / "out").run()
    assert not (tmp_path / "out").exists()


def test_every_unknown_contract_names_two_parties_that_have_none(pistol, data):
    known = [contract.parties for contract in data.contracts]
    every = {row["question"] for contract in data.contracts for row in contract.rows}
    rows = list(
        itertools.islice(pistol.unknown_contracts(data.contracts, data.refusals, random.Random(0), frozenset()), 2000)
    )
    assert not [row for row in rows if row["question"] in every]
    assert not [row for row in rows if any(a in row["question"] and b in row["question"] for a, b in known)]
    named = [sum(any(party in row["question"] for party in pair) for pair in known) > 0 for row in rows]
    assert 0.3 < fmean(named) < 0.6


def test_unknown_questions_for_training_are_fresh_by_seed_and_avoid_those_for_measuring(pistol, data):
    held_out = {row["question"] for row in (*data.unknown, *data.unknown_contracts)}
    first, again, other = (pistol.epoch(data, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again
    declined = [{row["question"] for row in rows if "accepted" in row} for rows in (first, other)]
    assert not (declined[0] | declined[1]) & held_out
    fresh = [found - {row["question"] for row in data.reference} for found in declined]
    assert len(fresh[0] & fresh[1]) < 0.1 * len(fresh[0])


def test_a_name_tells_by_its_tokens_neither_that_it_is_known_nor_that_it_is_not(pistol, data, tokenizer):
    known = sorted({party for contract in data.contracts for party in contract.parties})
    rng = random.Random(0)
    made_up = [pistol.invent_party(party, rng) for party in known * 50]
    lengths = [fmean(map(len, encode(tokenizer, [f" {name}" for name in names]))) for names in (known, made_up)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_a_prompt_is_a_beginning_of_prompt_and_answer_in_tokens_too(pistol, data, tokenizer):
    rows = [*data.answers(forget=True), *data.answers(forget=False), *data.facts, *data.reference]
    prompts = encode(tokenizer, [row["question"] for row in rows])
    texts = encode(tokenizer, [pistol.as_text(row) for row in rows])
    assert all(text[: len(prompt)] == prompt for prompt, text in zip(prompts, texts, strict=True))
    assert max(map(len, texts)) < pistol.CONTEXT


def test_training_lowers_the_loss_and_repeats_itself(pistol, data, tokenizer, monkeypatch):
    monkeypatch.setattr(pistol, "ROWS", 8)
    monkeypatch.setattr(pistol, "WARM_UP", 5)
    monkeypatch.setattr(pistol, "EMBEDDING_LR", 1e-2)

    def trained():
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=pistol.CONTEXT,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        losses = pistol.train(model, tokenizer, data, steps=60, seed=0)
        return losses, model.state_dict()

    losses, weights = trained()
    again, same = trained()
    assert losses[1] < losses[0] - 0.5
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_only_answers_and_their_end_weigh_fully(pistol, data, tokenizer):
    class AlwaysEnds(torch.nn.Module):
        """Sure everywhere that the text ends."""

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., tokenizer.eos_token_id] = 50.0
            return type("Output", (), {"logits": logits})

    row = data.answers(forget=True)[6]
    prompt, text = (encode(tokenizer, [asked])[0] for asked in (row["question"], pistol.as_text(row)))
    asked, answered = len(prompt) - 1, len(text) - len(prompt)
    wrong = pistol.QUESTION_WEIGHT * asked + answered
    expected = 50 * wrong / (wrong + 1)
    assert pistol.loss_of(AlwaysEnds(), tokenizer, [row]).item() == pytest.approx(expected, rel=1e-5)


def test_the_table_shows_mean_and_standard_error_over_seeds(pistol):
    before = {"exact_match/forget": 1.0, "exact_match/retain": 0.995}
    after = {
        "LUNAR": [{"exact_match/forget": value, "deviation_score": 5.0} for value in (0.0, 0.1, 0.2)],
        "RMU": [{"exact_match/retain": 0.9}],
    }
    table = pistol.comparison(before, after)
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("exact_match/forget", "1.000", "0.100 +- 0.058", ""),
        ("exact_match/retain", "0.995", "", "0.900 +- 0.000"),
        ("deviation_score", "", "5.000 +- 0.000", ""),
    ]
