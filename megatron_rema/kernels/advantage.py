"""Advantages over packed traces and their whitening: the functions of algorithm/, computed by a compiled library where one is chosen.

Shapes: T label positions of packed traces.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rema.algorithm import gae as reference
from megatron_rema.algorithm.masked import masked_moments, merge_moments, whiten
from megatron_rema.kernels import library

WHITEN_EPS = 1e-8


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
) -> tuple[Tensor, Tensor]:
    """`algorithm.gae.gae`: the same arguments, results and rule for NaN; sums in float64 as there.

    Fused: one reverse pass on a CPU, three launches on CUDA whatever the lengths of the traces. Nothing waits for the device, so it is not
    checked there that turn ids are not negative and that a trace's tokens lie next to each other.
    """
    numbers = {"discount": discount, "gae_lambda": gae_lambda, "turn_discount": turn_discount, "turn_lambda": turn_lambda}
    if not library.is_fused(values_T):
        return reference.gae(rewards_T, values_T, turn_ids_T, trace_ids_T, loss_mask_T, **numbers)
    reference.check_discounts(**numbers)
    columns = (rewards_T.float(), values_T.float(), turn_ids_T.long(), trace_ids_T.long(), loss_mask_T)
    assert all(column.shape == values_T.shape and column.dim() == 1 for column in columns), "one value per position"
    assert loss_mask_T.dtype == torch.bool, loss_mask_T.dtype
    return torch.ops.megatron_rema.gae(*(column.contiguous() for column in columns), *numbers.values())


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
    moments_3 = torch.ops.megatron_rema.moments(values_T, mask_T) if fused else masked_moments(values_T, mask_T)
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
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(values), torch.empty_like(values)
    kernels = library.get(values.device)
    kernels.call(
        "rema_gae", values.device, rewards, values, turn_ids, trace_ids, mask, values.numel(), discount, gae_lambda, turn_discount,
        turn_lambda, advantages, returns, kernels.scratch("gae", values),
    )  # fmt: skip
    return advantages, returns


@_gae.register_fake
def _(rewards, values, *_):
    return torch.empty_like(values), torch.empty_like(values)


@torch.library.custom_op("megatron_rema::moments", mutates_args=())
def _moments(values: Tensor, mask: Tensor) -> Tensor:
    moments = torch.empty(3, dtype=torch.float64, device=values.device)
    kernels = library.get(values.device)
    kernels.call("rema_moments", values.device, values, mask, values.numel(), moments, kernels.scratch("moments", values))
    return moments


@_moments.register_fake
def _(values, mask):
    return torch.empty(3, dtype=torch.float64, device=values.device)


@torch.library.custom_op("megatron_rema::whiten", mutates_args=())
def _whiten(values: Tensor, mask: Tensor, moments: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(values)
    library.get(values.device).call("rema_whiten", values.device, values, mask, values.numel(), moments, moments.shape[0], eps, out)
    return out


@_whiten.register_fake
def _(values, mask, moments, eps):
    return torch.empty_like(values)
