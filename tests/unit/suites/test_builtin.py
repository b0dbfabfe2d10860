"""The built-in world as a suite: found by name, and what it hands over is what its parts give."""

from pathlib import Path

import pytest

from lethe import suites
from lethe.data.settings import BUILTIN
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError
from lethe.evaluation import eval_sets
from lethe.model.loading import load_tokenizer
from lethe.runs.config import RunConfig
from lethe.suites.builtin import Builtin
from lethe.suites.muse import MUSE
from lethe.suites.protocol import Suite, SuiteWithModel
from lethe.suites.world import exam
from lethe.suites.world.generator import DECLINES
from lethe.system.plugins import discover


def test_it_is_found_by_the_name_of_its_model_and_alone_brings_one() -> None:
    assert discover(suites)[BUILTIN] is Builtin
    assert isinstance(Builtin(), SuiteWithModel)
    assert isinstance(MUSE(), Suite)
    assert not isinstance(MUSE(), SuiteWithModel)
    assert (Builtin.model / "config.json").is_file()
    assert Builtin.refusals == DECLINES


@pytest.mark.parametrize("split", ["dev", "test", "all"])
def test_its_sets_are_those_of_a_run_on_its_model(split: str) -> None:
    config = RunConfig.of(model="builtin", split=split)
    forget, retain = Builtin().texts()
    corpora = TextCorpora(forget=forget, retain=retain, tokenizer=load_tokenizer(Builtin.model))
    asked = eval_sets.sets("builtin", config.data, config.evaluation, corpora)
    assert asked == Builtin(split=split).sets(Path("not read"))
    assert eval_sets.wanted("builtin", config.evaluation.refusals) == Builtin.refusals


def test_topics_and_prompts() -> None:
    assert Builtin().texts() == (exam.forget_texts(), exam.retain_texts())
    assert list(Builtin().texts("exploits")[0]) == list(Builtin().prompts("exploits").forget) == ["exploits"]
    assert Builtin().prompts().retain == exam.retain_prompts()
    assert Builtin().prompts().reference == exam.reference_prompts()
    for read in (Builtin().texts, Builtin().prompts):
        with pytest.raises(CorpusError, match=r"has no forget topic 'x'\.\nIt has pathogens, exploits\.$"):
            read("x")


def test_settings_of_a_method_come_after_those_of_every_run() -> None:
    assert RunConfig.of(model="builtin", **Builtin.suits).layer == 5
    assert Builtin.suits_methods["lunar"] == {"alpha": 10.0, "layer": 8, "lam": 1e-2}
