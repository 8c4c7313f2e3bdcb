"""What holds a policy near its reference besides a fixed KL term: an adaptive coefficient, and a penalty on the chi-squared divergence.

Shapes: N traces of one policy in one step. Pure: torch in, torch out.
Sources: adaptive KL, Ziegler et al. arXiv:1909.08593 section 2.2; chi-squared, Laidlaw et al. arXiv:2403.03185.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KL_ERROR = 0.2  # a step's relative error counts at most so much, however far off the KL is
CHI2_FLOOR = 1e-2  # of an estimated divergence: sqrt has no slope at 0, and an estimate may fall below


def adapted_kl_coef(coef: float, kl: float, *, target: float, num_traces: int, horizon: float) -> float:
    """coef * (1 + clip(kl / target - 1, +-0.2) * num_traces / horizon), ``kl`` and ``target`` in nats per token.

    The larger the horizon (in traces), the slower. num_traces / horizon counts as 1 at most, so that a coefficient stays positive. A KL
    that is not finite changes nothing.
    """
    if not math.isfinite(kl):
        return coef
    error = min(max(kl / target - 1.0, -KL_ERROR), KL_ERROR)
    return coef * (1.0 + error * min(num_traces / horizon, 1.0))


def chi_squared_penalty(log_ratios_N: Tensor, *, coef: float, log_ratio_cap: float) -> tuple[Tensor, float]:
    """What J - coef * sqrt(chi2(pi || pi_ref)) adds to the advantage of each trace, [N] float32, and the estimate of chi2.

    ``log_ratios_N`` = log pi(trace) - log pi_ref(trace) (nats, summed over own tokens) of traces sampled from pi. With w = exp(min(log
    ratio, cap)): chi2 + 1 = E_pi[w], and grad sqrt(chi2) = E_pi[w grad log pi] / sqrt(chi2), hence

    A_i -= coef * (w_i - mean w) / sqrt(chi2),   chi2 = max(mean w - 1, 0.01)

    where subtracting the mean changes no expectation and takes noise away. Equal policies: exactly 0.
    """
    if not log_ratios_N.numel():
        return torch.zeros(0), 0.0
    weights_N = log_ratios_N.double().clamp(max=log_ratio_cap).exp()
    chi2 = (weights_N.mean() - 1.0).clamp(min=CHI2_FLOOR)
    return (-coef * (weights_N - weights_N.mean()) / chi2.sqrt()).float(), float(weights_N.mean() - 1.0)
