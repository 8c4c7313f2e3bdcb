"""The plan that deals sequences to ranks and microbatches."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.parallel.microbatch import padded_tokens, plan_microbatches


@st.composite
def workloads(draw):
    multiple = draw(st.sampled_from([1, 8, 16]))
    capacity = multiple * draw(st.integers(1, 20))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=60))
    return lengths, dict(max_tokens=capacity + draw(st.integers(0, multiple - 1)), num_ranks=draw(st.integers(1, 5)), multiple=multiple)


@settings(deadline=None)  # the machine may be busy
@given(workloads())
def test_every_sequence_is_planned_once_within_the_budget_and_ranks_stay_in_step(workload):
    lengths, limits = workload
    plan = plan_microbatches(lengths, **limits)
    assert len(plan) == limits["num_ranks"]
    assert len({len(microbatches) for microbatches in plan}) == 1 and len(plan[0]) >= 1
    assert sorted(i for rank in plan for microbatch in rank for i in microbatch) == list(range(len(lengths)))
    tokens = padded_tokens(plan, lengths, multiple=limits["multiple"])
    assert tokens % limits["multiple"] == 0 and 0 < tokens <= limits["max_tokens"]
    assert all(sum(lengths[i] for i in microbatch) <= tokens for rank in plan for microbatch in rank)


@settings(deadline=None)  # the machine may be busy
@given(workloads())
def test_no_microbatch_exceeds_another_by_more_than_the_longest_sequence(workload):
    lengths, limits = workload
    loads = [sum(lengths[i] for i in microbatch) for rank in plan_microbatches(lengths, **limits) for microbatch in rank]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_longest_first_levels_the_microbatches():
    # into 2 x 1 bins: 9 | 7, then 6 -> 13 on the 7, 5 -> 14 on the 9, 3 -> 16 on the 13, 2 -> 16 on the 14; dealt by content on the tie
    lengths = [2, 9, 3, 7, 5, 6]
    plan = plan_microbatches(lengths, max_tokens=20, num_ranks=2, multiple=8)
    assert plan == [[[0, 1, 4]], [[2, 3, 5]]]
    assert padded_tokens(plan, lengths, multiple=8) == 16


def test_there_are_no_more_microbatches_than_the_budget_asks_for():
    # 32 tokens in 8s; a budget of 16 needs 2 microbatches on one rank, 1 on each of two
    assert [len(rank) for rank in plan_microbatches([8] * 4, max_tokens=16, num_ranks=1, multiple=8)] == [2]
    assert [len(rank) for rank in plan_microbatches([8] * 4, max_tokens=16, num_ranks=2, multiple=8)] == [1, 1]


def test_ranks_without_a_sequence_run_an_empty_microbatch():
    plan = plan_microbatches([5], max_tokens=16, num_ranks=3, multiple=8)
    assert sorted(plan) == [[[]], [[]], [[0]]]
    assert padded_tokens(plan, [5], multiple=8) == 8
    empty = plan_microbatches([], max_tokens=16, num_ranks=2, multiple=8)
    assert empty == [[[]], [[]]]
    assert padded_tokens(empty, [], multiple=8) == 8


def test_the_work_of_two_thousand_random_sequences_is_level_to_one_percent():
    lengths = [64 + (i * 7919) % 900 for i in range(2000)]
    plan = plan_microbatches(lengths, max_tokens=16384, num_ranks=8, multiple=64)
    loads = [sum(lengths[i] for i in microbatch) for rank in plan for microbatch in rank]
    assert max(loads) <= 1.01 * sum(loads) / len(loads)


@pytest.mark.parametrize(
    ("lengths", "limits", "message"),
    [
        ([3, 17], dict(max_tokens=20, num_ranks=1, multiple=8), r"sequence 1 has 17 tokens; a microbatch holds 1 to 16"),
        ([0], dict(max_tokens=20, num_ranks=1, multiple=8), r"sequence 0 has 0 tokens"),
        ([1], dict(max_tokens=7, num_ranks=1, multiple=8), r"max_tokens \(7\) is below multiple \(8\)"),
        ([1], dict(max_tokens=8, num_ranks=0, multiple=8), r"num_ranks \(0\)"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_numbers(lengths, limits, message):
    with pytest.raises(ValueError, match=message):
        plan_microbatches(lengths, **limits)


def test_no_rank_trains_mostly_one_role():
    """Views of two roles of unlike lengths, role after role, on 4 ranks: every rank gets about a quarter of either role's tokens."""
    rng = random.Random(4)
    lengths = [rng.randint(50, 150) for _ in range(64)] + [rng.randint(200, 400) for _ in range(64)]  # meta-thinker, then reasoner

    def shares(plan: list[list[list[int]]]) -> list[float]:
        """Each rank's share of each role's tokens."""
        roles = (range(64), range(64, 128))
        return [
            sum(lengths[i] for microbatch in rank for i in microbatch if i in role) / sum(lengths[i] for i in role)
            for rank in plan
            for role in roles
        ]

    plan = plan_microbatches(lengths, max_tokens=4096, num_ranks=4, multiple=8)
    assert all(0.15 < share < 0.35 for share in shares(plan)), shares(plan)
    naive = [[list(range(start, start + 32))] for start in range(0, 128, 32)]  # the same batch cut into four equal parts
    assert sorted(shares(naive))[:4] == [0.0] * 4, "half the ranks see one role only"
