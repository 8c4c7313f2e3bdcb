"""The importance ratio between the policy being trained and the policy that sampled: per token, per turn or per trace.

Shapes: T label positions. The *unit* of a level is what shares one ratio: a token, a turn, a trace.
Sources: token PPO arXiv:1707.06347; turn ReMA arXiv:2503.09501 (eq. 13 is the arithmetic mean, its code the geometric);
trace GSPO arXiv:2507.18071.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rema.algorithm.masked import segment_mean_T

Level = Literal["token", "turn", "trace"]
Mean = Literal["geometric", "arithmetic"]


def unit_ids(turn_ids_T: Tensor, trace_ids_T: Tensor, loss_mask_T: Tensor, *, num_turns: int, level: Level) -> tuple[Tensor, int]:
    """[T] id of each trained token's unit (-1 where loss_mask is False) and an upper bound of the number of units.

    The bound for tokens and traces is T, a shape: asking the ids for their maximum would stall a GPU.
    """
    if level not in get_args(Level):
        raise ValueError(f"level must be one of {get_args(Level)}, got {level!r}.")
    if level == "turn":
        return turn_ids_T.masked_fill(~loss_mask_T, -1), num_turns
    ids_T = trace_ids_T if level == "trace" else torch.arange(loss_mask_T.numel(), device=loss_mask_T.device)
    return ids_T.masked_fill(~loss_mask_T, -1), loss_mask_T.numel()


def importance_ratio(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    turn_ids_T: Tensor,
    trace_ids_T: Tensor,
    loss_mask_T: Tensor,
    *,
    num_turns: int,
    level: Level,
    mean: Mean = "geometric",
    log_ratio_cap: float = 3.0,
) -> Tensor:
    """[T] ratio of each token's unit, with delta = logprobs - old_logprobs (nats); 1 where loss_mask is False.

    geometric   r = exp(min(mean delta, cap))      arithmetic   r = mean exp(min(delta, cap))

    The cap is one-sided: it bounds the exponential and lets small ratios be small. Beyond it the gradient is 0. Equal for
    level "token". Gradient flows to logprobs_T only. Every trained token of level "turn" must have a turn id.
    """
    if mean not in get_args(Mean):
        raise ValueError(f"mean must be one of {get_args(Mean)}, got {mean!r}.")
    ids_T, num_units = unit_ids(turn_ids_T, trace_ids_T, loss_mask_T, num_turns=num_turns, level=level)
    delta_T = (logprobs_T - old_logprobs_T.detach()).masked_fill(~loss_mask_T, 0.0)
    if level == "token":
        return delta_T.clamp(max=log_ratio_cap).exp()
    if mean == "geometric":
        return segment_mean_T(delta_T, ids_T, num_units).clamp(max=log_ratio_cap).exp()
    return segment_mean_T(delta_T.clamp(max=log_ratio_cap).exp(), ids_T, num_units).masked_fill(~loss_mask_T, 1.0)
