"""What a role's reward is compared with other than its own group: its past, its plan's samples, episodes without its plan. Pure.

Shapes: N traces (or episodes), R roles, P plans.
Sources: reinforcement comparison, Williams 1992 (doi:10.1007/BF00992696) with the bias correction of Adam arXiv:1412.6980 algorithm 1;
reasoner samples per plan ReMA arXiv:2503.09501 section 3; counterfactual baseline COMA arXiv:1705.08926 eq. 4, after the difference
rewards of Wolpert and Tumer 2001. Means are taken in float64, as in advantage.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rema.algorithm.masked import segment_count_K, segment_mean_K, segment_sum_K, spread_T


@dataclass(frozen=True)
class RunningMean:
    """An exponential moving average a role: mean = sums / weights. Weight 0: no reward was seen yet."""

    sums_R: Tensor  # float64
    weights_R: Tensor  # float64, 1 - decay ** (steps in which the role had a reward)

    @staticmethod
    def start(num_roles: int) -> RunningMean:
        zeros_R = torch.zeros(num_roles, dtype=torch.float64)
        return RunningMean(zeros_R, zeros_R.clone())


def ema_baseline(rewards_N: Tensor, role_ids_N: Tensor, before: RunningMean, *, decay: float) -> tuple[Tensor, RunningMean]:
    """Compares a reward with the role's own past. Returns advantages_N = R - b (float32) and the running mean after this step.

    b_t     = s_t / w_t, of the steps before t: it does not depend on the rewards it is taken from, so the gradient stays unbiased
    s_(t+1) = decay s_t + (1 - decay) mean_t,   w_(t+1) = decay w_t + (1 - decay)

    mean_t is over the role's traces of this step. A role's first step has no past: b is its mean_t. A role without a trace keeps its
    state. ``role_ids_N`` are 0..R-1, R = len(before.sums_R). A NaN reward stays in its role, for all steps to come.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}: 0 compares with the last step alone, 1 would never learn the mean.")
    assert rewards_N.shape == role_ids_N.shape and rewards_N.dim() == 1, (rewards_N.shape, role_ids_N.shape)
    num_roles = before.sums_R.numel()
    assert not role_ids_N.numel() or 0 <= int(role_ids_N.min()) <= int(role_ids_N.max()) < num_roles, (role_ids_N, num_roles)
    rewards64_N = rewards_N.double()
    mean_R = segment_mean_K(rewards64_N, role_ids_N, num_roles)
    baseline_R = torch.where(before.weights_R > 0, before.sums_R / before.weights_R, mean_R)
    played_R = segment_count_K(role_ids_N, num_roles) > 0
    after = RunningMean(
        torch.where(played_R, decay * before.sums_R + (1 - decay) * mean_R, before.sums_R),
        torch.where(played_R, decay * before.weights_R + (1 - decay), before.weights_R),
    )
    return (rewards64_N - spread_T(baseline_R, role_ids_N)).float(), after


def plan_rewards(rewards_N: Tensor, plan_ids_N: Tensor, num_plans: int) -> Tensor:
    """The meta-thinker's reward of each plan: the mean reward of the reasoner's samples that followed it. Returns [P] float32.

    R_h(m) = mean over k samples y ~ pi_l(. | x, m) of R(y): less noise in the plan's credit than one sample gives, by 1 / k.
    ``plan_ids_N`` are 0..P-1. A plan without a sample (none had a verdict) has no reward: NaN, never a guess; leave it out.
    """
    assert rewards_N.shape == plan_ids_N.shape and rewards_N.dim() == 1, (rewards_N.shape, plan_ids_N.shape)
    assert not plan_ids_N.numel() or 0 <= int(plan_ids_N.min()) <= int(plan_ids_N.max()) < num_plans, (plan_ids_N, num_plans)
    mean_P = segment_mean_K(rewards_N.double(), plan_ids_N, num_plans)
    return mean_P.masked_fill(segment_count_K(plan_ids_N, num_plans) == 0, torch.nan).float()


def counterfactual_advantage(rewards_N: Tensor, group_ids_N: Tensor, is_counterfactual_N: Tensor) -> Tensor:
    """What the plan changed: compares an episode with those of the same prompt in which the plan was taken away. Returns [N] float32.

    A_i = R_i - mean of R_j over the episodes j of i's group whose plan was ablated (empty) or swapped for one of the group's others

    Counterfactual episodes get 0: the plan under test is not in them. So does a group without any: there is nothing to compare with.
    ``group_ids_N`` are any integers. A NaN stays in its group, and a NaN of a factual episode in that episode.
    """
    assert rewards_N.shape == group_ids_N.shape == is_counterfactual_N.shape and rewards_N.dim() == 1, "one value per episode"
    assert is_counterfactual_N.dtype == torch.bool, is_counterfactual_N.dtype
    groups, group_ids_N = group_ids_N.unique(return_inverse=True)
    without_ids_N = group_ids_N.masked_fill(~is_counterfactual_N, -1)
    count_G = segment_count_K(without_ids_N, groups.numel())
    mean_G = segment_sum_K(rewards_N.double(), without_ids_N, groups.numel()) / count_G.clamp(min=1)
    compared_N = ~is_counterfactual_N & (spread_T(count_G, group_ids_N) > 0)
    return (rewards_N.double() - spread_T(mean_G, group_ids_N)).masked_fill(~compared_N, 0.0).float()
