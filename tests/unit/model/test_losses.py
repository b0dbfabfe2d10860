import pytest
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from lethe.errors import EmptyBatchError
from lethe.model.losses import cosine, masked_mse, token_log_probs


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_mse_is_mse_loss_bit_for_bit_where_everything_counts(rng: torch.Generator, dtype: torch.dtype) -> None:
    ours = torch.randn(3, 7, 33, generator=rng).to(dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    target = torch.randn(3, 7, 33, generator=rng).to(dtype)

    loss = masked_mse(ours, target, torch.ones(3, 7, dtype=torch.bool))
    expected = mse_loss(theirs, target)
    (100 * loss).backward()
    (100 * expected).backward()

    assert torch.equal(loss, expected)
    assert torch.equal(ours.grad, theirs.grad)


def test_masked_mse_averages_over_counted_tokens_and_coordinates(rng: torch.Generator) -> None:
    h, target = torch.randn(2, 4, 5, generator=rng), torch.randn(2, 4, 5, generator=rng)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])

    expected = mse_loss(h[mask], target[mask])

    torch.testing.assert_close(masked_mse(h, target, mask), expected)


def test_masked_mse_broadcasts_one_target_vector(rng: torch.Generator) -> None:
    h, target = torch.randn(2, 4, 5, generator=rng), torch.randn(1, 1, 5, generator=rng)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])

    full = masked_mse(h, target.expand(2, 4, 5).clone(), mask)

    assert torch.equal(masked_mse(h, target, mask), full)


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf")])
def test_masked_mse_never_sees_padding(rng: torch.Generator, junk: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = torch.randn(2, 3, 5, generator=rng)
    target = torch.randn(2, 3, 5, generator=rng)
    dirty, dirty_target = clean.clone(), target.clone()
    dirty[~mask] = junk
    dirty_target[~mask] = junk
    clean.requires_grad_()
    dirty.requires_grad_()

    loss, dirty_loss = masked_mse(clean, target, mask), masked_mse(dirty, dirty_target, mask)
    loss.backward()
    dirty_loss.backward()

    assert torch.equal(loss, dirty_loss)
    assert torch.equal(clean.grad, dirty.grad)
    assert torch.equal(dirty.grad[~mask], torch.zeros_like(dirty.grad[~mask]))


def test_masked_mse_refuses_a_batch_without_a_counted_token() -> None:
    h = torch.zeros(2, 3, 4)
    with pytest.raises(EmptyBatchError) as error:
        masked_mse(h, h, torch.zeros(2, 3, dtype=torch.bool))
    assert str(error.value) == (
        "no token counts in a batch of 2 rows of 3 tokens.\nDrop texts that hold nothing but BOS, or count all tokens."
    )


def test_cosine_of_equal_vectors_is_exactly_one(rng: torch.Generator) -> None:
    for scale in (1e-6, 1.0, 1e5):
        h = torch.randn(500, 96, generator=rng) * scale
        assert torch.equal(cosine(h, h.clone()), torch.ones(500))


def test_cosine_agrees_with_torch_and_survives_zero(rng: torch.Generator) -> None:
    a, b = torch.randn(4, 6, 8, generator=rng), torch.randn(4, 6, 8, generator=rng)
    torch.testing.assert_close(cosine(a, b), cosine_similarity(a, b, dim=-1))
    assert torch.equal(cosine(torch.zeros(3, 8), torch.ones(3, 8)), torch.zeros(3))


def test_token_log_probs_picks_from_log_softmax_in_fp32(rng: torch.Generator) -> None:
    logits = torch.randn(2, 5, 11, generator=rng).bfloat16()
    ids = torch.randint(11, (2, 5), generator=rng)
    expected = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    found = token_log_probs(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
