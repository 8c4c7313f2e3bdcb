"""GAE over own tokens against verl's, which skips observed tokens the same way. Ours return float32: tolerance 2e-6."""

import pytest
import torch

from megatron_rema.algorithm.gae import gae
from tests.golden.batches import Batch, random_batch
from tests.golden.oracles import agree

NAME = "verl compute_gae_advantage_return"


@pytest.fixture(scope="module")
def verl():
    from verl.trainer.ppo import core_algos

    return core_algos


def rewards_and_values(batch: Batch, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A reward and a value at every own token."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BL, values_BL = torch.randn(2, *batch.valid_BL.shape, generator=generator, dtype=torch.float64).to(dtype)
    return rewards_BL * batch.mask_BL, values_BL * batch.mask_BL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_one_level(verl, seed, discount, gae_lambda, dtype):
    """One discount and lambda for both levels. verl whitens its advantages (and ours are whitened by verl's function to compare)."""
    from verl.utils.torch_functional import masked_whiten

    batch = random_batch(seed)
    rewards_BL, values_BL = rewards_and_values(batch, seed, dtype)
    mask_BL = batch.mask_BL.to(dtype)
    theirs_BL, their_returns_BL = verl.compute_gae_advantage_return(rewards_BL, values_BL, mask_BL, discount, gae_lambda)
    ours_T, our_returns_T = gae(
        batch.pack(rewards_BL), batch.pack(values_BL), **batch.ids(),
        discount=discount, gae_lambda=gae_lambda, turn_discount=discount, turn_lambda=gae_lambda,
    )  # fmt: skip
    agree("gae returns", NAME, batch.unpack(our_returns_T), their_returns_BL * mask_BL, tolerance=2e-6)
    whitened_BL = masked_whiten(batch.unpack(ours_T).to(dtype), mask_BL) * mask_BL
    agree("gae advantages", NAME, whitened_BL, theirs_BL * mask_BL, tolerance=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_turn_discount_and_lambda_between_turns_of_one_token(verl, seed):
    """Turns of one token have no step inside a turn: only the turn's own discount and lambda act."""
    batch = random_batch(seed, max_turns=6, max_tokens=1)
    rewards_BL, values_BL = rewards_and_values(batch, seed, torch.float64)
    _, theirs_BL = verl.compute_gae_advantage_return(rewards_BL, values_BL, batch.mask_BL.double(), 0.9, 0.7)
    _, ours_T = gae(
        batch.pack(rewards_BL), batch.pack(values_BL), **batch.ids(), discount=0.1, gae_lambda=0.2, turn_discount=0.9, turn_lambda=0.7
    )
    agree("gae returns, turn level", NAME, batch.unpack(ours_T), theirs_BL * batch.mask_BL, tolerance=2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_turn_discount_makes_every_turn_an_episode(verl, seed):
    """turn_discount 0: verl sees each turn as a row of its own."""
    batch = random_batch(seed)
    rewards_BL, values_BL = rewards_and_values(batch, seed, torch.float64)
    mask_KM = batch.turn_rows(batch.mask_BL.double())
    _, theirs_KM = verl.compute_gae_advantage_return(batch.turn_rows(rewards_BL), batch.turn_rows(values_BL), mask_KM, 0.9, 0.7)
    _, ours_T = gae(
        batch.pack(rewards_BL), batch.pack(values_BL), **batch.ids(), discount=0.9, gae_lambda=0.7, turn_discount=0.0, turn_lambda=1.0
    )
    agree("gae returns, token level", NAME, batch.turn_rows(batch.unpack(ours_T)), theirs_KM * mask_KM, tolerance=2e-6)
