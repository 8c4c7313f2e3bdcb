"""How packed sequences are laid side by side for attention: by hand, and as properties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.parallel.pipeline import SHORTEST_IN_BLOCK, blocks_of_similar_length, packing_of
from megatron_rema.types import Batch


def packing(lengths: list[int]):
    """The packing of a batch whose tokens are 100, 101, ..."""
    total = sum(lengths)
    nothing = torch.zeros(total, dtype=torch.long)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return packing_of(Batch(nothing, nothing, nothing, boundaries, max(lengths), nothing.bool(), nothing, nothing, boundaries))


def test_a_block_ends_where_a_sequence_is_shorter_than_three_quarters_of_its_longest():
    assert blocks_of_similar_length([8, 8, 6, 5, 4, 1]) == ((3, 8), (2, 5), (1, 1))  # 6 = 0.75 * 8; 5 < 6; 4 >= 3.75; 1 < 3.75
    assert blocks_of_similar_length([]) == ()


def test_tokens_are_not_moved_where_all_sequences_have_one_length():
    found = packing([4, 4, 4])
    assert found.cells is None and found.slots is None and found.blocks == ((3, 4),)
    assert found.positions.tolist() == [0, 1, 2, 3] * 3


def test_sequences_stand_longest_first_padded_to_their_block():
    # lengths 2, 5, 4: order 5, 4, 2; blocks (5, 4) of width 5 and (2) of width 2: 12 cells; tokens 0-1, 2-6, 7-10
    found = packing([2, 5, 4])
    assert found.blocks == ((2, 5), (1, 2))
    assert found.slots.tolist() == [10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert found.cells.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 1]  # cell 9 is padding: any token


@given(st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=12).filter(any))
def test_every_token_has_a_cell_of_its_own_in_its_sequences_row(lengths):
    found = packing(lengths)
    total = sum(lengths)
    cells = found.cells if found.cells is not None else torch.arange(total)
    slots = found.slots if found.slots is not None else torch.arange(total)
    assert torch.equal(cells[slots], torch.arange(total)) and len(set(slots.tolist())) == total
    rows = [(start, width) for count, width in found.blocks for start in range(count)]
    assert len(cells) == sum(width for _, width in rows) <= total / SHORTEST_IN_BLOCK
    starts = torch.tensor([0, *[width for _, width in rows]]).cumsum(0)[:-1]
    row_of_slot = torch.searchsorted(starts, slots, right=True) - 1
    sequence_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for sequence, length in enumerate(lengths):
        own = row_of_slot[sequence_of_token == sequence]
        assert len(own.unique()) == (1 if length else 0), "a sequence lies in one row"
    assert torch.equal(slots - starts[row_of_slot], found.positions), "and begins at its first cell"
