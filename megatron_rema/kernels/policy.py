"""The clipped policy loss of algorithm/losses.py with its gradient, computed by a compiled library where one is chosen.

Shapes: T label positions of one packed microbatch, U units (turns or traces that share a ratio).
Fused: one pass over a unit's tokens for its ratio, one for the loss, one that writes the gradient, while they are in the cache; on CUDA two
launches. Backward multiplies that gradient by the incoming one. Sums are float64, what is known of one token float32 (csrc/core.h).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rema.algorithm import losses as reference
from megatron_rema.algorithm.losses import KLTerm, PolicyLossStats
from megatron_rema.algorithm.ratio import Level, Mean
from megatron_rema.kernels import library
from megatron_rema.kernels.advantage import KL_ESTIMATORS


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    loss_weights_T: Tensor,
    turn_ids_T: Tensor,
    trace_ids_T: Tensor,
    loss_mask_T: Tensor,
    *,
    cu_turns: Tensor,
    cu_seqlens: Tensor,
    level: Level,
    mean: Mean = "geometric",
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = 3.0,
    log_ratio_cap: float = 3.0,
    ref_logprobs_T: Tensor | None = None,
    kl_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLTerm = "k3",
    entropy_T: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, PolicyLossStats]:
    """`algorithm.losses.policy_loss`: the same loss, gradients, sums and rule for NaN.

    ``cu_turns`` and ``cu_seqlens`` [U+1], from 0 to T: where each turn and each trace of the batch begins (types.Batch). The fused kernel
    finds its units by them, plain torch by the ids; a turn's own tokens are those of its part that the mask keeps.
    """
    options = {"level": level, "mean": mean, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    options |= {"log_ratio_cap": log_ratio_cap, "kl_coef": kl_coef, "kl_estimator": kl_estimator, "entropy_coef": entropy_coef}
    if not library.is_fused(logprobs_T):
        return reference.policy_loss(
            logprobs_T, old_logprobs_T, advantages_T, loss_weights_T, turn_ids_T, trace_ids_T, loss_mask_T,
            num_turns=len(cu_turns) - 1, ref_logprobs_T=ref_logprobs_T, kl_T=kl_T, entropy_T=entropy_T, **options,
        )  # fmt: skip
    reference.check_options(ref_logprobs_T=ref_logprobs_T, kl_T=kl_T, entropy_T=entropy_T, **options)
    to_reference_T, kind = (kl_T, "exact") if kl_T is not None else (ref_logprobs_T, kl_estimator if ref_logprobs_T is not None else None)
    columns = (logprobs_T, old_logprobs_T.detach(), advantages_T.detach(), loss_weights_T.detach(), to_reference_T, entropy_T)
    columns = tuple(None if column is None else column.float().contiguous() for column in columns)
    assert loss_mask_T.dtype == torch.bool and all(c is None or c.shape == loss_mask_T.shape for c in columns), "one value per position"
    starts_U1 = {"token": None, "turn": cu_turns, "trace": cu_seqlens}[level]
    loss, sums, *_ = torch.ops.megatron_rema.policy_loss(
        *columns, loss_mask_T.contiguous(), None if starts_U1 is None else starts_U1.long().contiguous(), mean == "arithmetic", clip_low,
        clip_high, math.inf if dual_clip is None else dual_clip, log_ratio_cap,
        KL_ESTIMATORS[kind], kl_coef, entropy_coef,
    )  # fmt: skip
    policy, _, _, tokens, units, clipped, dual_clipped, ratios, kl_old, kl_ref, entropy = sums.float().unbind()
    return loss, PolicyLossStats(
        loss=loss.detach(),
        policy_loss=policy,
        num_tokens=tokens,
        num_units=units,
        clipped_units=clipped,
        dual_clipped_units=dual_clipped,
        ratio_units=ratios,
        kl_old_k3_nats_tokens=kl_old,
        kl_ref_nats_tokens=None if to_reference_T is None else kl_ref,
        entropy_nats_tokens=None if entropy_T is None else entropy,
    )


@torch.library.custom_op("megatron_rema::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    to_reference: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    starts: Tensor | None,
    arithmetic: bool,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    log_ratio_cap: float,
    kl_estimator: int,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels, device, tokens = library.get(logprobs.device), logprobs.device, logprobs.numel()
    loss, sums, grad_logprobs, grad_kl, grad_entropy = _shapes(logprobs, kl_estimator, entropy_coef)
    units = 0 if starts is None else len(starts) - 1
    kernels.call(
        "rema_policy_loss", device, logprobs, old_logprobs, advantages, weights, to_reference, entropy, mask, starts, units, tokens,
        arithmetic, clip_low, clip_high, dual_clip, log_ratio_cap, kl_estimator, kl_coef, entropy_coef, loss, sums, grad_logprobs,
        *(grad if grad.numel() else None for grad in (grad_kl, grad_entropy)), kernels.scratch("policy_loss", device, units, tokens),
    )  # fmt: skip
    return loss, sums, grad_logprobs, grad_kl, grad_entropy


def _shapes(logprobs: Tensor, kl_estimator: int, entropy_coef: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, its sums, and what is kept for backward: d loss / d log-probabilities, and exact KL and entropy where they count."""
    return (
        logprobs.new_empty(()),
        torch.empty(11, dtype=torch.float64, device=logprobs.device),
        torch.empty_like(logprobs),
        logprobs.new_empty(logprobs.numel() if kl_estimator == KL_ESTIMATORS["exact"] else 0),
        logprobs.new_empty(logprobs.numel() if entropy_coef else 0),
    )


@_policy_loss.register_fake
def _(logprobs, *arguments):
    return _shapes(logprobs, arguments[-3], arguments[-1])


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    logprobs, kl, entropy = (grad * kept if kept.numel() else None for kept in ctx.saved_tensors)
    return logprobs, None, None, None, kl, entropy, *(None,) * 10


_policy_loss.register_autograd(_backward, setup_context=_keep)
