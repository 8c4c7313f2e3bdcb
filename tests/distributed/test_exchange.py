"""Plain data between ranks arrives as it was sent, from any rank and in any group."""

from __future__ import annotations

import math

import torch.distributed as dist

from megatron_rema.parallel.exchange import broadcast, gather, gather_rows


def everything() -> tuple:
    rank = dist.get_rank()
    own = {"rank": rank, "third": 1 / 3, "text": "é" * rank, "nothing": None}
    pair = [dist.new_group([0, 1]), dist.new_group([2])][rank // 2]
    return (
        gather(own),
        gather_rows([{"row": rank}] * rank),  # rank 0 has none
        broadcast(own if rank == 2 else None, src=2),
        broadcast([rank, math.inf], src=1 if rank < 2 else 2, group=pair),
    )


def test_values_are_gathered_in_rank_order_and_broadcast_from_any_rank(run_ranks):
    def own(rank: int) -> dict:
        return {"rank": rank, "third": 1 / 3, "text": "é" * rank, "nothing": None}

    for rank, (gathered, rows, sent, within) in enumerate(run_ranks(3, everything)):
        assert gathered == [own(0), own(1), own(2)]  # floats exact
        assert rows == [{"row": 1}, {"row": 2}, {"row": 2}]
        assert sent == own(2) and within == [1 if rank < 2 else 2, math.inf]
