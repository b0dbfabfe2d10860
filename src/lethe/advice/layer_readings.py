"""What a layer shows before anything is trained: norms, how far a move reaches, how well two sides come apart."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lethe.data.settings import Batching
from lethe.data.text_corpora import TextCorpora
from lethe.errors import CorpusError, DivergedError
from lethe.inference.log_probs import measuring
from lethe.methods.directions import random_unit
from lethe.model import hooks
from lethe.model.layers import d_model, device_of, find_layers, trainable_names
from lethe.solvers.least_squares import GRID
from lethe.system.progress import Progress
from lethe.types import Batch

ALPHAS = (1.0, 10.0, 100.0, 1000.0)
"""Weights of the retain loss that linear maps are fitted with."""


TEXTS = 64
"""Texts of each side: half of them to fit linear maps, half held out."""


LENGTH = 128
"""Tokens that are read of a text."""


TOKENS = 256
"""Tokens of each side that a map is fitted to, and as many that it is tried on."""


READ = 1024
"""Held-out forget tokens, about, that are read once more for every layer."""


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """What was read at one layer's output; BOS and padding do not count."""

    layer: int
    median_norm: float
    """Of forget tokens."""
    mean_norm: float
    growth: float
    """Median norm over that of what enters the layer."""
    passed_on: float
    """Mean relative change of the last layer's output where forget tokens are moved here by their own length."""
    reach: float
    """Share of next-token predictions that these moves change."""
    separability: float | None
    """1 - error of a linear map from the MLP output matrix's inputs to 1 on forget and 0 on retain tokens, both sides'
    mean squared errors added, on tokens held out: 1 is perfect, 0 no better than no map. None where no single matrix
    takes these inputs."""
    retain_moved: tuple[float, ...] | None
    """For each of `ALPHAS`: root mean square move of held-out retain tokens, in units of their median norm, by such a
    map that moves forget tokens by their median norm."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Batches of both sides, some to fit maps to and others to try them on."""

    fit_forget: tuple[Batch, ...]
    fit_retain: tuple[Batch, ...]
    held_forget: tuple[Batch, ...]
    held_retain: tuple[Batch, ...]

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        return iter((self.fit_forget, self.fit_retain, self.held_forget, self.held_retain))


def draw(
    forget: Mapping[str, list[str]],
    retain: list[str],
    tokenizer: PreTrainedTokenizerBase,
    batching: Batching,
    seed: int,
) -> Samples:
    """Texts of both sides, by the seed; each text is either fitted to or held out.

    Raises: CorpusError if a corpus has one text only, EmptyBatchError.
    """
    for name, texts in ((f"forget corpus {name!r}", texts) for name, texts in forget.items()):
        _require_two(name, texts)
    _require_two("retain corpus", retain)
    rng = random.Random(seed)
    each = max(2, TEXTS // len(forget))
    some = {name: rng.sample(texts, min(each, len(texts))) for name, texts in forget.items()}
    others = rng.sample(retain, min(TEXTS, len(retain)))
    reading = replace(batching, max_length=(min(LENGTH, *batching.max_length),), count="no-bos", chunk=False)

    def half(first: int) -> tuple[tuple[Batch, ...], tuple[Batch, ...]]:
        part = {name: texts[first::2] for name, texts in some.items()}
        corpora = TextCorpora(forget=part, retain=others[first::2], tokenizer=tokenizer)
        topics, retained = corpora.topics(reading, torch.Generator().manual_seed(seed))
        # In turn: of the first batches alone some is read, and that should not be one topic.
        turns = itertools.zip_longest(*(topic.batches for topic in topics))
        return tuple(batch for turn in turns for batch in turn if batch is not None), retained

    (fit_forget, fit_retain), (held_forget, held_retain) = half(0), half(1)
    return Samples(fit_forget=fit_forget, fit_retain=fit_retain, held_forget=held_forget, held_retain=held_retain)


def read_layers(
    model: PreTrainedModel,
    samples: Samples,
    progress: Progress,
    *,
    train_modules: Sequence[str] = (),
    seed: int = 0,
) -> tuple[tuple[LayerReading, ...], int]:
    """The readings of every layer, and how many tokens the model read for them.

    Raises: UnknownModuleError, DivergedError.
    """
    depth = len(find_layers(model))
    progress.phase("read layers", 4 + depth)
    parts: list[_Part] = []
    for batches in samples:
        parts.append(_read(model, batches, train_modules, seed))
        progress.advance("norms and inputs")
    norms = [torch.cat([parts[0].norms[k], parts[2].norms[k]]) for k in range(depth + 1)]
    medians = [float(found.median()) for found in norms]
    if not all(map(math.isfinite, medians)):
        raise DivergedError(
            "the untouched model's activations on forget texts are NaN or infinite.\nPass --dtype float32 or bfloat16."
        )
    again = _first(samples.held_forget, READ)
    clean = [_predict(model, batch) for batch in again]
    rows = []
    for k in range(depth):
        reach, passed_on = _reach(model, again, clean, k, seed)
        separability, leaks = _separability([part.inputs[k] for part in parts])
        ratio = medians[k + 1] / float(parts[3].norms[k + 1].median())
        rows.append(
            LayerReading(
                layer=k,
                median_norm=medians[k + 1],
                mean_norm=float(norms[k + 1].mean()),
                growth=medians[k + 1] / medians[k],
                passed_on=passed_on,
                reach=reach,
                separability=separability,
                retain_moved=None if leaks is None else tuple(ratio * leak for leak in leaks),
            )
        )
        progress.advance(f"layer {k}: {100 * reach:.0f} % of predictions change")
    once = sum(_tokens(batches) for batches in samples)
    return tuple(rows), once + (1 + depth) * _tokens(again)


def separate(
    fit: tuple[Float[Tensor, "_ p"], Float[Tensor, "_ p"]],
    held: tuple[Float[Tensor, "_ p"], Float[Tensor, "_ p"]],
    alpha: float,
) -> tuple[float, float]:
    """Held-out errors of the linear map x -> w.x fitted to be 1 on forget and 0 on retain rows (in this order).

    They are the mean squares of w.x - 1 on forget rows and of w.x on retain rows, with the ridge penalty of `GRID`
    that makes the first plus alpha times the second least. Only products between rows are solved for, so the number
    p of inputs hardly matters.
    """
    x = torch.cat(fit).double()
    forget, retain = (len(rows) for rows in fit)
    weights = torch.cat([torch.full((forget,), 1 / forget), torch.full((retain,), alpha / retain)]).double().sqrt()
    gram = weights[:, None] * (x @ x.T) * weights
    target = torch.where(torch.arange(len(x)) < forget, weights, 0)
    scale = float(gram.diagonal().sum()) / x.shape[1]
    products = [(rows.double() @ x.T) * weights for rows in held]
    found = []
    for lam in GRID:
        solution = torch.linalg.solve(gram + lam * scale * torch.eye(len(x), dtype=gram.dtype), target)
        moved, leaked = (product @ solution for product in products)
        found.append((float((moved - 1).square().mean()), float(leaked.square().mean())))
    return min(found, key=lambda errors: errors[0] + alpha * errors[1])


def _separability(inputs: Sequence[Tensor | None]) -> tuple[float | None, tuple[float, ...] | None]:
    """Separability, and for each of `ALPHAS` the root mean square of the map on retain tokens."""
    fit_forget, fit_retain, held_forget, held_retain = inputs
    if fit_forget is None or fit_retain is None or held_forget is None or held_retain is None:
        return None, None
    found = [separate((fit_forget, fit_retain), (held_forget, held_retain), alpha) for alpha in ALPHAS]
    return 1 - sum(found[0]), tuple(math.sqrt(leaked) for _, leaked in found)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """What one pass over a part of the texts showed, on the CPU."""

    norms: list[Tensor]
    """Of every counted token: of what enters layer 0, then of each layer's output."""
    inputs: list[Tensor | None]
    """Of each layer's MLP output matrix, at `TOKENS` counted tokens."""


def _read(model: PreTrainedModel, batches: Sequence[Batch], train_modules: Sequence[str], seed: int) -> _Part:
    layers = find_layers(model)
    owners = {
        layer: owner for layer in range(len(layers)) if (owner := _owner(model, layer, train_modules)) is not None
    }
    counted = sum(int(batch.mask.sum()) for batch in batches)
    order = torch.randperm(counted, generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(counted, dtype=torch.bool)
    taken[order[:TOKENS]] = True
    norms: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    inputs: list[list[Tensor]] = [[] for _ in owners]
    done = 0
    for batch in batches:
        places = batch.mask.flatten().nonzero()[:, 0]
        wanted = places[taken[done : done + len(places)]]
        done += len(places)

        def keep_norms(place: int, h: Tensor, mask: Tensor = batch.mask) -> None:
            norms[place].append(torch.linalg.vector_norm(h.detach().float(), dim=-1).cpu()[mask])

        def keep_inputs(owner: int, x: Tensor, size: int = batch.mask.numel(), wanted: Tensor = wanted) -> None:
            rows = x.detach().reshape(-1, x.shape[-1])
            if len(rows) == size:
                inputs[owner].append(rows[wanted.to(rows.device)].cpu())

        with (
            hooks.inputs([layers[0]], keep_norms),
            hooks.outputs(list(layers), lambda layer, h, keep=keep_norms: keep(layer + 1, h)),
            hooks.inputs(list(owners.values()), keep_inputs),
        ):
            _logits(model, batch)
    rows_of = dict(zip(owners, inputs, strict=True))
    found = [rows_of.get(layer, []) for layer in range(len(layers))]
    return _Part(
        norms=[torch.cat(rows) for rows in norms],
        # A module that is used for some of the tokens only, or several times, is no one matrix on all of them.
        inputs=[torch.cat(rows) if len(rows) == len(batches) else None for rows in found],
    )


def _reach(
    model: PreTrainedModel, batches: Sequence[Batch], clean: Sequence["_Prediction"], layer: int, seed: int
) -> tuple[float, float]:
    """Share of predictions changed by moving each counted token by its own length, and relative change at the end.

    A text's tokens all move along one random direction, as in steering; it is the same at every layer.
    """
    rng = torch.Generator().manual_seed(seed)
    changed, passed = [], []
    for batch, before in zip(batches, clean, strict=True):
        units = torch.stack([random_unit(d_model(model), "uniform", rng) for _ in batch.mask])
        after = _predict(model, batch, moving=(layer, units))
        changed.append(after.tokens != before.tokens)
        passed.append((after.last - before.last).norm(dim=-1) / before.last.norm(dim=-1))
    return float(torch.cat(changed).float().mean()), float(torch.cat(passed).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prediction:
    tokens: Int[Tensor, " token"]
    """The most probable next token at every counted one."""
    last: Float[Tensor, "token d_model"]
    """The last layer's output there, in fp32."""


def _predict(
    model: PreTrainedModel, batch: Batch, moving: tuple[int, Float[Tensor, "batch d_model"]] | None = None
) -> _Prediction:
    layers = find_layers(model)
    last: list[Tensor] = []
    mask = batch.mask.to(device_of(model))
    with (
        _moving(layers[moving[0]], moving[1], mask) if moving else nullcontext(),
        hooks.outputs([layers[-1]], lambda _, h: last.append(h[mask.to(h.device)].float())),
    ):
        logits = _logits(model, batch)
    return _Prediction(tokens=logits[mask.to(logits.device)].argmax(dim=-1).cpu(), last=last[0].cpu())


def _logits(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch pos vocab"]:
    with measuring(model):
        return hooks.forward(model, batch.to(device_of(model))).logits


@contextmanager
def _moving(layer: nn.Module, units: Float[Tensor, "batch d_model"], mask: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Add to each counted token of the layer's output its own length times the row's direction."""

    def move(h: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(h.float(), dim=-1) * mask.to(h.device)
        return h + (lengths[..., None] * units[:, None].to(h.device)).to(h.dtype)

    with hooks.changed(layer, move):
        yield


def _owner(model: PreTrainedModel, layer: int, modules: Sequence[str]) -> nn.Module | None:
    """The module of the first plain matrix that training would change in a layer; None where experts share one."""
    parameters = dict(model.named_parameters())
    names = [name for name in trainable_names(model, layer, tuple(modules)) if parameters[name].ndim == 2]
    return model.get_submodule(names[0].rpartition(".")[0]) if names else None


def _first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches, until they hold so many tokens."""
    found: list[Batch] = []
    for batch in batches:
        if _tokens(found) >= tokens:
            break
        found.append(batch)
    return found


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch.attention_mask.sum()) for batch in batches)


def _require_two(name: str, texts: Sequence[str]) -> None:
    if len(texts) < 2:
        raise CorpusError(
            f"the {name} has {len(texts)} text, and advice needs two: one to fit a map to and one to try it on.\n"
            "Give it more texts, or choose --layer yourself."
        )
