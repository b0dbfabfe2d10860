"""Random unit directions, drawn in fp32 on the CPU so that they are the same on every device."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

DirectionLaw = Literal["uniform", "gaussian"]


def random_unit(d_model: int, law: DirectionLaw, rng: torch.Generator) -> Float[Tensor, "d_model"]:
    """A random direction of length one.

    `uniform` draws every coordinate from [0, 1), as the published code does: all directions then lie in the
    positive orthant and two of them have cosine 0.75. `gaussian` is isotropic: two of them are nearly orthogonal.
    """
    draw = torch.rand if law == "uniform" else torch.randn
    vector = draw(d_model, generator=rng)
    return vector / vector.norm()
