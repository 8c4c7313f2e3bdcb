"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens.

Shapes: T label positions. Units: nats per token.
Source: J. Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs_T: Tensor, ref_logprobs_T: Tensor, *, estimator: KLEstimator, log_ratio_cap: float = 20.0) -> Tensor:
    """[T] nats per token, differentiable in both arguments. With x = ref_logprobs - logprobs, tokens sampled from the policy:

    k1  -x                unbiased, may be negative; as a loss its expected gradient is 0, so use it to measure only
    k2  x^2 / 2           biased value; as a loss it has the exact expected gradient of the KL
    k3  exp(x) - 1 - x    unbiased, never negative; x is capped at log_ratio_cap, beyond which the gradient is 0
    """
    x_T = ref_logprobs_T - logprobs_T
    if estimator == "k1":
        return -x_T
    if estimator == "k2":
        return x_T.square() / 2
    if estimator == "k3":
        x_T = x_T.clamp(max=log_ratio_cap)
        return x_T.expm1() - x_T
    raise ValueError(f"estimator must be one of {get_args(KLEstimator)}, got {estimator!r}.")


def penalised_rewards(
    rewards_T: Tensor, logprobs_T: Tensor, ref_logprobs_T: Tensor, loss_mask_T: Tensor, *, coef: float, estimator: KLEstimator
) -> Tensor:
    """[T] each own token's reward less coef * KL of the sampling policy from the reference; 0 where loss_mask is False.

    k1 is the usual one: its mean is the KL. Source: InstructGPT arXiv:2203.02155 eq. 2.
    """
    kl_T = kl_estimate(logprobs_T, ref_logprobs_T, estimator=estimator)
    return (rewards_T - coef * kl_T).masked_fill(~loss_mask_T, 0.0)
