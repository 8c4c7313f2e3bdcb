"""The critic's clipped loss and how much of the returns it explains. Pure: no process groups.

Shapes: T label positions of one packed microbatch.
As in losses.py the loss is a plain SUM over positions of ``loss_weights * per-token loss``; the weights hold the GLOBAL
normaliser of the optimizer step.
Sources: value clipping as in OpenAI baselines ppo2, beside PPO arXiv:1707.06347; examined in arXiv:2006.05990.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_rema.algorithm.masked import masked_sum


@dataclass(frozen=True)
class ValueLossStats:
    """Sums over one microbatch, detached scalars. Add them over microbatches and data-parallel ranks, then ``means``.

    The *_tokens sums are float64: a variance is a small difference of two of them.
    """

    loss: Tensor  # the objective: sum of loss_weights * per-token loss
    num_tokens: Tensor  # trained tokens: the denominator of *_tokens
    clipped_tokens: Tensor  # tokens whose clipped branch was the larger loss: no gradient
    values_tokens: Tensor  # sum of V
    returns_tokens: Tensor  # sum of R
    squared_returns_tokens: Tensor  # sum of R^2
    squared_errors_tokens: Tensor  # sum of (R - V)^2, unclipped and unweighted

    def as_dict(self) -> dict[str, Tensor]:
        """Every sum by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def means(sums: Mapping[str, float]) -> dict[str, float]:
        """Reduced sums -> metrics, each divided by its own denominator (0.0 where that is 0).

        explained_variance = 1 - sum (R - V)^2 / sum (R - mean R)^2: 1 is perfect, 0 is no better than the mean return as a
        constant, below 0 is worse than that (a constant bias counts as error). Returns that do not vary leave nothing to
        explain: 0.
        """

        def mean(name: str) -> float:
            return sums[name] / sums["num_tokens"] if sums["num_tokens"] else 0.0

        spread = sums["squared_returns_tokens"] - sums["returns_tokens"] * mean("returns_tokens")
        varies = not spread <= 1e-9 * sums["squared_returns_tokens"]  # below that it is rounding; written so that a NaN shows
        return {
            "loss": sums["loss"],
            "num_tokens": sums["num_tokens"],
            "value_mean": mean("values_tokens"),
            "return_mean": mean("returns_tokens"),
            "squared_error_mean": mean("squared_errors_tokens"),
            "value_clipped_frac": mean("clipped_tokens"),
            "explained_variance": 1.0 - sums["squared_errors_tokens"] / spread if varies else 0.0,
        }


def value_loss(
    values_T: Tensor,
    returns_T: Tensor,
    old_values_T: Tensor,
    loss_weights_T: Tensor,
    loss_mask_T: Tensor,
    *,
    clip: float | None,
) -> tuple[Tensor, ValueLossStats]:
    """Scalar loss (a SUM, see the file's head) and its detached sums.

    L = 0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2), the second branch only with a clip above 0 (None or 0
    switch it off). ``clip`` is in units of reward: a step may not take a value further than that from where the rollout had it.

    Untrained positions are not read. No trained token: loss 0 with gradient 0. Gradient flows to values_T only.
    """
    if clip is not None and not clip >= 0.0:
        raise ValueError(f"value clip must be >= 0, got {clip}; 0 or None switch it off.")

    def trained(values_T: Tensor) -> Tensor:
        return values_T.masked_fill(~loss_mask_T, 0.0)  # first of all, so that an untrained NaN meets no gradient either

    values_T, returns_T = trained(values_T), trained(returns_T.detach())
    old_values_T, loss_weights_T = trained(old_values_T.detach()), trained(loss_weights_T.detach())
    errors_T = (values_T - returns_T).square()
    loss_T = errors_T
    is_clipped_T = torch.zeros_like(loss_mask_T)
    if clip:
        clipped_errors_T = (values_T.clamp(old_values_T - clip, old_values_T + clip) - returns_T).square()
        is_clipped_T = clipped_errors_T > errors_T
        loss_T = torch.maximum(errors_T, clipped_errors_T)
    loss = masked_sum(loss_weights_T * 0.5 * loss_T, loss_mask_T)

    with torch.no_grad():

        def over_tokens(values_T: Tensor) -> Tensor:
            return masked_sum(values_T.double(), loss_mask_T)

        stats = ValueLossStats(
            loss=loss.detach().float(),
            num_tokens=loss_mask_T.sum().float(),
            clipped_tokens=over_tokens(is_clipped_T),
            values_tokens=over_tokens(values_T),
            returns_tokens=over_tokens(returns_T),
            squared_returns_tokens=over_tokens(returns_T.double().square()),
            squared_errors_tokens=over_tokens((values_T.double() - returns_T.double()).square()),
        )
    return loss, stats
