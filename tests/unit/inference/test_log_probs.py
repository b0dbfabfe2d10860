"""Batched scoring against a plain loop over single rows."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lethe.data.tokens import encode
from lethe.errors import DivergedError
from lethe.inference.generate import continue_prompts, generate
from lethe.inference.loaded_model import LoadedModel
from lethe.inference.log_probs import batches, log_probs, measuring, read_spans
from lethe.inference.reading import Reading, free_form
from lethe.inference.spans import Span, answer_spans, encode_texts, prompt_and_answers
from lethe.types import EvalSet, Question, mean_scores
from rigged_models import forget_set, retain_set

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE = "Ġ"
BOS, EOS = 0, 1
VOCABULARY = {
    name: index for index, name in enumerate(["<s>", "</s>", *ALPHABET, *(SPACE + letter for letter in "ABCD"), "an"])
}


def tiny_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Bytes, and one token each for " A" to " D" and "an"."""
    merges = [(SPACE, letter) for letter in "ABCD"] + [("a", "n")]
    raw = Tokenizer(models.BPE(vocab=VOCABULARY, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>" if bos else None, eos_token="</s>")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=96,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", params=["llama with BOS", "gpt2 without"])
def subject(request: pytest.FixtureRequest) -> LoadedModel:
    if request.param == "gpt2 without":
        return LoadedModel(model=tiny_gpt2(), tokenizer=tiny_tokenizer(bos=False))
    return LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))


def reciter(tokens: list[str]) -> LoadedModel:
    """A Llama that follows each token by the next one: layers that add nothing, one-hot embeddings, a rigged head."""
    width = 264
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(VOCABULARY), width))
        model.lm_head.weight.zero_()
        for last, following in pairwise(tokens):
            model.lm_head.weight[VOCABULARY[following], VOCABULARY[last]] = 1.0
    return LoadedModel(model=model, tokenizer=tiny_tokenizer(bos=True))


def pair_spans(subject: LoadedModel, pairs: Sequence[tuple[str, str]]) -> list[Span]:
    return answer_spans(subject, [(prompt, (answer,)) for prompt, answer in pairs])


def answers(subject: LoadedModel, data: EvalSet, **settings: int) -> list[tuple[str, ...]]:
    return Reading(subject, data, **settings).answers


PROMPTS = (
    "Who wrote it? Answer:",
    "x",
    "The name of the river is",
    "A much longer question, on two\nlines. Answer:",
    "an",
)
PAIRS = tuple((prompt, answer) for prompt in PROMPTS for answer in (" A", " B", " Anna went", " by", "banana"))


def naive_log_probs(model: PreTrainedModel, span: Span) -> Tensor:
    with torch.no_grad():
        table = model(torch.tensor([span.ids])).logits[0].log_softmax(-1)
    return torch.stack([table[place - 1, span.ids[place]] for place in range(span.start, len(span.ids))])


def naive_greedy(subject: LoadedModel, prompt: str, count: int) -> str:
    ids = encode(subject.tokenizer, [prompt])[0]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            following = int(subject.model(torch.tensor([ids])).logits[0, -1].argmax())
        if following == EOS:
            break
        ids.append(following)
    return subject.tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0].strip()


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 4096])
def test_log_probs_equal_a_loop_over_single_rows(subject: LoadedModel, tokens_per_batch: int) -> None:
    spans = pair_spans(subject, PAIRS)
    found = log_probs(subject.model, spans, tokens_per_batch=tokens_per_batch)
    assert len(found) == len(PAIRS)
    for span, values in zip(spans, found, strict=True):
        torch.testing.assert_close(values, naive_log_probs(subject.model, span), rtol=0, atol=1e-5)


def test_pairs_are_tokenised_together() -> None:
    subject = LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))
    of = VOCABULARY
    spans = pair_spans(subject, [("x:", " A"), ("x: ", "A"), ("a", "n"), ("x:", " Ab")])
    assert spans[0] == Span(ids=(BOS, of["x"], of[":"], of["ĠA"]), start=3)
    assert spans[1] == spans[0], "a space at the prompt's end belongs to the continuation"
    assert spans[2] == Span(ids=(BOS, of["an"]), start=1), "a merged continuation keeps its last token"
    assert spans[3] == Span(ids=(BOS, of["x"], of[":"], of["ĠA"], of["b"]), start=3)


def test_rows_beyond_the_context_lose_tokens_on_the_left() -> None:
    subject = LoadedModel(model=tiny_gpt2(), tokenizer=tiny_tokenizer(bos=False))
    (span,) = pair_spans(subject, [("y" * 200 + "x:", " Abc")])
    # The last token is not read, so the context holds all before it.
    assert len(span.ids) == 97
    assert span.ids[span.start :] == (VOCABULARY["ĠA"], VOCABULARY["b"], VOCABULARY["c"])
    assert span.ids[span.start - 1] == VOCABULARY[":"]
    assert [len(row) for row in encode_texts(subject, ["y" * 200, "y"])] == [96, 1]
    assert len(generate(subject, ["y" * 200], [3])) == 1


def test_a_closing_eos_of_the_tokenizer_is_dropped() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert encode(tokenizer, ["xy"]) == [[BOS, VOCABULARY["x"], VOCABULARY["y"]]]


def test_spans_that_differ_in_their_last_token_share_a_row() -> None:
    subject = LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))
    rows = []
    handle = subject.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    log_probs(subject.model, pair_spans(subject, [("x:", f" {letter}") for letter in "ABCD"]))
    handle.remove()
    assert rows == [1]


@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_generation_equals_a_loop_over_single_rows(subject: LoadedModel, tokens_per_batch: int) -> None:
    counts = [12, 3, 7, 9, 1]
    found = generate(subject, PROMPTS, counts, tokens_per_batch=tokens_per_batch)
    assert found == [naive_greedy(subject, prompt, count) for prompt, count in zip(PROMPTS, counts, strict=True)]
    assert any(found)


@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_generation_ends_at_newline_eos_or_its_count(tokens_per_batch: int) -> None:
    line = reciter(["1", "ĠA", "b", "Ċ", "2", "c", "d", "e", "</s>", "f"])
    found = generate(line, ["says 1", "2", "2", "e"], [8, 8, 2, 8], tokens_per_batch=tokens_per_batch)
    assert found == ["Ab", "cde", "cd", ""]


def test_generation_ends_at_every_eos_of_the_model() -> None:
    subject = reciter(["1", "ĠA", "b", "c", "d"])
    assert generate(subject, ["1"], [4]) == ["Abcd"]
    subject.model.generation_config.eos_token_id = [EOS, VOCABULARY["c"]]
    assert generate(subject, ["1"], [4]) == ["Ab"]


def test_generation_without_any_eos_shows_no_padding() -> None:
    line = reciter(["1", "ĠA", "b", "Ċ", "2", "c", "d", "e", "f"])
    line.model.generation_config.eos_token_id = None
    plain = PreTrainedTokenizerFast(tokenizer_object=line.tokenizer.backend_tokenizer)
    assert generate(LoadedModel(model=line.model, tokenizer=plain), ["1", "2"], [6, 4]) == ["Ab", "cdef"]


def test_generation_stops_early_once_every_row_has_its_line() -> None:
    subject = reciter(["1", "ĠA", "Ċ", "2", "c"])
    steps = []
    handle = subject.model.register_forward_pre_hook(lambda module, args: steps.append(1))
    generate(subject, ["1", "say 1"], [30, 30])
    handle.remove()
    assert len(steps) == 2


def test_generation_ignores_and_keeps_the_models_own_settings() -> None:
    subject = LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))
    expected = generate(subject, PROMPTS, [8] * len(PROMPTS))
    own = subject.model.generation_config
    assert own is not None
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    assert generate(subject, PROMPTS, [8] * len(PROMPTS)) == expected
    assert subject.model.generation_config is own
    assert own.do_sample is True


ASKED = retain_set(questions=tuple(Question(prompt=prompt, answer="Anna") for prompt in PROMPTS))


def test_answers_are_generated_once_with_room_to_go_on(subject: LoadedModel) -> None:
    one = LoadedModel(model=subject.model, tokenizer=subject.tokenizer)
    reading = Reading(one, ASKED)
    assert reading.answers == [(naive_greedy(subject, prompt, 24),) for prompt in PROMPTS]
    steps = []
    handle = subject.model.register_forward_pre_hook(lambda module, args: steps.append(1))
    assert reading.answers == [(text,) for (text,) in reading.answers]
    assert reading.continuations
    handle.remove()
    assert not steps


def test_long_correct_answers_have_twice_their_length_but_no_more_than_half_the_context() -> None:
    subject = reciter(["1", "ĠA", *[chr(letter) for letter in range(ord("b"), ord("z"))], *"BCDEFGHIJKLMNOPQRSTUVWXYZ"])
    (short,), (accepted,), (cut,) = answers(
        subject,
        EvalSet(
            name="retain",
            role="keep",
            questions=(
                Question(prompt="a 1", answer="x"),
                Question(prompt="b 1", answer="x", accepted=("Abcdefghij",)),
                Question(prompt="c 1", answer="x" * 60),
            ),
        ),
    )
    assert [len(short), len(accepted), len(cut)] == [24, 28, 32]


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 4096])
def test_sampled_answers_do_not_depend_on_the_batch(subject: LoadedModel, tokens_per_batch: int) -> None:
    counts = [9, 12, 7, 9, 5]
    together = continue_prompts(subject, PROMPTS, counts, seed="0", tokens_per_batch=tokens_per_batch)
    alone = [continue_prompts(subject, [prompt], [n], seed="0")[0] for prompt, n in zip(PROMPTS, counts, strict=True)]
    assert together == alone
    assert together != continue_prompts(subject, PROMPTS, counts, seed="1")
    assert together != continue_prompts(subject, PROMPTS, counts)


def test_samples_are_drawn_from_the_seed_and_leave_the_global_state_alone(subject: LoadedModel) -> None:
    state = torch.get_rng_state()
    first = answers(LoadedModel(model=subject.model, tokenizer=subject.tokenizer), ASKED, samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert answers(LoadedModel(model=subject.model, tokenizer=subject.tokenizer), ASKED, samples=3) == first
    assert all(len(row) == 3 for row in first)
    assert any(len(set(row)) == 3 for row in first)
    other = LoadedModel(model=subject.model, tokenizer=subject.tokenizer)
    assert answers(other, ASKED, samples=3, seed=1) != first
    turned = replace(ASKED, questions=ASKED.questions[::-1])
    assert answers(other, turned, samples=3) == first[::-1]


def test_samples_follow_the_models_distribution() -> None:
    subject = LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))
    ids = encode(subject.tokenizer, ["x"])[0]
    with torch.no_grad():
        expected = subject.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    draws = Counter(continue_prompts(subject, ["x"], [1], seed=str(n))[0].ids[-1] for n in range(400))
    # Mean log-probability of what was drawn, against the entropy: four standard errors.
    drawn = sum(float(expected[token].log()) * count for token, count in draws.items()) / 400
    mean = float((expected * expected.log()).sum())
    spread = math.sqrt(float((expected * (expected.log() - mean).square()).sum()) / 400)
    assert abs(drawn - mean) < 4 * spread
    assert spread > 0


def test_continuations_keep_the_token_that_ends_them() -> None:
    line = reciter(["1", "ĠA", "b", "Ċ", "2", "c", "</s>", "d"])
    found = continue_prompts(line, ["1", "2", "1"], [8, 8, 2])
    of = VOCABULARY
    assert [span.ids[span.start :] for span in found] == [
        (of["ĠA"], of["b"], of["Ċ"]),
        (of["c"], EOS),
        (of["ĠA"], of["b"]),
    ]


def test_ranks_of_correct_answers_equal_a_loop(subject: LoadedModel) -> None:
    questions = tuple(Question(prompt=prompt, answer="Anna", accepted=("by",)) for prompt in (*PROMPTS, "Say:\n"))
    data = forget_set(questions=questions)
    found = Reading(subject, data).gold_ranks()
    for question, ranks in zip(questions, found, strict=True):
        for gold, mine in zip((question.answer, *question.accepted), ranks, strict=True):
            space = "" if question.prompt.endswith("\n") else " "
            start = len(encode(subject.tokenizer, [question.prompt])[0])
            ids = encode(subject.tokenizer, [question.prompt + space + gold])[0]
            with torch.no_grad():
                logits = subject.model(torch.tensor([ids])).logits[0]
            order = [logits[place - 1].argsort(descending=True).tolist() for place in range(start, len(ids))]
            assert mine.tolist() == [row.index(token) + 1 for row, token in zip(order, ids[start:], strict=True)]


def test_free_form_questions() -> None:
    choice, free = Question(prompt="a", answer="x", choices=("x", "y")), Question(prompt="b", answer="x")
    assert free_form(retain_set(questions=(choice, free))) == (free,)
    assert free_form(retain_set(questions=(choice, free), scoring="cloze")) == (choice, free)


def test_modes_and_gradients_are_restored() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    inside = []

    def fail() -> None:
        with measuring(model):
            inside.extend([*(module.training for module in model.modules()), torch.is_grad_enabled()])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(inside)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_scoring() -> None:
    model = tiny_gpt2()
    spans = [Span(ids=(5, 6, 7, 8), start=1)]
    expected = log_probs(model, spans)[0]
    assert torch.equal(log_probs(model.train(), spans)[0], expected)
    assert model.training


def test_a_model_without_finite_output_is_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(DivergedError) as error:
        log_probs(model, [Span(ids=(5, 6), start=1), Span(ids=(5, 6, 7), start=1)])
    assert str(error.value) == (
        "the model's output is NaN or infinite on 2 of 2 rows, so it cannot be scored.\n"
        "Load it in float32 or bfloat16, or train it with a lower learning rate or steering coefficient."
    )


def test_batches_keep_to_the_budget_and_lose_nothing() -> None:
    rows = [(1,) * length for length in (5, 1, 9, 3, 3, 7, 20)]
    found = list(batches(rows, 18))
    assert sorted(row for batch in found for row in batch) == sorted(rows)
    assert [[len(row) for row in batch] for batch in found] == [[20], [9, 7], [5, 3, 3], [1]]


def test_nothing_to_read_gives_nothing() -> None:
    subject = LoadedModel(model=tiny_llama(), tokenizer=tiny_tokenizer(bos=True))
    assert read_spans(subject.model, [], lambda logits, ids: logits) == []
    assert generate(subject, [], []) == []
    assert pair_spans(subject, []) == []


def test_prompt_and_answers_by_scoring() -> None:
    question = Question(prompt="Which?", answer="two", choices=("one", "two"))
    assert prompt_and_answers(question, "letter") == ("Which?\nA. one\nB. two\nAnswer:", (" A", " B"))
    assert prompt_and_answers(question, "cloze") == ("Which?", (" one", " two"))
    assert prompt_and_answers(Question(prompt="Which? ", answer="two"), "letter") == ("Which? ", ("two",))


def test_standard_error_of_a_mean() -> None:
    scores = mean_scores([1.0, 0.0, 1.0, 1.0], "higher", chance=0.25)
    assert scores.value == 0.75
    assert scores.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert (scores.n, scores.better, scores.chance, scores.per_example) == (4, "higher", 0.25, (1.0, 0.0, 1.0, 1.0))
    assert mean_scores([0.5], "neither").stderr == 0.0
