"""Optimizer steps of policies and critics. Assembly only; the arithmetic is algorithm/'s."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from megatron_rema.algorithm.losses import PolicyLossStats
from megatron_rema.algorithm.value import ValueLossStats, value_loss
from megatron_rema.config import AlgorithmConfig
from megatron_rema.kernels.policy import policy_loss
from megatron_rema.models.optimizer import Optimizer
from megatron_rema.models.policy import ParallelModel
from megatron_rema.models.probe import last_mlp_energy
from megatron_rema.parallel.pipeline import reduce_stats
from megatron_rema.types import Batch


def update_policy(
    model: ParallelModel,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    algorithm: AlgorithmConfig,
    temperature: float,
    reference: ParallelModel | None = None,
    schedule_position: int | None = None,
    with_energy: bool = False,
) -> dict[str, float]:
    """One optimizer step on one minibatch. Returns metrics, equal on every rank.

    ``reference``: the KL term is the exact KL to it, of every position's whole distribution, instead of an estimate from
    ``ref_logprobs``. It runs beside the policy, so one microbatch of its logits lives at a time. Source: arXiv:2504.10637.

    Without ``old_logprobs`` the policy being updated is the one that sampled (one minibatch per rollout): its own detached
    log-probabilities stand for them, which saves a forward pass and makes the ratio identically 1.

    ``with_energy``: the forward passes tell the energy loss of the last MLP block too, over the own tokens; nothing else changes by a bit.
    """

    def loss(outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T, entropy_T, kl_T = model.statistics(outputs, batch, temperature=temperature, with_entropy=True, reference=reference)
        old_logprobs_T = logprobs_T.detach() if batch.old_logprobs is None else batch.old_logprobs
        total, stats = policy_loss(
            logprobs_T,
            old_logprobs_T,
            batch.advantages,
            batch.loss_weights,
            batch.turn_ids,
            batch.trace_ids,
            batch.loss_mask,
            cu_turns=batch.cu_turns,
            cu_seqlens=batch.cu_seqlens,
            level=algorithm.ratio_level,
            mean=algorithm.ratio_mean,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
            log_ratio_cap=algorithm.log_ratio_cap,
            ref_logprobs_T=batch.ref_logprobs,
            kl_T=kl_T,
            kl_coef=algorithm.kl_coef,
            kl_estimator=algorithm.kl_estimator,
            entropy_T=entropy_T,
            entropy_coef=algorithm.entropy_coef,
        )
        gap_T = torch.where(batch.loss_mask, (old_logprobs_T - batch.rollout_logprobs).abs(), 0.0)
        read = {} if energy is None else {"energy_loss": energy.take(batch.loss_mask)}
        return total, {**stats.as_dict(), "gap_sum": gap_T.sum(), "gap_max": gap_T.max(), **read}

    with (
        optimizer.resident(),
        nullcontext() if reference is None else reference.resident(),
        last_mlp_energy(model) if with_energy else nullcontext() as energy,
    ):
        optimizer.zero_grad()
        results = model.forward_backward(list(batches), loss)
        result = optimizer.step(position=schedule_position)
    stats = reduce_stats(results, model.groups, maxima=("gap_max",))
    means = PolicyLossStats.means(stats, level=algorithm.ratio_level)
    num_tokens = max(stats["num_tokens"], 1.0)
    return {
        **{f"train/{name}": value for name, value in means.items()},
        "train/grad_norm": result.grad_norm,
        "train/skipped_updates": float(result.skipped),
        "train/lr": result.lr,
        "sync/logprob_gap_mean": stats["gap_sum"] / num_tokens,
        "sync/logprob_gap_max": stats["gap_max"],
        **({"integrity/energy_loss_raw": stats["energy_loss"] / num_tokens} if with_energy else {}),
    }


def update_critic(
    model: ParallelModel, optimizer: Optimizer, batches: Sequence[Batch], *, value_clip: float, schedule_position: int | None = None
) -> dict[str, float]:
    """One optimizer step of a value model towards ``batch.returns``. Returns metrics, equal on every rank."""

    def loss(values_TK: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, stats = value_loss(
            values_TK[:, 0], batch.returns, batch.values, batch.loss_weights, batch.loss_mask, clip=value_clip or None
        )
        return total, stats.as_dict()

    with optimizer.resident():
        optimizer.zero_grad()
        outputs = model.forward_backward(list(batches), loss)
        result = optimizer.step(position=schedule_position)
    stats = reduce_stats(outputs, model.groups)
    return {
        **{f"critic/{name}": value for name, value in ValueLossStats.means(stats).items()},
        "critic/grad_norm": result.grad_norm,
        "critic/skipped_updates": float(result.skipped),
    }
