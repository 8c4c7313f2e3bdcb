"""The Bradley-Terry loss of a reward model against TRL's trainer and OpenRLHF's module: value and gradient."""

import pytest
import torch

from megatron_rema.algorithm.preference import bradley_terry
from tests.golden import oracles
from tests.golden.oracles import agree, agree_gradients

# torch's softplus is a straight line from 20 on, where log sigmoid still has e^-20 = 2e-9: float64 would not agree further than that
TOLERANCE = {torch.float32: 5e-6, torch.float64: 2e-9}


def random_scores(seed: int, dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen, rejected (leaves) and margins; gaps up to some 30, where exp alone would lose the loss's digits."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (8.0 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    margin_N = torch.rand(shape[0], generator=generator, dtype=torch.float64).to(dtype)
    return chosen.clone().requires_grad_(), rejected.clone().requires_grad_(), margin_N


def gradients(loss, *leaves):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, retain_graph=True)])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_mean_pair(seed, dtype, centering, with_margin):
    chosen_N, rejected_N, margin_N = random_scores(seed, dtype, 37)
    margin_N = margin_N if with_margin else None
    weights_N = torch.full((37,), 1 / 37, dtype=dtype)
    loss, _ = bradley_terry(chosen_N, rejected_N, margin_N=margin_N, centering=centering, weights_N=weights_N)
    theirs = {"trl RewardTrainer": oracles.trl_reward_loss(chosen_N, rejected_N, margin_N=margin_N, centering=centering)}
    if not centering:
        theirs["OpenRLHF PairWiseLoss"] = oracles.openrlhf()[0].PairWiseLoss()(chosen_N, rejected_N, margin_N)
    for name, value in theirs.items():
        agree("bradley_terry", name, loss, value, tolerance=TOLERANCE[dtype])
        leaves = chosen_N, rejected_N
        agree_gradients("bradley_terry", name, gradients(loss, *leaves), gradients(value, *leaves), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(5))
def test_an_ensemble_is_the_mean_of_its_heads_losses(seed):
    chosen_NK, rejected_NK, margin_N = random_scores(seed, torch.float64, 20, 3)
    weights_N = torch.full((20,), 1 / 20, dtype=torch.float64)
    loss, _ = bradley_terry(chosen_NK, rejected_NK, margin_N=margin_N, centering=0.01, weights_N=weights_N)
    of_heads = [oracles.trl_reward_loss(chosen_NK[:, k], rejected_NK[:, k], margin_N=margin_N, centering=0.01) for k in range(3)]
    theirs, leaves = torch.stack(of_heads).mean(), (chosen_NK, rejected_NK)
    names, tolerance = ("bradley_terry, heads", "trl RewardTrainer"), TOLERANCE[torch.float64]
    agree(*names, loss, theirs, tolerance=tolerance)
    agree_gradients(*names, gradients(loss, *leaves), gradients(theirs, *leaves), tolerance=tolerance)
