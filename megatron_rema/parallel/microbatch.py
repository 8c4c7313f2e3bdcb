"""Deals sequences to data-parallel ranks and microbatches so that all of them carry about the same number of tokens.

All microbatches of one optimizer step are padded to one common length, hence the fullest one sets the cost of every other:
the plan uses as few microbatches as it can and levels them, longest sequence first into the emptiest one.
Pure: no clock, no randomness; every rank computes the same plan from the same lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Plan = list[list[list[int]]]  # [rank][microbatch] -> indices of its sequences, ascending


def plan_microbatches(lengths: Sequence[int], *, max_tokens: int, num_ranks: int, multiple: int) -> Plan:
    """Every sequence once; the same number of microbatches on every rank; none above ``max_tokens`` once padded to ``multiple``.

    Where there are fewer sequences than microbatches some are empty ([]): they still run, as padding, so that ranks stay in step.
    """
    if num_ranks < 1 or multiple < 1:
        raise ValueError(f"num_ranks ({num_ranks}) and multiple ({multiple}) must be at least 1.")
    capacity = max_tokens // multiple * multiple
    if capacity == 0:
        raise ValueError(f"max_tokens ({max_tokens}) is below multiple ({multiple}): no microbatch can be padded to it; raise max_tokens.")
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"sequence {index} has {length} tokens; a microbatch holds 1 to {capacity} "
                f"(max_tokens {max_tokens} rounded down to a multiple of {multiple}); raise max_tokens or drop the sequence."
            )
    num_microbatches = max(1, -(-sum(lengths) // (capacity * num_ranks)))
    while (bins := _level(lengths, num_microbatches * num_ranks, capacity)) is None:
        num_microbatches += 1
    return _deal(bins, lengths, num_ranks)


def padded_tokens(plan: Plan, lengths: Sequence[int], *, multiple: int) -> int:
    """T, the common length of all microbatches: the fullest one rounded up to ``multiple`` (at least one ``multiple``)."""
    fullest = max(sum(lengths[i] for i in microbatch) for rank in plan for microbatch in rank)
    return max(1, -(-fullest // multiple)) * multiple


def _level(lengths: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Longest first, each into the emptiest bin (ties: the lowest number); None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, number = emptiest[0]
        if tokens + lengths[index] > capacity:
            return None
        heapq.heapreplace(emptiest, (tokens + lengths[index], number))
        bins[number].append(index)
    return [sorted(indices) for indices in bins]


def _deal(bins: list[list[int]], lengths: Sequence[int], num_ranks: int) -> Plan:
    """Fullest bins first, back and forth over the ranks: 0 1 2 2 1 0 0 1 2 ..."""
    bins = sorted(bins, key=lambda indices: (-sum(lengths[i] for i in indices), indices))
    rounds = [bins[start : start + num_ranks] for start in range(0, len(bins), num_ranks)]
    return [[dealt[rank if number % 2 == 0 else -1 - rank] for number, dealt in enumerate(rounds)] for rank in range(num_ranks)]
