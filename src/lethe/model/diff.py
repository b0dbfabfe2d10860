"""What differs between two checkpoints: which tensors, by how much, and of what rank."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lethe.model.checkpoint_files import checkpoint_files, model_folder, read_tensor


@dataclass(frozen=True, kw_only=True)
class TensorDiff:
    """How one tensor differs between two checkpoints."""

    name: str
    kind: Literal["changed", "dtype", "shape", "missing", "added"]
    """`dtype`: the same values, only stored in another dtype; `missing` and `added` as seen from the base."""
    layer: int | None
    shape: tuple[int, ...]
    """In the base, or where it is added."""
    relative_norm: float | None = None
    """Norm of the difference over the norm of the base tensor; for `changed`."""
    effective_rank: float | None = None
    """exp of the entropy of the difference's normalised singular values; for `changed` matrices.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """


def diff(base: str | Path, other: str | Path) -> list[TensorDiff]:
    """The tensors that differ between two checkpoints, in the order of their names; one pair in memory at a time.

    Where the dtypes differ, the base is first cast to the other's: rounding is not an edit.

    Raises: ModelError.
    """
    ours, theirs = (checkpoint_files(model_folder(model)) for model in (base, other))
    rows = []
    for name in sorted(ours.keys() | theirs.keys(), key=_numbers_in_order):
        before = read_tensor(ours, name) if name in ours else None
        after = read_tensor(theirs, name) if name in theirs else None
        row = _compare(name, before, after)
        if row is not None:
            rows.append(row)
    return rows


def _compare(name: str, before: Tensor | None, after: Tensor | None) -> TensorDiff | None:
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    layer = int(number[1]) if number else None
    if before is None or after is None:
        shape = tuple((after if before is None else before).shape)  # pyright: ignore[reportOptionalMemberAccess]
        return TensorDiff(name=name, kind="added" if before is None else "missing", layer=layer, shape=shape)
    shape = tuple(before.shape)
    if before.shape != after.shape:
        return TensorDiff(name=name, kind="shape", layer=layer, shape=shape)
    cast = before.to(after.dtype)
    if torch.equal(cast, after):
        return None if before.dtype == after.dtype else TensorDiff(name=name, kind="dtype", layer=layer, shape=shape)
    difference = after.float() - cast.float()
    norm = torch.linalg.vector_norm(before.float()).item()
    return TensorDiff(
        name=name,
        kind="changed",
        layer=layer,
        shape=shape,
        relative_norm=torch.linalg.vector_norm(difference).item() / norm if norm else float("inf"),
        effective_rank=_effective_rank(difference) if difference.ndim == 2 else None,
    )


def _effective_rank(matrix: Float[Tensor, "rows columns"]) -> float:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(8192):
        gram += rows.double().T @ rows.double()
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = values / values.sum()
    return torch.special.entr(p).sum().exp().item()


def _numbers_in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
