"""Advantage estimators over agent traces: which rewards are compared with which. Pure: torch in, torch out.

Shapes: N traces of one role (all of the optimizer step), K turns of all those traces laid end to end, T label positions.
Sources: GRPO arXiv:2402.03300; Dr.GRPO arXiv:2503.20783; RLOO arXiv:2402.14740; REINFORCE++ arXiv:2501.03262.
Means are taken in float64, so that a group of equal rewards has advantages of exactly 0 before ``eps`` could magnify a rounding.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rema.algorithm.masked import segment_count_K, segment_sum_K, spread_T, weighted_whiten

GroupEstimator = Literal["grpo", "dr_grpo", "rloo"]


def group_advantage(rewards_N: Tensor, group_ids_N: Tensor, *, estimator: GroupEstimator, eps: float = 1e-6) -> Tensor:
    """Compares a trace with the other traces of its group (same prompt, same role). Returns [N] float32.

    grpo     (R - mean) / (std + eps), std of the sample (n - 1), as in the reference code
    dr_grpo  R - mean: no division, so that hard and easy prompts keep their natural scale
    rloo     R - mean of the *other* traces = n / (n - 1) * (R - mean)

    ``group_ids_N`` are any integers. A group of one has nothing to be compared with: 0. A NaN stays in its group.
    """
    if estimator not in get_args(GroupEstimator):
        raise ValueError(f"estimator must be one of {get_args(GroupEstimator)}, got {estimator!r}.")
    assert rewards_N.shape == group_ids_N.shape and rewards_N.dim() == 1, (rewards_N.shape, group_ids_N.shape)
    groups, group_ids_N = group_ids_N.unique(return_inverse=True)
    rewards64_N = rewards_N.double()
    count_G = segment_count_K(group_ids_N, groups.numel())
    centred_N = rewards64_N - spread_T(segment_sum_K(rewards64_N, group_ids_N, groups.numel()) / count_G, group_ids_N)
    others_G = (count_G - 1).clamp(min=1).double()
    if estimator == "grpo":
        std_G = (segment_sum_K(centred_N.square(), group_ids_N, groups.numel()) / others_G).sqrt()
        centred_N = centred_N / (spread_T(std_G, group_ids_N) + eps)
    elif estimator == "rloo":
        centred_N = centred_N * spread_T(count_G / others_G, group_ids_N)
    return centred_N.float()


def turn_returns(turn_rewards_K: Tensor, trace_ids_K: Tensor, *, turn_discount: float) -> Tensor:
    """G_k = r_k + turn_discount * G_(k+1), inside each trace. Returns [K] float32.

    The turns of a trace are consecutive and in order; ``trace_ids_K`` names each turn's trace.
    """
    traces, trace_ids_K, count_N = trace_ids_K.unique_consecutive(return_inverse=True, return_counts=True)
    assert traces.unique().numel() == traces.numel(), "the turns of one trace must lie next to each other"
    first_N = count_N.cumsum(0) - count_N
    turn_K = torch.arange(turn_rewards_K.numel(), device=turn_rewards_K.device) - first_N[trace_ids_K]
    num_rounds = int(count_N.max()) if count_N.numel() else 0
    returns_NR = torch.zeros(traces.numel(), num_rounds + 1, dtype=torch.float64, device=turn_rewards_K.device)
    returns_NR[trace_ids_K, turn_K] = turn_rewards_K.double()
    for turn in reversed(range(num_rounds)):
        returns_NR[:, turn] += turn_discount * returns_NR[:, turn + 1]
    return returns_NR[trace_ids_K, turn_K].float()


def reinforce_plus_plus(turn_rewards_K: Tensor, trace_ids_K: Tensor, num_tokens_K: Tensor, *, turn_discount: float) -> Tensor:
    """Compares a turn's return with those of all turns of the optimizer step: no groups, one global baseline. Returns [K] float32.

    The returns are whitened over tokens (a turn counts as often as it has tokens), hence K must hold ALL turns of the step.
    """
    return weighted_whiten(turn_returns(turn_rewards_K, trace_ids_K, turn_discount=turn_discount), num_tokens_K)


def turn_to_tokens(values_K: Tensor, turn_ids_T: Tensor, *, token_discount: float = 1.0) -> Tensor:
    """[T] the value of each token's turn times token_discount ** (tokens of the turn still to come); 0 where turn_ids_T is -1.

    The tokens of a turn are consecutive (a packed trace has them so).
    """
    if token_discount == 1.0:
        return spread_T(values_K, turn_ids_T)
    index_T = torch.arange(turn_ids_T.numel(), device=turn_ids_T.device)
    last_K = torch.full((values_K.numel() + 1,), -1, device=turn_ids_T.device)
    last_K = last_K.index_reduce(0, turn_ids_T.masked_fill(turn_ids_T < 0, values_K.numel()), index_T, "amax")[:-1]
    to_come_T = (spread_T(last_K, turn_ids_T) - index_T).masked_fill(turn_ids_T < 0, 0)
    return spread_T(values_K, turn_ids_T) * token_discount**to_come_T
