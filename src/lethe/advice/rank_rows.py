"""Which retain rows fight the forget corpora, and which forget rows are generic text: class-wise gradient similarity.

A row's feature is the gradient, at the matrices that would be trained, of its tokens' mean activation along one random
direction: where a steering loss first moves them. Two rows with the same gradient move together, whatever the method.
"""

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from lethe.data import batches
from lethe.data.data_folder import Row
from lethe.errors import CorpusError, EmptyBatchError
from lethe.methods.directions import random_unit
from lethe.model.slice import LayerSlice
from lethe.system.atomic_files import write_json, write_text
from lethe.system.progress import Progress
from lethe.types import Batch

NUMBERS = 8192
"""Numbers of a row's feature, at most: 32 KB in fp32, so 50 000 rows take 1.6 GB beside the loaded layers."""


@dataclass(frozen=True, kw_only=True)
class RankedRow:
    """A row of one side with its similarities, each a mean cosine in [-1, 1]."""

    source: str
    """The file."""
    number: int
    """Its line or row there."""
    topic: str
    """Its own class."""
    score: float
    """What it is ranked by: of a retain row `other`; of a forget row `other` minus `own`."""
    other: float
    """To the other side: of a retain row the highest over forget topics, of a forget row the lowest over retain
    topics."""
    nearest: str
    """The class that `other` is of."""
    own: float
    """To the other rows of its own class; 0 if there are none."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Rows of both sides, those first that their user should look at first."""

    layer: int
    trained: tuple[str, ...]
    """The matrices whose gradients were compared."""
    numbers: int
    """Numbers of a row's feature."""
    left_out: int
    """Rows that this tokenizer turns into nothing."""
    retain: tuple[RankedRow, ...]
    """Those that fight the forget corpora most first."""
    forget: tuple[RankedRow, ...]
    """The most generic first."""

    def save(self, path: Path) -> Path:
        """Write as JSON, or as CSV where the name ends so."""
        if path.suffix.lower() != ".csv":
            return write_json(path, dataclasses.asdict(self))
        content = io.StringIO()
        names = [field.name for field in dataclasses.fields(RankedRow)]
        table = csv.writer(content, lineterminator="\n")
        table.writerow(["side", *names])
        for side, rows in (("retain", self.retain), ("forget", self.forget)):
            table.writerows([side, *(getattr(row, name) for name in names)] for row in rows)
        return write_text(path, content.getvalue())


def rank(
    layers: LayerSlice,
    tokenizer: PreTrainedTokenizerBase,
    forget: Mapping[str, Sequence[Row]],
    retain: Mapping[str, Sequence[Row]],
    *,
    max_length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ranking:
    """Rank rows, given by file; a row's class is its topic, or its file's name.

    What all rows have in common, the mean over classes, is taken out of each feature first: without, a row that is
    typical of any text is near to everything.
    Raises: CorpusError if a side has no row that the tokenizer can read.
    Source: class-wise influence scores, arXiv 2305.01384, with cosines of gradients at the trained matrices.
    """
    rows = [
        (side, Path(source).name, row, row.topic or Path(source).stem)
        for side, files in (("forget", forget), ("retain", retain))
        for source, found in files.items()
        for row in found
    ]
    if progress:
        progress.phase("gradients", len(rows))
    rng = torch.Generator().manual_seed(seed)
    direction = random_unit(layers.d_model, "gaussian", rng).to(layers.device)
    sketches = [
        Sketch((matrix.shape[0], matrix.shape[1]), NUMBERS // len(layers.trained), layers.device, rng)
        for matrix in (parameter.flatten(0, -2) for parameter in layers.trained.values())
    ]
    kept, features = [], []
    for row in rows:
        batch = _batch(row[2].text, tokenizer, max_length)
        if batch is not None:
            kept.append(row)
            found = zip(sketches, gradients(layers, batch, direction), strict=True)
            features.append(torch.cat([sketch(gradient.flatten(0, -2)) for sketch, gradient in found]).cpu())
        if progress:
            progress.advance()
    for side in ("forget", "retain"):
        if not any(row[0] == side for row in kept):
            raise CorpusError(f"no row of the {side} corpus is one that this tokenizer can read.\nGive other texts.")
    own, others = similarities(torch.stack(features), [(side, topic) for side, _, _, topic in kept])
    ranked: dict[str, list[RankedRow]] = {"forget": [], "retain": []}
    for place, (side, source, row, topic) in enumerate(kept):
        by_class = {name: float(found[place]) for (other, name), found in others.items() if other != side}
        nearest = (min if side == "forget" else max)(by_class, key=by_class.__getitem__)
        other, mine = by_class[nearest], float(own[place])
        ranked[side].append(
            RankedRow(
                source=source,
                number=row.number,
                topic=topic,
                score=other - mine if side == "forget" else other,
                other=other,
                nearest=nearest,
                own=mine,
            )
        )
    for found in ranked.values():
        found.sort(key=lambda row: -row.score)
    return Ranking(
        layer=layers.stop_at_layer - 1,
        trained=tuple(layers.trained),
        numbers=len(features[0]),
        left_out=len(rows) - len(kept),
        retain=tuple(ranked["retain"]),
        forget=tuple(ranked["forget"]),
    )


def similarities(
    features: Float[Tensor, "rows numbers"], classes: Sequence[tuple[str, str]]
) -> tuple[Float[Tensor, "rows"], dict[tuple[str, str], Float[Tensor, "rows"]]]:
    """Each row's mean cosine to the other rows of its class (0 if there are none), and to every row of each class."""
    members: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for place, name in enumerate(classes):
        members[name].append(place)
    features = normalize(features, dim=1)
    common = torch.stack([features[places].mean(dim=0) for places in members.values()]).mean(dim=0)
    features = normalize(features - common, dim=1)
    to_class = {name: features @ features[places].mean(dim=0) for name, places in members.items()}
    own = torch.zeros(len(classes))
    for name, places in members.items():
        if len(places) > 1:
            own[places] = (to_class[name][places] * len(places) - features[places].square().sum(1)) / (len(places) - 1)
    return own, to_class


def gradients(
    layers: LayerSlice, batch: Batch, direction: Float[Tensor, "d_model"]
) -> tuple[Float[Tensor, "..."], ...]:
    """What raises the mean activation of a batch's tokens along a direction: a gradient for each trained matrix."""
    recording = layers.record(batch)
    along = (layers(recording)[recording.batch.mask].float() @ direction).mean()
    return torch.autograd.grad(along, list(layers.trained.values()))


class Sketch:
    """Matrices of one shape as short vectors whose inner products are nearly the matrices' own.

    Entry (i, j) is added, with a random sign, to place h1(i) + h2(j) of the vector. One narrow random matrix on each
    side, the usual choice, does badly here: these gradients are nearly of rank one, and then of the product of two
    widths only one is left to tell rows apart.
    Source: TensorSketch, Pham and Pagh, KDD 2013.
    """

    def __init__(self, shape: tuple[int, int], numbers: int, device: torch.device, rng: torch.Generator):
        self.places, self.signs = [], []
        for size in shape:
            self.places.append(torch.randint(numbers, (size,), generator=rng).to(device))
            self.signs.append((torch.randint(2, (size,), generator=rng) * 2.0 - 1).to(device))
        self.numbers = numbers

    def __call__(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "numbers"]:
        """The matrix's vector, in fp32."""
        signed = matrix.float() * self.signs[0][:, None] * self.signs[1]
        by_row = signed.new_zeros(len(signed), self.numbers).index_add_(1, self.places[1], signed)
        back = (torch.arange(self.numbers, device=matrix.device) - self.places[0][:, None]) % self.numbers
        return by_row.gather(1, back).sum(dim=0)


def _batch(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Batch | None:
    """A text as a batch of one; None if the tokenizer turns it into nothing."""
    rows = batches.encode_rows([text], tokenizer, max_length=max_length)
    try:
        found = batches.batches(rows, tokenizer, batch_size=1, count="no-bos", padding_side="right")
    except EmptyBatchError:
        return None
    return found[0] if found else None
