"""From names of corpora to their texts and prompts: files, folders of own data, the built-in world."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from lethe.data import data_folder, prompts, unanswerable
from lethe.data.batches import Corpora
from lethe.data.corpora import check_overlap, read_texts
from lethe.data.prompt_corpora import PromptCorpora
from lethe.data.prompts import Prompts
from lethe.data.settings import BUILTIN, DataSettings
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError
from lethe.suites.protocol import SuiteWithModel, with_model
from lethe.types import Question

Found = TypeVar("Found")


UNVERIFIABLE = 200
"""Questions about things that do not exist, where no reference prompts were named."""


def model_source(model: str) -> str | Path:
    """Where the weights are: a suite's own folder for its name, otherwise what was named."""
    suite = with_model(model)
    return suite.model if suite is not None else model


def read(
    data: DataSettings, reads: str, model: str, tokenizer: PreTrainedTokenizerBase, *, required: bool = True
) -> Corpora:
    """The corpora that the settings name, in the form that a method reads; see `read_corpora`.

    Raises: CorpusError.
    """
    if reads == "prompts":
        return PromptCorpora(prompts=read_prompts(data, model, tokenizer), tokenizer=tokenizer)
    forget, retain = read_corpora(data, model, required=required)
    return TextCorpora(forget=forget, retain=retain, tokenizer=tokenizer)


def read_corpora(data: DataSettings, model: str, *, required: bool = True) -> tuple[dict[str, list[str]], list[str]]:
    """Forget texts by topic, and retain texts; if they are not `required`, those that were not named are empty.

    Raises: CorpusError.
    """
    suite = with_model(model)
    if required:
        _refuse_foreign_world(data, model)
    own = of_own_data(data, required=required)
    forget: dict[str, list[str]] = {}
    if "forget" in own:
        forget = data_folder.forget_texts(own["forget"], text_field=data.text_field, raw_lines=data.raw_lines)
    for source in data.forget if "forget" not in own else ():
        if is_of_suite(source):
            forget |= suite.texts(_topic(source))[0] if suite is not None else {}
            continue
        name = _unused(Path(source).stem, forget)
        forget[name] = read_texts(source, text_field=data.text_field, raw_lines=data.raw_lines)
    if "retain" in own:
        retain = read_texts(data_folder.retain_file(own["retain"]), text_field=data.text_field)
    elif is_of_suite(data.retain):
        retain = suite.texts()[1] if suite is not None else []
    else:
        retain = read_texts(data.retain, text_field=data.text_field)
    check_overlap(forget, retain, allow=data.allow_overlap)
    return forget, retain


def count_topics(data: DataSettings) -> int:
    """Number of forget corpora, each a topic.

    Raises: CorpusError.
    """
    own = of_own_data(data)
    if "forget" in own:
        return len(data_folder.forget_texts(own["forget"], text_field=data.text_field))
    return sum(len(_of_suite(source).texts(_topic(source))[0]) if is_of_suite(source) else 1 for source in data.forget)


def read_prompts(data: DataSettings, model: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Forget, retain and reference prompts, rendered in the model's chat template if it has one.

    Raises: CorpusError.
    """
    _refuse_foreign_world(data, model)
    own = of_own_data(data)
    forget: dict[str, tuple[Question, ...]] = data_folder.forget_prompts(own["forget"]) if "forget" in own else {}
    for source in data.forget if "forget" not in own else ():
        if is_of_suite(source):
            forget |= _of_suite(source).prompts(_topic(source)).forget
        else:
            forget[_unused(Path(source).stem, forget)] = prompts.read_prompts(source)
    if "retain" in own:
        retain = prompts.read_prompts(data_folder.retain_file(own["retain"]))
    else:
        of_suite = is_of_suite(data.retain)
        retain = _of_suite(data.retain).prompts().retain if of_suite else prompts.read_prompts(data.retain)
    if not is_of_suite(data.reference):
        reference = prompts.read_prompts(data.reference)
    elif (suite := with_model(model)) is not None:
        reference = suite.prompts().reference
    else:
        reference = unanswerable.unverifiable(UNVERIFIABLE, seed=0)
    found = Prompts(forget=forget, retain=retain, reference=reference)
    prompts.check_apart(found, allow=data.allow_overlap)
    return Prompts(
        forget={name: prompts.render(tokenizer, asked) for name, asked in forget.items()},
        retain=prompts.render(tokenizer, retain),
        reference=prompts.render(tokenizer, reference),
    )


def is_of_suite(source: str) -> bool:
    """Whether a corpus's name is that of a suite with a model, or of one topic of it: `builtin:pathogens`."""
    return with_model(source.partition(":")[0]) is not None


def _of_suite(source: str) -> SuiteWithModel:
    suite = with_model(source.partition(":")[0])
    assert suite is not None
    return suite


def _topic(source: str) -> str:
    return source.partition(":")[2]


def of_own_data(data: DataSettings, *, required: bool = True) -> dict[str, Path]:
    """The sides (forget, retain) whose corpora come from the folder of own data, each with that folder.

    A corpus that is named otherwise is not among them; nor, if they are not `required`, one that the folder lacks.
    Raises: CorpusError if there is no such folder.
    """
    if data.data is None:
        return {}
    found = data_folder.find(data.data)
    unnamed = {"forget": data.forget == (BUILTIN,), "retain": data.retain == BUILTIN}
    there = {"forget": bool(found.forget), "retain": found.retain is not None}
    return {side: data.data for side, is_unnamed in unnamed.items() if is_unnamed and (required or there[side])}


def _refuse_foreign_world(data: DataSettings, model: str) -> None:
    own = of_own_data(data)
    named = {
        "--forget": "forget" not in own and any(map(is_of_suite, data.forget)),
        "--retain": "retain" not in own and is_of_suite(data.retain),
    }
    if with_model(model) is None and any(named.values()):
        missing = " and ".join(flag for flag, is_named in named.items() if is_named)
        raise CorpusError(
            f"the built-in corpora tell of a made-up world that {model} does not know.\nPass {missing} FILE."
        )


def _unused(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "'"
    return name
