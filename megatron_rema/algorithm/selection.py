"""Which traces are worth an update: masks over groups of rewards. Pure: torch in, torch out.

Shapes: N traces of one role. ``group_ids_N`` are any integers (same prompt, same role), as in advantage.py.
Sources: dynamic sampling DAPO arXiv:2503.14476 eq. 11; prompt filter ReMA arXiv:2503.09501 algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rema.algorithm.masked import segment_count_K, segment_sum_K, spread_T


def informative_groups(rewards_N: Tensor, group_ids_N: Tensor) -> Tensor:
    """[N] bool: the rewards of the trace's group are not all the same, so that a group estimator has something to compare.

    For rewards of 0 and 1 this is the paper's 0 < number right < G. A group of one is False. A NaN equals nothing: its group is True,
    so that it is seen and not filtered away. Rewards are compared exactly: no variance, hence no rounding to take for a difference.
    """
    assert rewards_N.shape == group_ids_N.shape and rewards_N.dim() == 1, (rewards_N.shape, group_ids_N.shape)
    groups, group_ids_N = group_ids_N.unique(return_inverse=True)
    any_G = rewards_N.new_zeros(groups.numel())
    any_G[group_ids_N] = rewards_N  # one of the group's rewards, no matter which
    differs_N = (rewards_N != any_G[group_ids_N]).double()
    return spread_T(segment_sum_K(differs_N, group_ids_N, groups.numel()), group_ids_N) > 0


def within_success_rate(successes_N: Tensor, group_ids_N: Tensor, *, low: float, high: float) -> Tensor:
    """[N] bool: low <= fraction of successes in the trace's group <= high, ends included.

    ReMA trains on the prompts that are neither hopeless nor solved: 0.2 and 0.8 over 10 samples on MATH. ``successes_N`` are bools, or
    numbers in [0, 1]. A NaN makes its group False: its rate is not known.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"success rates need 0 <= low <= high <= 1, got low {low} and high {high}.")
    assert successes_N.shape == group_ids_N.shape and successes_N.dim() == 1, (successes_N.shape, group_ids_N.shape)
    groups, group_ids_N = group_ids_N.unique(return_inverse=True)
    sum_G = segment_sum_K(successes_N.double(), group_ids_N, groups.numel())
    rate_N = spread_T(sum_G / segment_count_K(group_ids_N, groups.numel()), group_ids_N)
    return torch.logical_and(rate_N >= low, rate_N <= high)
