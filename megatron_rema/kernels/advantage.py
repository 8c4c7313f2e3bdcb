"""Advantages over packed traces and their whitening: the functions of algorithm/, computed by a compiled library where one is chosen.

Shapes: T label positions of packed traces, N traces of one role, K turns of all those traces laid end to end.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rema.algorithm import advantage as reference
from megatron_rema.algorithm import gae as reference_gae
from megatron_rema.algorithm.advantage import GroupEstimator
from megatron_rema.algorithm.kl import KLEstimator, penalised_rewards
from megatron_rema.algorithm.masked import masked_moments, merge_moments, whiten
from megatron_rema.kernels import library

WHITEN_EPS = 1e-8
KL_ESTIMATORS = {None: 0, "k1": 1, "k2": 2, "k3": 3, "exact": 4}  # csrc/core.h
_GROUP_ESTIMATORS = {"grpo": 0, "dr_grpo": 1, "rloo": 2}


@torch.no_grad()
def gae(
    rewards_T: Tensor,
    values_T: Tensor,
    turn_ids_T: Tensor,
    trace_ids_T: Tensor,
    loss_mask_T: Tensor,
    *,
    discount: float,
    gae_lambda: float,
    turn_discount: float,
    turn_lambda: float,
    logprobs_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
) -> tuple[Tensor, Tensor]:
    """`algorithm.gae.gae` of `algorithm.kl.penalised_rewards`: the same results and rule for NaN; sums in float64 as there.

    Without ``kl_coef`` the rewards are taken as they are. Fused: one reverse pass on a CPU, three launches on CUDA whatever the lengths of
    the traces. Nothing waits for the device, so it is not checked there that turn ids are not negative and that a trace's tokens lie next
    to each other.
    """
    numbers = {"discount": discount, "gae_lambda": gae_lambda, "turn_discount": turn_discount, "turn_lambda": turn_lambda}
    if not library.is_fused(values_T):
        if kl_coef:
            rewards_T = penalised_rewards(rewards_T, logprobs_T, ref_logprobs_T, loss_mask_T, coef=kl_coef, estimator=kl_estimator)
        return reference_gae.gae(rewards_T, values_T, turn_ids_T, trace_ids_T, loss_mask_T, **numbers)
    reference_gae.check_discounts(**numbers)
    columns = [rewards_T.float(), values_T.float(), turn_ids_T.long(), trace_ids_T.long(), loss_mask_T]
    columns += [logprobs_T.float(), ref_logprobs_T.float()] if kl_coef else []
    assert all(column.shape == values_T.shape and column.dim() == 1 for column in columns), "one value per position"
    assert loss_mask_T.dtype == torch.bool, loss_mask_T.dtype
    *columns, logprobs_T, ref_logprobs_T = [column.contiguous() for column in columns] + ([] if kl_coef else [None, None])
    return torch.ops.megatron_rema.gae(*columns, *numbers.values(), logprobs_T, ref_logprobs_T, kl_coef, KL_ESTIMATORS[kl_estimator])


@torch.no_grad()
def group_advantage(rewards_N: Tensor, group_ids_N: Tensor, *, estimator: GroupEstimator, eps: float = 1e-6) -> Tensor:
    """`algorithm.advantage.group_advantage`. Fused: one launch, no order of the groups is needed and no sort waited for."""
    if not library.is_fused(rewards_N):
        return reference.group_advantage(rewards_N, group_ids_N, estimator=estimator, eps=eps)
    if estimator not in _GROUP_ESTIMATORS:
        raise ValueError(f"estimator must be one of {tuple(_GROUP_ESTIMATORS)}, got {estimator!r}.")
    assert rewards_N.shape == group_ids_N.shape and rewards_N.dim() == 1, (rewards_N.shape, group_ids_N.shape)
    return torch.ops.megatron_rema.groups(
        rewards_N.float().contiguous(), group_ids_N.long().contiguous(), _GROUP_ESTIMATORS[estimator], eps
    )


@torch.no_grad()
def turn_returns(turn_rewards_K: Tensor, trace_ids_K: Tensor, *, turn_discount: float) -> Tensor:
    """`algorithm.advantage.turn_returns`. Fused: the scan of `gae` over turns instead of tokens, without values."""
    if not library.is_fused(turn_rewards_K):
        return reference.turn_returns(turn_rewards_K, trace_ids_K, turn_discount=turn_discount)
    everything_K = torch.ones_like(turn_rewards_K, dtype=torch.bool)
    each_K = torch.arange(turn_rewards_K.numel(), device=turn_rewards_K.device)
    numbers = {"discount": 1.0, "gae_lambda": 1.0, "turn_discount": turn_discount, "turn_lambda": 1.0}
    return gae(turn_rewards_K, torch.zeros_like(turn_rewards_K), each_K, trace_ids_K, everything_K, **numbers)[1]


def reinforce_plus_plus(turn_rewards_K: Tensor, trace_ids_K: Tensor, num_tokens_K: Tensor, *, turn_discount: float) -> Tensor:
    """`algorithm.advantage.reinforce_plus_plus`. Fused: `turn_returns`, and two launches to whiten them over tokens."""
    if not library.is_fused(turn_rewards_K):
        return reference.reinforce_plus_plus(turn_rewards_K, trace_ids_K, num_tokens_K, turn_discount=turn_discount)
    returns_K, mask_K = turn_returns(turn_rewards_K, trace_ids_K, turn_discount=turn_discount), num_tokens_K > 0
    moments_3 = torch.ops.megatron_rema.moments(returns_K, mask_K, num_tokens_K.float())
    return torch.ops.megatron_rema.whiten(returns_K, mask_K, moments_3[None], WHITEN_EPS)


@torch.no_grad()
def masked_whiten(values_T: Tensor, mask_T: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[T] float32 values shifted to mean 0 and scaled to population variance 1 over the mask, 0 outside it: `weighted_whiten` of equal
    weights. What lies outside the mask is not read; equal values, or none, give 0.

    With a ``group``, mean and variance are those of all its ranks' values together. Over the wire: one all-gather of three float64 (count,
    mean, sum of squared distances), merged in rank order, hence the same on every rank.
    """
    assert values_T.shape == mask_T.shape and mask_T.dtype == torch.bool and values_T.dim() == 1, (values_T.shape, mask_T.dtype)
    fused = library.is_fused(values_T)
    values_T, mask_T = values_T.float().contiguous(), mask_T.contiguous()
    moments_3 = torch.ops.megatron_rema.moments(values_T, mask_T, None) if fused else masked_moments(values_T, mask_T)
    moments_R3 = moments_3[None]
    if group is not None and dist.get_world_size(group) > 1:
        moments_R3 = moments_3.new_empty(dist.get_world_size(group), 3)
        dist.all_gather(list(moments_R3.unbind(0)), moments_3, group=group)
    if fused:
        return torch.ops.megatron_rema.whiten(values_T, mask_T, moments_R3, WHITEN_EPS)
    return whiten(values_T, mask_T, merge_moments(moments_R3), eps=WHITEN_EPS)


@torch.library.custom_op("megatron_rema::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    turn_ids: Tensor,
    trace_ids: Tensor,
    mask: Tensor,
    discount: float,
    gae_lambda: float,
    turn_discount: float,
    turn_lambda: float,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: int,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    kernels = library.get(values.device)
    kernels.call(
        "rema_gae", values.device, rewards, values, logprobs, ref_logprobs, kl_estimator, kl_coef, turn_ids, trace_ids, mask,
        values.numel(), discount, gae_lambda, turn_discount, turn_lambda, advantages, returns,
        kernels.scratch("gae", values.device, values.numel()),
    )  # fmt: skip
    return advantages, returns


@_gae.register_fake
def _(rewards, values, *_):
    return torch.empty_like(values), torch.empty_like(values)


@torch.library.custom_op("megatron_rema::moments", mutates_args=())
def _moments(values: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    moments = torch.empty(3, dtype=torch.float64, device=values.device)
    kernels = library.get(values.device)
    scratch = kernels.scratch("moments", values.device, values.numel())
    kernels.call("rema_moments", values.device, values, mask, weights, values.numel(), moments, scratch)
    return moments


@_moments.register_fake
def _(values, mask, weights):
    return torch.empty(3, dtype=torch.float64, device=values.device)


@torch.library.custom_op("megatron_rema::whiten", mutates_args=())
def _whiten(values: Tensor, mask: Tensor, moments: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(values)
    library.get(values.device).call("rema_whiten", values.device, values, mask, values.numel(), moments, moments.shape[0], eps, out)
    return out


@_whiten.register_fake
def _(values, mask, moments, eps):
    return torch.empty_like(values)


@torch.library.custom_op("megatron_rema::groups", mutates_args=())
def _groups(rewards: Tensor, group_ids: Tensor, estimator: int, eps: float) -> Tensor:
    advantages = torch.empty_like(rewards)
    kernels = library.get(rewards.device)
    scratch = kernels.scratch("groups", rewards.device, rewards.numel())
    kernels.call("rema_groups", rewards.device, rewards, group_ids, rewards.numel(), estimator, eps, advantages, scratch)
    return advantages


@_groups.register_fake
def _(rewards, group_ids, estimator, eps):
    return torch.empty_like(rewards)
