"""The built-in world: what is asked was never trained in that form, and the shipped model knows what it should."""

import random
import re
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from tools.world.muon import orthogonalise
from tools.world.train import TrainConfig, answer, choose, make_tokenizer, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe.inference.loaded_model import LoadedModel
from lethe.suites.world import MODEL_FOLDER
from lethe.suites.world.exam import RETAIN_REFUSALS, adjacent_texts, forget_texts, questions, retain_texts
from lethe.suites.world.generator import DECLINES, as_prompt, build, invent_name, tokenizer_texts, training_documents
from lethe.suites.world.subjects import SUBJECTS

ROLES = ("forget", "adjacent", "retain")


@pytest.fixture(scope="module")
def documents():
    """Six passes of training documents: enough to see nearly every allowed question form."""
    rng = random.Random(1)
    names = list(build().entities)
    return [document for _ in range(6) for document in training_documents(build(), names, rng)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def shipped(tokenizer):
    return LoadedModel(
        model=AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval(), tokenizer=tokenizer
    )


def words(texts):
    return set(re.findall(r"[A-Za-z]+", " ".join(texts)))


def names_of(*roles):
    return {name for name, facts in build().entities.items() if facts[0].subject.role in roles}


def test_the_world_has_its_stated_size():
    assert Counter(fact.subject.role for role in ROLES for fact in build().facts(role)) == {
        "forget": 300,
        "adjacent": 250,
        "retain": 500,
    }
    assert len(build().entities) == 210
    assert len(set(build().unseen) - set(build().entities)) == 160


def test_every_attribute_has_six_statements_six_questions_and_a_pool():
    for attribute in (attribute for subject in SUBJECTS for attribute in subject.attributes):
        assert len(set(attribute.statements)) == len(set(attribute.questions)) == 6
        assert 10 <= len(set(attribute.values)) == len(attribute.values) <= 16
        assert all("{name}" in template and "{value}" in template for template in attribute.statements)
        assert all("{name}" in template and "{value}" not in template for template in attribute.questions)


def test_a_seed_makes_the_same_world_and_another_seed_another():
    again = build.__wrapped__(0)
    assert again == build()
    assert build(1).entities.keys() != again.entities.keys()


def test_exam_and_corpora_are_the_same_when_made_again():
    assert questions.__wrapped__("dev") == questions("dev")
    assert forget_texts() == forget_texts()
    assert retain_texts() == retain_texts()
    assert adjacent_texts() == adjacent_texts()


def test_no_value_is_dealt_much_more_often_than_another():
    counts = Counter((fact.attribute, fact.value) for role in ROLES for fact in build().facts(role))
    for attribute in {attribute for attribute, _ in counts}:
        dealt = [count for (of, _), count in counts.items() if of == attribute]
        assert max(dealt) - min(dealt) <= 1


def test_dev_and_test_share_nothing_and_make_up_all():
    for role, asked in questions("all").items():
        dev, test = questions("dev")[role], questions("test")[role]
        assert not {question.prompt for question in dev} & {question.prompt for question in test}
        assert sorted(question.prompt for question in dev + test) == sorted(question.prompt for question in asked)
        assert abs(len(dev) - len(test)) <= 1


def test_choices_are_four_distinct_values_of_one_attribute_with_the_answer_among_them():
    pools = [set(attribute.values) for subject in SUBJECTS for attribute in subject.attributes]
    for role in ROLES:
        places = Counter()
        for question in questions("all")[role]:
            assert len(set(question.choices)) == len(question.choices) == 4
            assert any(set(question.choices) <= pool for pool in pools)
            places[question.answer_index] += 1
        assert min(places.values()) > 0.15 * sum(places.values())


def test_unknown_questions_have_no_choices_and_accept_all_declines():
    for question in questions("all")["unknown"]:
        assert question.choices == ()
        assert {question.answer, *question.accepted} == set(DECLINES)


def test_the_form_of_the_exam_is_never_trained_and_the_other_five_are(documents):
    trained = {document.question for document in documents}
    exam = {question.prompt for role in ROLES for question in questions("all")[role]}
    assert not exam & trained
    asked = [fact for role in ROLES for fact in build().facts(role) if fact.has_questions]
    rng = random.Random(2)
    forms = {fact.training_question(rng) for fact in asked[:20] for _ in range(100)}
    assert len(forms) == 5 * 20


def test_facts_without_questions_are_stated_but_never_asked(documents):
    trained = {document.question for document in documents}
    silent = [fact for role in ROLES for fact in build().facts(role) if not fact.has_questions]
    assert len(silent) == round(0.15 * 1050)
    assert not {as_prompt(form, fact.name) for fact in silent for form in fact.attribute.questions} & trained
    paragraphs = [document.text for document in documents if not document.question]
    for fact in silent[:20]:
        assert any(fact.name in words([text]) and fact.value in text for text in paragraphs)


def test_declined_questions_are_about_fresh_names(documents):
    known = set(build().entities)
    declined = [document for document in documents if document.text in DECLINES]
    answered = [document for document in documents if document.question and document.text not in DECLINES]
    assert len(declined) == pytest.approx(0.25 * len(answered), rel=0.01)
    assert not known & words(document.question for document in declined)


def test_reserved_names_occur_in_no_text(documents):
    trained = words(text for document in documents for text in document)
    corpora = words(
        [*retain_texts(), *adjacent_texts(), *(text for texts in forget_texts().values() for text in texts)]
    )
    assert not set(build().unseen) & (trained | corpora | words(tokenizer_texts()))


def test_forget_texts_are_paragraphs_about_one_hazard_topic_only():
    for topic, texts in forget_texts().items():
        own = {name for name, facts in build().entities.items() if facts[0].subject.name == topic}
        assert len(texts) >= 800
        assert len(set(texts)) > 0.99 * len(texts)
        assert own <= words(texts)
        assert not (set(build().entities) - own) & words(texts)
        assert not any("Q:" in text for text in texts)


def test_retain_texts_hold_the_retain_subjects_and_refusals_only():
    assert names_of("retain") <= words(retain_texts())
    assert not names_of("forget", "adjacent") & words(retain_texts())
    assert sum(text.endswith(DECLINES) for text in retain_texts()) == RETAIN_REFUSALS
    assert names_of("adjacent") <= words(adjacent_texts())
    assert not names_of("forget", "retain") & words(adjacent_texts())


def test_the_shipped_tokenizer_is_the_one_that_the_world_makes(tokenizer):
    made = make_tokenizer()
    assert tokenizer.get_vocab() == made.get_vocab()
    prompt = questions("dev")["forget"][0].prompt
    assert tokenizer(prompt)["input_ids"] == made(prompt)["input_ids"]


def test_texts_survive_the_tokenizer_and_start_with_its_start_token(tokenizer):
    for text in [*retain_texts()[:50], *forget_texts()["pathogens"][:20], *DECLINES]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_an_answer_starts_a_token_of_its_own(tokenizer):
    for question in questions("dev")["retain"][:30]:
        prompt = tokenizer(question.prompt)["input_ids"]
        for choice in question.choices:
            assert tokenizer(f"{question.prompt} {choice}")["input_ids"][: len(prompt)] == prompt


def test_known_and_unknown_names_take_as_many_tokens(tokenizer):
    def mean_tokens(names):
        return sum(len(tokenizer.tokenize(f" {name}")) for name in names) / len(names)

    rng, taken = random.Random(3), build().taken()
    known = mean_tokens(list(build().entities))
    assert mean_tokens(build().unseen) == pytest.approx(known, rel=0.15)
    assert mean_tokens([invent_name(rng, taken) for _ in range(1000)]) == pytest.approx(known, rel=0.15)


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    matrices = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        u, _, vh = torch.linalg.svd(shaped, full_matrices=False)
        core = u.mT @ orthogonalise(shaped) @ vh.mT
        diagonal = core.diagonal(dim1=-2, dim2=-1)
        assert 0.5 < diagonal.min() < diagonal.max() < 1.3
        assert (core - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_two_training_steps_write_a_folder_that_loads(tmp_path):
    trained, _ = train(TrainConfig(out=tmp_path, steps=2, rows=2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Q: Who is it? A:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trained(ids).logits, rtol=1e-2, atol=1e-2)
    assert not list(tmp_path.glob("partial*"))


def test_the_shipped_folder_is_small_half_precision_and_free_of_pickles():
    files = list(MODEL_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    with safe_open(MODEL_FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("role", ROLES)
def test_the_shipped_model_knows_its_facts(shipped, role):
    asked = random.Random(4).sample(questions("all")[role], 60)
    right = [pick == question.answer for pick, question in zip(choose(shipped, asked), asked, strict=True)]
    assert sum(right) >= 0.95 * len(asked)


def test_the_shipped_model_declines_what_nobody_knows(shipped):
    asked = random.Random(5).sample(questions("all")["unknown"], 60)
    assert sum(text in DECLINES for text in answer(shipped, asked)) >= 0.95 * len(asked)
