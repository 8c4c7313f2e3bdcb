"""The clipped policy loss with token, turn or trace ratios, and the weights that aggregate it. Pure: no process groups.

Shapes: T label positions of one packed microbatch, K its turns.
The loss is a plain SUM over positions of ``loss_weights * per-token loss``. The weights hold the GLOBAL normaliser of the
optimizer step, so the sum over microbatches and data-parallel ranks is the objective, however the traces were dealt out.
Sources: PPO arXiv:1707.06347; dual clip arXiv:1912.09729; turn-level objective ReMA arXiv:2503.09501 eq. 12-13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rema.algorithm.kl import KLEstimator, kl_estimate
from megatron_rema.algorithm.masked import masked_sum, segment_count_K, segment_sum_K, spread_T
from megatron_rema.algorithm.ratio import Level, Mean, importance_ratio, unit_ids

Aggregation = Literal["token", "turn", "episode", "constant"]
KLTerm = Literal[KLEstimator, "exact"]


def aggregation_weights(
    turn_ids_T: Tensor,
    trace_ids_T: Tensor,
    loss_mask_T: Tensor,
    *,
    num_turns: int,
    aggregation: Aggregation,
    num_tokens_global: int,
    num_turns_global: int,
    num_traces_global: int,
    max_turns: int,
) -> Tensor:
    """[T] float32 weight of each token's loss; 0 where loss_mask is False.

    With n_t tokens in the token's turn, T_i turns in its trace, and N the counts over ALL traces that one optimizer step
    of this policy trains on (only tokens, turns and traces with a trained token count):

    token     1 / N_tokens                   every token alike
    turn      1 / (n_t N_turns)              every turn alike
    episode   1 / (n_t T_i N_traces)         every trace alike (paper eq. 12): a turn of a short trace weighs more
    constant  1 / (n_t max_turns N_traces)   every turn alike, and the scale does not move with dialogue length
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {aggregation!r}.")
    trained_turn_ids_T = turn_ids_T.masked_fill(~loss_mask_T, -1)
    assert bool(((trained_turn_ids_T >= 0) == loss_mask_T).all()), "every trained token needs a turn id"
    tokens_K = segment_count_K(trained_turn_ids_T, num_turns)
    tokens_T = spread_T(tokens_K.double(), trained_turn_ids_T)
    if aggregation == "token":
        divisor_T = torch.full_like(tokens_T, num_tokens_global)
    elif aggregation == "turn":
        divisor_T = tokens_T * num_turns_global
    elif aggregation == "constant":
        divisor_T = tokens_T * max_turns * num_traces_global
    else:
        # each of a turn's n_t tokens carries 1 / n_t of that turn, so the sum over a trace is its number of turns
        trained_trace_ids_T = trace_ids_T.masked_fill(~loss_mask_T, -1)
        turns_B = segment_sum_K(1 / tokens_T.clamp(min=1), trained_trace_ids_T, loss_mask_T.numel()).round()
        divisor_T = tokens_T * spread_T(turns_B, trained_trace_ids_T) * num_traces_global
    return divisor_T.reciprocal().masked_fill(~loss_mask_T, 0.0).float()


@dataclass(frozen=True)
class PolicyLossStats:
    """Sums over one microbatch, detached float32 scalars. Add them over microbatches and data-parallel ranks, then ``means``.

    A *unit* is what shares a ratio: a token, a turn or a trace, by ``level``. None: was not asked for.
    """

    loss: Tensor  # the objective: policy_loss + kl_coef * kl_weighted - entropy_coef * entropy_weighted
    policy_loss: Tensor  # sum of loss_weights * clipped loss
    num_tokens: Tensor  # trained tokens: the denominator of *_nats_tokens
    num_units: Tensor  # trained units: the denominator of *_units
    clipped_units: Tensor  # units whose clipped branch was the larger loss: no gradient
    dual_clipped_units: Tensor  # units of negative advantage held by dual_clip: no gradient
    ratio_units: Tensor  # sum of the units' ratios
    kl_old_k3_nats_tokens: Tensor  # how far the policy moved from the one that sampled, k3
    kl_ref_nats_tokens: Tensor | None = None  # to the reference, by kl_estimator or exact
    entropy_nats_tokens: Tensor | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """Every sum that was asked for, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @staticmethod
    def means(sums: Mapping[str, float], *, level: Level) -> dict[str, float]:
        """Reduced sums -> metrics, each divided by its own denominator (0.0 where that is 0)."""

        def mean(name: str, denominator: str) -> float:
            return sums[name] / sums[denominator] if sums[denominator] else 0.0

        metrics = {
            "loss": sums["loss"],
            "policy_loss": sums["policy_loss"],
            "num_tokens": sums["num_tokens"],
            f"num_{level}s": sums["num_units"],
            f"{level}_ratio_mean": mean("ratio_units", "num_units"),
            f"{level}_ratio_clipped_frac": mean("clipped_units", "num_units"),
            f"{level}_ratio_dual_clipped_frac": mean("dual_clipped_units", "num_units"),
            "kl_old_k3_nats": mean("kl_old_k3_nats_tokens", "num_tokens"),
        }
        if "kl_ref_nats_tokens" in sums:
            metrics["kl_ref_nats"] = mean("kl_ref_nats_tokens", "num_tokens")
        if "entropy_nats_tokens" in sums:
            metrics["entropy_nats"] = mean("entropy_nats_tokens", "num_tokens")
        return metrics


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    loss_weights_T: Tensor,
    turn_ids_T: Tensor,
    trace_ids_T: Tensor,
    loss_mask_T: Tensor,
    *,
    num_turns: int,
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
    """Scalar loss (a SUM, see the file's head) and its detached sums.

    L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0: L = min(L, -A dual_clip)
    loss = sum of weights * (L + kl_coef * KL(policy || reference) - entropy_coef * entropy)

    ``advantages_T`` that are equal inside a unit give the per-unit loss of the paper; ones that differ (per-turn credit under
    a trace ratio) keep their own credit. Untrained positions are not read. No trained token: loss 0 with gradient 0.
    ``kl_T`` is the exact KL of each position's distribution (kl_estimator "exact"); else it is estimated from ``ref_logprobs_T``, which is
    not read beside it. Gradient flows to logprobs_T, kl_T and entropy_T only.
    """
    check_options(
        level=level, mean=mean, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, log_ratio_cap=log_ratio_cap,
        ref_logprobs_T=ref_logprobs_T, kl_T=kl_T, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy_T=entropy_T,
        entropy_coef=entropy_coef,
    )  # fmt: skip

    def trained(values_T: Tensor) -> Tensor:
        return values_T.masked_fill(~loss_mask_T, 0.0)  # first of all, so that an untrained NaN meets no gradient either

    logprobs_T, old_logprobs_T = trained(logprobs_T), trained(old_logprobs_T.detach())
    advantages_T, loss_weights_T = trained(advantages_T.detach()), trained(loss_weights_T.detach())
    ratio_T = importance_ratio(
        logprobs_T, old_logprobs_T, turn_ids_T, trace_ids_T, loss_mask_T,
        num_turns=num_turns, level=level, mean=mean, log_ratio_cap=log_ratio_cap,
    )  # fmt: skip
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_T = torch.maximum(plain_T, clipped_T)
    is_dual_clipped_T = torch.zeros_like(loss_mask_T)
    if dual_clip is not None:
        bound_T = -advantages_T * dual_clip
        is_dual_clipped_T = (advantages_T < 0) & (loss_T > bound_T)
        loss_T = torch.where(is_dual_clipped_T, bound_T, loss_T)

    def weighted(values_T: Tensor) -> Tensor:
        return masked_sum(loss_weights_T * values_T, loss_mask_T)

    policy_term = weighted(loss_T)
    loss = policy_term
    if kl_T is not None:
        kl_T = trained(kl_T)
    elif ref_logprobs_T is not None:
        kl_T = kl_estimate(logprobs_T, trained(ref_logprobs_T.detach()), estimator=kl_estimator)
    if kl_coef:
        loss = loss + kl_coef * weighted(kl_T)
    if entropy_coef:
        loss = loss - entropy_coef * weighted(trained(entropy_T))

    with torch.no_grad():
        ids_T, num_ids = unit_ids(turn_ids_T, trace_ids_T, loss_mask_T, num_turns=num_turns, level=level)
        tokens_T = spread_T(segment_count_K(ids_T, num_ids), ids_T).clamp(min=1)

        def over_units(values_T: Tensor) -> Tensor:
            return masked_sum(values_T.float() / tokens_T, loss_mask_T)

        def over_tokens(values_T: Tensor) -> Tensor:
            return masked_sum(values_T.float(), loss_mask_T)

        stats = PolicyLossStats(
            loss=loss.detach().float(),
            policy_loss=policy_term.detach().float(),
            num_tokens=loss_mask_T.sum().float(),
            num_units=over_units(torch.ones_like(tokens_T)),
            clipped_units=over_units(clipped_T > plain_T),
            dual_clipped_units=over_units(is_dual_clipped_T),
            ratio_units=over_units(ratio_T),
            kl_old_k3_nats_tokens=over_tokens(kl_estimate(old_logprobs_T, logprobs_T, estimator="k3")),
            kl_ref_nats_tokens=None if kl_T is None else over_tokens(kl_T),
            entropy_nats_tokens=None if entropy_T is None else over_tokens(entropy_T),
        )
    return loss, stats


def check_options(
    *,
    level: Level,
    mean: Mean,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_cap: float,
    ref_logprobs_T: Tensor | None,
    kl_T: Tensor | None,
    kl_coef: float,
    kl_estimator: KLTerm,
    entropy_T: Tensor | None,
    entropy_coef: float,
) -> None:
    """Raises ValueError for what `policy_loss` cannot take."""
    for name, value, kind in (("level", level, Level), ("mean", mean, Mean), ("kl_estimator", kl_estimator, KLTerm)):
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}.")
    if log_ratio_cap < 0.0:
        raise ValueError(f"log_ratio_cap must be at least 0, got {log_ratio_cap}: it bounds the ratio from above.")
    if not (0.0 <= clip_low <= 1.0 and clip_high >= 0.0):
        raise ValueError(f"clip_low must be in [0, 1] and clip_high >= 0, got {clip_low} and {clip_high}.")
    if dual_clip is not None and dual_clip <= 1.0 + clip_high:
        raise ValueError(f"dual_clip must exceed 1 + clip_high = {1.0 + clip_high}, got {dual_clip}; use None to switch it off.")
    if kl_coef and ref_logprobs_T is None and kl_T is None:
        raise ValueError(
            f"kl_coef is {kl_coef} but there are neither reference logprobs nor an exact KL: build the reference or set kl_coef to 0."
        )
    if kl_estimator == "exact" and kl_T is None and ref_logprobs_T is not None:
        raise ValueError("kl_estimator exact takes kl_T; reference logprobs of sampled tokens are for k1, k2 and k3.")
    if kl_coef and kl_estimator == "k1":
        raise ValueError("kl_estimator k1 has an expected gradient of 0 and cannot hold the policy back: use k2 or k3, or kl_coef 0.")
    if entropy_coef and entropy_T is None:
        raise ValueError(f"entropy_coef is {entropy_coef} but no entropy was computed: pass entropy_T or set entropy_coef to 0.")
