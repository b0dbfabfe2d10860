"""Requests to unlearn as the ridge solver keeps them: sums of a corpus's statistics, added and withdrawn exactly.

All sums are taken on the untouched model, so that the edit for several requests is the solution of one problem, and
the edit without one of them is the one that never held it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lethe.errors import RunFolderError, UnknownNameError, UsageError
from lethe.solvers.sums import Moments
from lethe.system import tensor_file
from lethe.types import RUN_FORMAT


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """What one request adds to the problem of one matrix; a part of the rows may be held out to choose lambda."""

    forget: dict[str, Moments] = field(repr=False)
    """By topic."""
    retain: Moments = field(repr=False)
    held_forget: dict[str, Moments] = field(default_factory=dict, repr=False)
    held_retain: Moments | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One request: the sums of its corpora, by the name of the edited matrix."""

    name: str
    """The run folder it was made in."""
    coefficient: float
    sums: dict[str, Sums] = field(repr=False)


def check_fit(earlier: Sequence[Request], name: str, matrices: Sequence[str]) -> None:
    """Refuse a request that cannot join the earlier ones.

    Raises: UsageError if one has its name already, or edits other matrices.
    """
    for request in earlier:
        if request.name == name:
            raise UsageError(
                f"there is a request '{name}' already.\nA request is named by its run folder: choose another --out."
            )
        if set(request.sums) != set(matrices):
            raise UsageError(
                f"request '{request.name}' edits {', '.join(request.sums)}, this one {', '.join(matrices)}; "
                "one problem has one set of matrices.\nPass the same --layer and --train-layers."
            )


def withdraw(requests: Sequence[Request], name: str) -> tuple[Request, ...]:
    """The requests without the one of that name.

    Raises: UnknownNameError if there is none; UsageError if no other would be left.
    """
    names = [request.name for request in requests]
    if name not in names:
        raise UnknownNameError(f"there is no request '{name}' to withdraw.\nThe run holds {', '.join(names)}.")
    if len(requests) == 1:
        raise UsageError(f"'{name}' is the only request: without it the model is the untouched base.\nUse the base.")
    return tuple(request for request in requests if request.name != name)


def save(requests: Sequence[Request], path: Path) -> None:
    """Write all requests as one safetensors file, whole or not at all.

    Raises: SaveError.
    """
    tensors: dict[str, Tensor] = {}
    about = []
    for request in requests:
        parts = []
        for number, (parameter, part, topic, moments) in enumerate(_parts(request)):
            kept = {"gram": moments.gram, "cross": moments.cross, "slope": moments.slope}
            tensors |= {f"{len(about)}/{number}/{key}": value for key, value in kept.items() if value is not None}
            parts.append([parameter, part, topic, moments.tokens, moments.squares])
        about.append({"name": request.name, "coefficient": request.coefficient, "parts": parts})
    tensor_file.save(path, tensors, {"format": RUN_FORMAT, "requests": about})


def load(path: Path) -> tuple[Request, ...]:
    """The requests that `save` wrote.

    Raises: RunFolderError if there are none, or the file is damaged.
    """
    if not path.is_file():
        raise RunFolderError(
            f"{path.parent} kept no sums, so no request can be added to it or withdrawn in closed form.\n"
            "Make it with --solver ridge (and without --no-keep-sums), or pass --solver gradient."
        )

    def damaged(reason: str) -> RunFolderError:
        return RunFolderError(f"{path} is damaged: {reason}.\nMake the run again.")

    with tensor_file.reading(path, damaged) as (tensors, about):
        if about["format"] > RUN_FORMAT:
            raise RunFolderError(f"{path} was written by a newer Lethe.\nUpgrade lethe-unlearn.")
        return tuple(_request(number, request, tensors) for number, request in enumerate(about["requests"]))


def _parts(request: Request) -> Iterator[tuple[str, str, str, Moments]]:
    for parameter, sums in request.sums.items():
        for part, of_topics in (("forget", sums.forget), ("held_forget", sums.held_forget)):
            for topic, moments in of_topics.items():
                yield parameter, part, topic, moments
        for part, moments in (("retain", sums.retain), ("held_retain", sums.held_retain)):
            if moments is not None:
                yield parameter, part, "", moments


def _request(place: int, about: dict[str, Any], tensors: dict[str, Tensor]) -> Request:
    found: dict[str, dict[str, Any]] = {}
    for number, (parameter, part, topic, tokens, squares) in enumerate(about["parts"]):
        key = f"{place}/{number}"
        moments = Moments(
            tokens=tokens,
            gram=tensors[f"{key}/gram"],
            cross=tensors.get(f"{key}/cross"),
            slope=tensors.get(f"{key}/slope"),
            squares=tuple(squares),
        )
        sums = found.setdefault(parameter, {"forget": {}, "held_forget": {}})
        if topic:
            sums[part][topic] = moments
        else:
            sums[part] = moments
    return Request(
        name=about["name"],
        coefficient=about["coefficient"],
        sums={parameter: Sums(**sums) for parameter, sums in found.items()},
    )
