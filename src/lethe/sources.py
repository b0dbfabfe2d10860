"""From the names in a RunConfig to the things they stand for: model, corpora, batches, slice, questions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lethe import decoder, world
from lethe.config import BUILTIN, RunConfig
from lethe.corpora import Schedule, check_overlap, read_texts, schedule
from lethe.questions import read_questions, subset
from lethe.slice import LayerSlice
from lethe.types import Batch, CorpusError, EvalSet, InvalidLayerError, Question
from lethe.weights import checkpoint_files, count_layers, load_model, model_folder, read_tensor

TEXTS = 64
"""Rows of each corpus that perplexity and drift are measured on."""


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
    if required and not has_world and BUILTIN in (*config.forget, config.retain):
        missing = " and ".join(
            f for f, v in (("--forget", BUILTIN in config.forget), ("--retain", config.retain == BUILTIN)) if v
        )
        raise CorpusError(
            f"the built-in corpora tell of a made-up world that {config.model} does not know.\nPass {missing} FILE."
        )
    forget: dict[str, list[str]] = {}
    for source in config.forget:
        if source == BUILTIN:
            forget |= world.forget_texts() if has_world else {}
            continue
        name = Path(source).stem
        while name in forget:
            name += "'"
        # The published code takes the raw line, JSON quotes and all, unless a file's name says that it is its biology.
        raw_lines = config.as_published and source.endswith(".jsonl") and "bio-forget-corpus" not in source
        forget[name] = read_texts(source, text_field=config.text_field, raw_lines=raw_lines)
    if config.retain == BUILTIN:
        retain = world.retain_texts() if has_world else []
    else:
        retain = read_texts(config.retain, text_field=config.text_field)
    check_overlap(forget, retain, allow=config.allow_overlap)
    return forget, retain


def training_schedule(
    config: RunConfig, forget: Mapping[str, list[str]], retain: list[str], tokenizer: PreTrainedTokenizerBase
) -> Schedule:
    """The batches of every step, in an order drawn from the seed.

    Raises: CorpusError if there are too few rows.
    """
    config = config.resolved(len(forget))
    return schedule(
        forget,
        retain,
        tokenizer,
        steps=config.steps,
        accumulate=config.accumulate,
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_lengths=config.max_length,
        chunk=config.chunk,
        count=config.count,
        padding_side="left" if config.as_published else "right",
        shuffle=not config.as_published,
        rng=torch.Generator().manual_seed(config.seed),
    )


def check_layer(config: RunConfig) -> None:
    """Raises: InvalidLayerError if the model does not have the layer."""
    count = count_layers(model_source(config.model), config.revision)
    if config.layer >= count:
        raise InvalidLayerError(
            f"'layer' must be in [0, {count - 1}] for {config.model}, which has {count} layers. Got {config.layer}."
        )


def load_slice(config: RunConfig, device: torch.device, dtype: torch.dtype) -> LayerSlice:
    """The first l+1 layers, with the matrices of the trained layers free to move.

    Raises: ModelError, InvalidLayerError, UnknownModuleError.
    """
    source = model_source(config.model)
    check_layer(config)
    model = load_model(source, layers=config.layer + 1, dtype=dtype, device=str(device), revision=config.revision)
    names = [decoder.trainable_names(model, layer, config.train_modules) for layer in config.trained_layers]
    return LayerSlice(model, config.trained_layers[0], config.layer + 1, sum(names, ()))


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


def eval_sets(config: RunConfig, forget: Mapping[str, Sequence[str]], retain: Sequence[str]) -> tuple[EvalSet, ...]:
    """The sets of a run: its question files and the first rows of its corpora, or the built-in model's exam.

    Raises: QuestionError.
    """
    texts = {"forget": _in_turn(list(forget.values())), "retain": list(retain)}
    questions: dict[str, Sequence[Question]] = {}
    if config.model == BUILTIN:
        questions |= world.questions(config.split)
        texts["adjacent"] = world.adjacent_texts()
    paths = {
        "forget": config.forget_questions,
        "adjacent": config.adjacent_questions,
        "retain": config.retain_questions,
    }
    questions |= {name: read_questions(path) for name, path in paths.items() if path is not None}
    if config.limit is not None:
        questions = {name: subset(found, config.limit, 0) for name, found in questions.items()}
    return tuple(
        EvalSet(
            name=name,
            questions=tuple(questions.get(name, ())),
            texts=tuple(texts.get(name, ())[:TEXTS]),
            scoring="cloze" if config.model == BUILTIN else config.scoring,
        )
        for name in sorted({*texts, *questions}, key=["forget", "adjacent", "retain", "unknown"].index)
    )


def _in_turn(corpora: Sequence[Sequence[str]]) -> list[str]:
    """Rows of all topics in turn, so that the first ones are fair to each."""
    longest = max(map(len, corpora), default=0)
    return [corpus[i] for i in range(longest) for corpus in corpora if i < len(corpus)]
