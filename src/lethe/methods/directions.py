"""Random vectors: unit directions, drawn in fp32 on the CPU so that they are the same on every device, and noise."""

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


def gaussian_like(h: Tensor, rng: torch.Generator) -> Tensor:
    """Independent standard normal numbers in the shape, dtype and place of `h`.

    They are drawn on the device of `h`, which differs between devices but costs next to nothing there; their seed is
    drawn from `rng`, so a run repeats, and resumes, bit for bit on the device that it began on.
    """
    seed = int(torch.randint(2**62, (1,), generator=rng))
    there = torch.Generator(h.device).manual_seed(seed)
    return torch.randn(h.shape, generator=there, device=h.device, dtype=torch.float32).to(h.dtype)
