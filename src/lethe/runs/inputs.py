"""From the names in a RunConfig to the things they stand for: model, corpora, prompts, batches, slices."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.data import data_folder, prompts, unanswerable
from lethe.data.batches import Batching, Corpora, Schedule
from lethe.data.corpora import check_overlap, read_texts
from lethe.data.prompt_corpora import PromptCorpora
from lethe.data.prompts import Prompts
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError, InvalidLayerError
from lethe.model.checkpoint_files import checkpoint_files, count_layers, model_folder, read_tensor
from lethe.model.layers import trainable_names
from lethe.model.loading import load_model
from lethe.model.patch import Patch
from lethe.model.slice import LayerSlice
from lethe.runs.config import RunConfig
from lethe.runs.sharing import Sharing
from lethe.suites import world
from lethe.suites.world import exam
from lethe.suites.world.settings import BUILTIN
from lethe.types import Batch, Question, Topic

Found = TypeVar("Found")


UNVERIFIABLE = 200
"""Questions about things that do not exist, where no reference prompts were named."""


def model_source(model: str) -> str | Path:
    """Where the weights are: the shipped folder for `builtin`, otherwise what was named."""
    return world.MODEL_FOLDER if model == BUILTIN else model


def find_dtype(dtype: str, source: str | Path, revision: str | None, device: torch.device) -> torch.dtype:
    """The number type to compute in; `auto` is the checkpoint's own, but fp32 instead of fp16 on a CPU."""
    if dtype != "auto":
        return getattr(torch, dtype)
    files = checkpoint_files(model_folder(source, revision))
    # The norms and embeddings of a checkpoint are floating-point; buffers such as masks need not be.
    stored = next(t.dtype for t in (read_tensor(files, name) for name in sorted(files)) if t.is_floating_point())
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def read_corpora(config: RunConfig, *, required: bool = True) -> tuple[dict[str, list[str]], list[str]]:
    """Forget texts by topic, and retain texts; if they are not `required`, those that were not named are empty.

    Raises: CorpusError.
    """
    has_world = config.model == BUILTIN
    if required:
        _refuse_foreign_world(config)
    own = of_own_data(config, required=required)
    forget: dict[str, list[str]] = {}
    if "forget" in own:
        forget = data_folder.forget_texts(own["forget"], text_field=config.text_field, raw_lines=config.as_published)
    for source in config.forget if "forget" not in own else ():
        if is_builtin(source):
            forget |= _builtin_topics(source, exam.forget_texts()) if has_world else {}
            continue
        name = _unused(Path(source).stem, forget)
        forget[name] = read_texts(source, text_field=config.text_field, raw_lines=config.as_published)
    if "retain" in own:
        retain = read_texts(data_folder.retain_file(own["retain"]), text_field=config.text_field)
    elif config.retain == BUILTIN:
        retain = exam.retain_texts() if has_world else []
    else:
        retain = read_texts(config.retain, text_field=config.text_field)
    check_overlap(forget, retain, allow=config.allow_overlap)
    return forget, retain


def count_topics(config: RunConfig) -> int:
    """Number of forget corpora that the run has, each a topic.

    Raises: CorpusError.
    """
    own = of_own_data(config)
    if "forget" in own:
        return len(data_folder.forget_texts(own["forget"], text_field=config.text_field))
    return sum(
        len(_builtin_topics(source, exam.forget_texts())) if is_builtin(source) else 1 for source in config.forget
    )


def read_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Forget, retain and reference prompts, rendered in the model's chat template if it has one.

    Raises: CorpusError.
    """
    _refuse_foreign_world(config)
    own = of_own_data(config)
    forget: dict[str, tuple[Question, ...]] = data_folder.forget_prompts(own["forget"]) if "forget" in own else {}
    for source in config.forget if "forget" not in own else ():
        if is_builtin(source):
            forget |= _builtin_topics(source, exam.forget_prompts())
        else:
            forget[_unused(Path(source).stem, forget)] = prompts.read_prompts(source)
    if "retain" in own:
        retain = prompts.read_prompts(data_folder.retain_file(own["retain"]))
    else:
        retain = exam.retain_prompts() if config.retain == BUILTIN else prompts.read_prompts(config.retain)
    if config.reference != BUILTIN:
        reference = prompts.read_prompts(config.reference)
    elif config.model == BUILTIN:
        reference = exam.reference_prompts()
    else:
        reference = unanswerable.unverifiable(UNVERIFIABLE, seed=0)
    found = Prompts(forget=forget, retain=retain, reference=reference)
    prompts.check_apart(found, allow=config.allow_overlap)
    return Prompts(
        forget={name: prompts.render(tokenizer, asked) for name, asked in forget.items()},
        retain=prompts.render(tokenizer, retain),
        reference=prompts.render(tokenizer, reference),
    )


def one_pass(
    config: RunConfig,
    forget: Mapping[str, list[str]],
    retain: list[str],
    asked: Prompts | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[tuple[Topic, ...], tuple[Batch, ...]]:
    """Every row of the corpora once: topics with their forget batches, and retain batches, in an order by the seed.

    Raises: CorpusError, EmptyBatchError.
    """
    corpora = _corpora(forget, retain, asked, tokenizer)
    return corpora.topics(batching(config, len(forget)), torch.Generator().manual_seed(config.seed))


def prompt_schedule(config: RunConfig, asked: Prompts, tokenizer: PreTrainedTokenizerBase) -> Schedule:
    """The batches of every step for a method that reads prompts; the corpora are repeated as the steps need."""
    return _schedule(config, PromptCorpora(prompts=asked, tokenizer=tokenizer))


def batching(config: RunConfig, topics: int) -> Batching:
    """How a run cuts corpora of so many topics into batches.

    Raises: InvalidValueError if its lengths do not fit the topics.
    """
    config = config.resolved(topics)
    return Batching(
        batch_size=config.batch_size,
        max_length=config.max_length,
        chunk=config.chunk,
        count=config.count,
        epochs=config.epochs,
        positions="all" if config.as_published else config.positions,
        padding_side="left" if config.as_published else "right",
        shuffle=not config.as_published,
    )


def _corpora(
    forget: Mapping[str, list[str]], retain: list[str], asked: Prompts | None, tokenizer: PreTrainedTokenizerBase
) -> Corpora:
    if asked is not None:
        return PromptCorpora(prompts=asked, tokenizer=tokenizer)
    return TextCorpora(forget=forget, retain=retain, tokenizer=tokenizer)


def _schedule(config: RunConfig, corpora: Corpora) -> Schedule:
    return corpora.schedule(
        batching(config, len(corpora.texts()[0])),
        torch.Generator().manual_seed(config.seed),
        steps=config.steps,
        accumulate=config.accumulate,
    )


def is_builtin(source: str) -> bool:
    """Whether a corpus's name is that of the built-in world, or of one topic of it."""
    return source == BUILTIN or source.startswith(f"{BUILTIN}:")


def _builtin_topics(source: str, topics: Mapping[str, Found]) -> dict[str, Found]:
    wanted = source.partition(":")[2]
    if wanted and wanted not in topics:
        raise CorpusError(f"the built-in world has no forget topic '{wanted}'.\nIt has {', '.join(topics)}.")
    return {name: found for name, found in topics.items() if wanted in ("", name)}


def of_own_data(config: RunConfig, *, required: bool = True) -> dict[str, Path]:
    """The sides (forget, retain) whose corpora come from the folder of own data, each with that folder.

    A corpus that is named otherwise is not among them; nor, if they are not `required`, one that the folder lacks.
    Raises: CorpusError if there is no such folder.
    """
    if config.data is None:
        return {}
    found = data_folder.find(config.data)
    unnamed = {"forget": config.forget == (BUILTIN,), "retain": config.retain == BUILTIN}
    there = {"forget": bool(found.forget), "retain": found.retain is not None}
    return {side: config.data for side, is_unnamed in unnamed.items() if is_unnamed and (required or there[side])}


def _refuse_foreign_world(config: RunConfig) -> None:
    own = of_own_data(config)
    named = {
        "--forget": "forget" not in own and any(map(is_builtin, config.forget)),
        "--retain": "retain" not in own and is_builtin(config.retain),
    }
    if config.model != BUILTIN and any(named.values()):
        missing = " and ".join(flag for flag, is_named in named.items() if is_named)
        raise CorpusError(
            f"the built-in corpora tell of a made-up world that {config.model} does not know.\nPass {missing} FILE."
        )


def _unused(name: str, taken: Mapping[str, object]) -> str:
    while name in taken:
        name += "'"
    return name


def training_schedule(
    config: RunConfig, forget: Mapping[str, list[str]], retain: list[str], tokenizer: PreTrainedTokenizerBase
) -> Schedule:
    """The batches of every step, in an order drawn from the seed.

    Raises: CorpusError if there are too few rows.
    """
    return _schedule(config, TextCorpora(forget=forget, retain=retain, tokenizer=tokenizer))


def check_layer(config: RunConfig) -> None:
    """Raises: InvalidLayerError if the model does not have the layer."""
    count = count_layers(model_source(config.model), config.revision)
    if config.layer >= count:
        raise InvalidLayerError(
            f"'layer' must be in [0, {count - 1}] for {config.model}, which has {count} layers. Got {config.layer}."
        )


def load_slice(
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype,
    patch: Patch | None = None,
    sharing: Sharing | None = None,
) -> LayerSlice:
    """The first l+1 layers, with the matrices of the trained layers free to move from where the patch puts them.

    Raises: ModelError, InvalidLayerError, UnknownModuleError, PatchError.
    """
    sharing = sharing or Sharing()
    check_layer(config)
    model = load(config, device, dtype, sharing, layers=config.layer + 1)
    if patch is not None:
        patch.apply_in_memory(model)
    names = [trainable_names(model, layer, config.train_modules) for layer in config.trained_layers]
    return sharing.cut(model, config.trained_layers[0], config.layer + 1, sum(names, ()))


def layer_slices(
    config: RunConfig, device: torch.device, dtype: torch.dtype, sharing: Sharing | None = None
) -> tuple[LayerSlice, ...]:
    """For each trained layer, the slice of it alone, for solvers that give each layer a target of its own."""
    check_layer(config)
    model = load(config, device, dtype, sharing or Sharing(), layers=config.layer + 1)
    return tuple(
        LayerSlice(model, layer, layer + 1, trainable_names(model, layer, config.train_modules))
        for layer in config.trained_layers
    )


def load(
    config: RunConfig, device: torch.device, dtype: torch.dtype, sharing: Sharing, *, layers: int | None = None
) -> PreTrainedModel:
    """The run's untouched model: its first layers, or all of it.

    Raises: ModelError.
    """
    source = model_source(config.model)
    return sharing.model(
        (source, config.revision, dtype, device),
        layers,
        lambda count: load_model(source, layers=count, dtype=dtype, device=str(device), revision=config.revision),
    )


def check_slice(config: RunConfig, device: torch.device) -> dict[str, object]:
    """Prove the replay on two rows of arbitrary tokens, one of them padded; says what would be trained.

    Raises: ReplayError, and whatever `load_slice` raises.
    """
    source = model_source(config.model)
    layers = load_slice(config, device, find_dtype(config.dtype, source, config.revision, device))
    vocabulary = layers.model.config.get_text_config().vocab_size
    ids = torch.arange(2 * 16).reshape(2, 16) % vocabulary
    real = torch.ones(2, 16, dtype=torch.bool)
    real[1, 10:] = False
    layers.check(Batch(input_ids=ids, attention_mask=real, mask=real))
    return {
        "model_type": layers.model.config.model_type,
        "layers replayed": f"{layers.start_at_layer}..{layers.stop_at_layer - 1}",
        "d_model": layers.d_model,
        "trained": {name: list(parameter.shape) for name, parameter in layers.trained.items()},
    }
