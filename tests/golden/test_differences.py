"""Where public implementations and ours give different numbers, each difference shown by running both; docs/algorithms.md lists them."""

import math

import numpy as np
import pytest
import torch

from megatron_rema.algorithm.advantage import group_advantage
from megatron_rema.algorithm.kl import kl_estimate
from megatron_rema.algorithm.losses import aggregation_weights, policy_loss
from megatron_rema.algorithm.masked import weighted_whiten
from tests.golden import oracles

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.fixture(scope="module")
def verl():
    from verl.trainer.ppo import core_algos

    return core_algos


@pytest.fixture(scope="module")
def openrlhf():
    return oracles.openrlhf()


def verl_advantages(function, rewards_N: torch.Tensor, uids_N: list) -> torch.Tensor:
    """Outcome rewards of one token each."""
    return function(rewards_N[:, None], torch.ones(len(rewards_N), 1), index=np.array(uids_N))[0][:, 0]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_has_no_advantage_here_and_its_raw_reward_in_verl(verl, estimator):
    """Nothing to compare with is 0 here. verl takes mean 0 and standard deviation 1."""
    rewards_N = torch.tensor([0.7])
    function = verl.compute_rloo_outcome_advantage if estimator == "rloo" else verl.compute_grpo_outcome_advantage
    assert verl_advantages(function, rewards_N, ["a"]).item() == pytest.approx(0.7, abs=1e-5)
    assert group_advantage(rewards_N, torch.tensor([3]), estimator=estimator).item() == 0.0


def test_equal_rewards_have_no_advantage_here_and_a_rounding_in_verl(verl):
    """Seven rewards of 0.1: verl's float32 mean is one rounding off, and dividing by std + 1e-6 magnifies it to about 0.5%."""
    rewards_N = torch.full((7,), 0.1)
    theirs_N = verl_advantages(verl.compute_grpo_outcome_advantage, rewards_N, ["a"] * 7)
    assert 1e-3 < theirs_N.abs().max() < 1e-1
    assert (group_advantage(rewards_N, torch.zeros(7, dtype=torch.long), estimator="grpo") == 0.0).all()


def test_any_integer_names_a_group_here_and_an_index_in_verls_vectorised_grpo(verl):
    rewards_N, groups_N = torch.tensor([1.0, 0.0, 1.0, 0.0]), [-1, -1, 2, 2]
    with pytest.raises(IndexError):
        verl_advantages(verl.compute_grpo_vectorized_outcome_advantage, rewards_N, groups_N)
    ours_N = group_advantage(rewards_N, torch.tensor(groups_N), estimator="dr_grpo")
    assert ours_N.tolist() == [0.5, -0.5, 0.5, -0.5]


def test_beyond_ten_nats_verl_and_openrlhf_no_longer_pull_back(verl, openrlhf):
    """A token 5 nats below the reference has k3 = e^5 - 6 and the strongest pull here; theirs is 10 with gradient 0. OpenRLHF cuts k1 and
    k2 there too."""
    logprobs_T = torch.tensor([-7.0], requires_grad=True)
    ref_T = torch.tensor([-2.0])
    ours_T = kl_estimate(logprobs_T, ref_T, estimator="k3")
    assert ours_T.item() == pytest.approx(math.exp(5) - 6, rel=1e-6)
    assert torch.autograd.grad(ours_T.sum(), logprobs_T)[0].item() == pytest.approx(1 - math.exp(5), rel=1e-6)
    theirs = [
        verl.kl_penalty(logprobs_T, ref_T, "k3"),
        openrlhf[1].compute_approx_kl(logprobs_T, ref_T, kl_estimator="k3"),
        openrlhf[1].compute_approx_kl(logprobs_T, ref_T, kl_estimator="k2"),
    ]
    for theirs_T in theirs:
        assert theirs_T.item() == 10.0
        assert torch.autograd.grad(theirs_T.sum(), logprobs_T)[0].item() == 0.0


def test_one_token_cannot_be_whitened_by_verl():
    """Its variance is the sample's, divided by n - 1; ours is the population's, and a value alone has distance 0 from its mean."""
    from verl.utils.torch_functional import masked_whiten

    with pytest.raises(ValueError, match="division by zero"):
        masked_whiten(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0]))
    assert weighted_whiten(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_ratio_of_200_nats_gives_nan_in_trl_and_openrlhfs_gspo(verl, openrlhf, advantage):
    """exp overflows before the clip, whose gradient 0 times infinity is NaN: for TRL's token ratio, and for the sequence ratio of both.
    verl caps the log ratio first, as ours does; so does OpenRLHF for token ratios."""
    logprobs_BL = torch.tensor([[200.0 - 1.0]], requires_grad=True)
    old_BL, advantages_BL, mask_BL = torch.tensor([[-1.0]]), torch.tensor([[advantage]]), torch.ones(1, 1)
    gspo = openrlhf[0].PolicyLoss(dual_clip=3.0, policy_loss_type="gspo")
    trl = {"dual_clip": 3.0, **CLIP}
    breaks = [
        oracles.trl_grpo_loss(logprobs_BL, old_BL, advantages_BL, mask_BL, level="token", loss_type="bnpo", **trl),
        oracles.trl_grpo_loss(logprobs_BL, old_BL, advantages_BL, mask_BL, level="sequence", loss_type="grpo", **trl),
        gspo(logprobs_BL, old_BL, advantages_BL, mask_BL)[0],
    ]
    one_T, ids_T = torch.ones(1), torch.zeros(1, dtype=torch.long)
    ours, _ = policy_loss(
        logprobs_BL[0], old_BL[0], advantages_BL[0], one_T, ids_T, ids_T, one_T.bool(), num_turns=1, level="trace", **CLIP
    )
    ppo = openrlhf[0].PolicyLoss(dual_clip=3.0)
    holds = [
        ours,
        verl.compute_policy_loss_vanilla(old_BL, logprobs_BL, advantages_BL, mask_BL, config=oracles.verl_actor_config())[0],
        ppo(logprobs_BL, old_BL, advantages_BL, mask_BL)[0],
    ]
    assert all(torch.autograd.grad(loss, logprobs_BL)[0].isnan().all() for loss in breaks)
    assert [torch.autograd.grad(loss, logprobs_BL)[0].item() for loss in holds] == [0.0, 0.0, 0.0]


def test_a_trace_without_a_trained_token_dilutes_trls_mean(verl, openrlhf):
    """Two traces, one with nothing to train, advantage 1 and ratio 1: the mean trace's loss is -1, and -1/2 in TRL."""
    zeros_BL, ones_BL, mask_BL = torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    theirs = oracles.trl_grpo_loss(zeros_BL, zeros_BL, ones_BL, mask_BL, level="token", loss_type="grpo", dual_clip=None, **CLIP)
    assert theirs.item() == -0.5
    assert verl.agg_loss(-ones_BL, mask_BL, "seq-mean-token-mean").item() == pytest.approx(-1.0)
    assert openrlhf[0].aggregate_loss(-ones_BL, mask_BL, token_level_loss=False).item() == pytest.approx(-1.0)
    ids_T, mask_T = torch.tensor([0, 0, 1, 1]), mask_BL.flatten().bool()
    weights_T = aggregation_weights(
        ids_T, ids_T, mask_T, num_turns=2, aggregation="episode",
        num_tokens_global=2, num_turns_global=1, num_traces_global=1, max_turns=1,
    )  # fmt: skip
    assert -weights_T.sum().item() == -1.0


def test_a_microbatch_without_a_trained_token_is_nan_in_verl_and_openrlhf(verl, openrlhf):
    """Unless they are told the global counts, 0 / 0. Ours are always told."""
    ones_BL, mask_BL = torch.ones(2, 2), torch.zeros(2, 2)
    assert verl.agg_loss(ones_BL, mask_BL, "token-mean").isnan() and verl.agg_loss(ones_BL, mask_BL, "seq-mean-token-mean").isnan()
    assert all(openrlhf[0].aggregate_loss(ones_BL, mask_BL, token_level_loss=token_level).isnan() for token_level in (True, False))
    ids_T = torch.zeros(4, dtype=torch.long)
    weights_T = aggregation_weights(
        ids_T, ids_T, torch.zeros(4, dtype=torch.bool), num_turns=1, aggregation="episode",
        num_tokens_global=7, num_turns_global=3, num_traces_global=2, max_turns=1,
    )  # fmt: skip
    assert weights_T.tolist() == [0.0] * 4
