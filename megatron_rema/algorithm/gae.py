"""Generalised advantage estimation over an agent's own tokens, with its own discount and lambda between turns. Pure.

Shapes: T label positions of packed traces, S own tokens of all of them, B traces with an own token.
Sources: GAE arXiv:1506.02438 eq. 16; two levels in one recursion after the bi-level GAE of arXiv:2510.16907 (VAGEN).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Advantages and returns (= advantages + values), both [T] float32 without gradient; 0 where loss_mask is False.

    Only own tokens (loss_mask True) are actions: the one after token t is the next own token of the same trace, however many
    observation tokens lie between. ``values_T[t]`` is the value of the state in which own token t is chosen.

    A_t = r_t + g_t V_next - V_t + g_t l_t A_next
    (g_t, l_t) = (discount, gae_lambda) where next belongs to the same turn, (turn_discount, turn_lambda) where it opens a
    later one; V_next = A_next = 0 after a trace's last own token: an episode ends there, cut or not.

    Turns need not be consecutive numbers, a trace's tokens must lie next to each other. Nothing is read where loss_mask is
    False; a NaN reaches the tokens of its own trace up to where it stands, and no other trace. Computed in float64.
    Raises ValueError for a discount or lambda outside [0, 1].
    """
    check_discounts(discount=discount, gae_lambda=gae_lambda, turn_discount=turn_discount, turn_lambda=turn_lambda)
    assert rewards_T.shape == values_T.shape == turn_ids_T.shape == trace_ids_T.shape == loss_mask_T.shape, "one value per position"
    assert loss_mask_T.dim() == 1 and loss_mask_T.dtype == torch.bool, (loss_mask_T.shape, loss_mask_T.dtype)
    own_S = loss_mask_T.nonzero()[:, 0]
    rewards_S, values_S, turn_ids_S = rewards_T[own_S].double(), values_T[own_S].double(), turn_ids_T[own_S]
    assert bool((turn_ids_S >= 0).all()), "every own token needs a turn id"
    traces_B, trace_S, count_B = trace_ids_T[own_S].unique_consecutive(return_inverse=True, return_counts=True)
    assert traces_B.unique().numel() == traces_B.numel(), "the tokens of one trace must lie next to each other"

    to_come_S = (count_B.cumsum(0) - 1)[trace_S] - torch.arange(own_S.numel(), device=own_S.device)  # 0 at a trace's last own token
    opens_turn_S = turn_ids_S != turn_ids_S.roll(-1)  # does the next own token? At a trace's last there is none to discount
    discount_S = torch.where(opens_turn_S, turn_discount, discount).double()
    decay_S = discount_S * torch.where(opens_turn_S, turn_lambda, gae_lambda).double()
    next_values_S = values_S.roll(-1).masked_fill(to_come_S == 0, 0.0)  # filled before it is multiplied: it is another trace's
    delta_S = rewards_S + discount_S * next_values_S - values_S
    advantages_S = _reverse_scan_S(delta_S, decay_S, to_come_S, trace_S, count_B)

    advantages_T = torch.zeros(loss_mask_T.shape, dtype=torch.float64, device=loss_mask_T.device)
    returns_T = torch.zeros_like(advantages_T)
    advantages_T[own_S] = advantages_S
    returns_T[own_S] = advantages_S + values_S
    return advantages_T.float(), returns_T.float()


def check_discounts(**numbers: float) -> None:
    """Raises ValueError for a discount or lambda outside [0, 1]."""
    for name, value in numbers.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}.")


def _reverse_scan_S(delta_S: Tensor, decay_S: Tensor, to_come_S: Tensor, trace_S: Tensor, count_B: Tensor) -> Tensor:
    """x_t = delta_t + decay_t x_(t+1) inside each trace: all traces step together, from their ends to their beginnings.

    Traces are ranked by falling length, so that those which still have a token are always the first ones: no padding, memory
    O(S), as many steps as the longest trace has own tokens.
    """
    if not delta_S.numel():
        return delta_S
    rank_B = torch.empty_like(count_B)
    rank_B[count_B.argsort(descending=True)] = torch.arange(count_B.numel(), device=count_B.device)
    order_S = (to_come_S * count_B.numel() + rank_B[trace_S]).argsort()
    steps = to_come_S.bincount().tolist()  # how many traces have a token at that distance from their end: never rises
    carry_B = delta_S.new_zeros(steps[0])
    scanned = []
    for delta_n, decay_n in zip(delta_S[order_S].split(steps), decay_S[order_S].split(steps), strict=True):
        carry_B = torch.addcmul(delta_n, decay_n, carry_B[: delta_n.numel()])
        scanned.append(carry_B)
    advantages_S = torch.empty_like(delta_S)
    advantages_S[order_S] = torch.cat(scanned)
    return advantages_S
