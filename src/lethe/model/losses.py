"""Losses and similarities: pure functions on tensors, each over counted tokens only."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from lethe.errors import EmptyBatchError


def masked_mse(
    h: Float[Tensor, "batch pos d_model"],
    target: Float[Tensor, "#batch #pos d_model"],
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Mean squared error per coordinate over the counted tokens, in the dtype of `h` and `target`.

    What stands on other positions changes neither the loss nor a gradient, be it NaN. With an all-True mask it is
    `mse_loss` bit for bit, gradients included: RMU's published code averages over padding, too.

    Raises: EmptyBatchError if the mask is all False.
    """
    # Reading the count waits for the device: an empty batch must be an error, not a NaN that trains.
    counted = int(mask.sum())
    if counted == 0:
        raise EmptyBatchError(
            f"no token counts in a batch of {mask.shape[0]} rows of {mask.shape[1]} tokens.\n"
            "Drop texts that hold nothing but BOS, or count all tokens."
        )
    keep = mask[..., None]
    return mse_loss(torch.where(keep, h, 0), torch.where(keep, target, 0)) * (mask.numel() / counted)


def cosine(a: Float[Tensor, "*batch d_model"], b: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
    """Cosine between the vectors of the last axis, in fp32; exactly 1 where they are equal, 0 where one is zero."""
    a, b = a.float(), b.float()
    # One root of the product, not a product of roots: sqrt(x * x) is exactly x, so equal vectors give exactly 1.
    lengths = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return (a * b).sum(-1) / lengths.clamp_min(torch.finfo(torch.float32).tiny)


def token_log_probs(logits: Float[Tensor, "*batch vocab"], ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Log-probability, in fp32, that the logits give to each token id."""
    return -cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none").view(ids.shape)


def masked_mean(values: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean over the tokens that count; what stands elsewhere changes neither it nor a gradient, be it NaN.

    Raises: EmptyBatchError if the mask is all False.
    """
    counted = int(mask.sum())
    if counted == 0:
        raise EmptyBatchError(
            f"no token is predicted in a batch of {mask.shape[0]} rows of {mask.shape[1]} tokens.\n"
            "Drop texts of fewer than two tokens."
        )
    return torch.where(mask, values, 0).sum() / counted


def divergence(
    frozen: Float[Tensor, "batch pos vocab"], now: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, "batch pos"]:
    """KL divergence in nats from one distribution to another at each position, both as log-probabilities."""
    return (frozen.exp() * (frozen - now)).sum(-1)
