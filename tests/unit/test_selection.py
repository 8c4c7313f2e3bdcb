"""Masks over groups of rewards against hand-computed ones. Shapes: N traces."""

import pytest
import torch

from megatron_rema.algorithm.advantage import group_advantage
from megatron_rema.algorithm.selection import informative_groups, within_success_rate

NAN = float("nan")


def test_a_group_is_informative_where_its_rewards_differ():
    # interleaved: 7 = [1, 0], 3 = [0, 0, 0], 9 = [1, 1], 5 = [2] alone, -4 = [0.5, 0.5, 0.25]
    rewards_N = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 2.0, 0.0, 1.0, 0.5, 0.0, 0.25])
    group_ids_N = torch.tensor([7, 3, 9, 7, -4, 5, 3, 9, -4, 3, -4])
    expected = [True, False, False, True, True, False, False, False, True, False, True]
    assert informative_groups(rewards_N, group_ids_N).tolist() == expected


@pytest.mark.parametrize("nan_at", [0, 1])
def test_a_nan_makes_its_group_seen_and_no_other(nan_at):
    rewards = [0.0, 0.0, 1.0, 1.0]
    rewards[nan_at] = NAN
    assert informative_groups(torch.tensor(rewards), torch.tensor([0, 0, 1, 1])).tolist() == [True, True, False, False]


def test_rewards_that_only_rounding_could_part_are_equal():
    # the float32 mean of three 0.9 is 6e-8 off 0.9: a variance would call this group informative
    assert not informative_groups(torch.full((3,), 0.9), torch.zeros(3, dtype=torch.long)).any()
    assert informative_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_uninformative_groups_are_exactly_those_of_zero_advantage():
    generator = torch.Generator().manual_seed(0)
    rewards_N = torch.randint(0, 2, (256,), generator=generator).float()
    group_ids_N = torch.arange(256) % 64  # groups of 4: all alike with probability 1/8
    mask_N = informative_groups(rewards_N, group_ids_N)
    assert 0 < int(mask_N.sum()) < 256
    assert torch.equal(mask_N, group_advantage(rewards_N, group_ids_N, estimator="dr_grpo") != 0)


def test_prompts_are_kept_where_the_success_rate_is_within_the_range_ends_included():
    # ten samples a prompt: 1 right (0.1), 2 (0.2), 8 (0.8), 9 (0.9)
    rights = {40: 1, 41: 2, 42: 8, 43: 9}
    successes_N = torch.tensor([i < right for right in rights.values() for i in range(10)])
    group_ids_N = torch.tensor([name for name in rights for _ in range(10)])
    mask_N = within_success_rate(successes_N, group_ids_N, low=0.2, high=0.8)
    assert mask_N.tolist() == [False] * 10 + [True] * 20 + [False] * 10
    shuffled_N = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    again_N = within_success_rate(successes_N[shuffled_N].float(), group_ids_N[shuffled_N], low=0.2, high=0.8)
    assert torch.equal(again_N, mask_N[shuffled_N])


def test_a_rate_that_is_not_known_is_not_within():
    mask_N = within_success_rate(torch.tensor([NAN, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]), low=0.0, high=1.0)
    assert mask_N.tolist() == [False, False, True, True]


@pytest.mark.parametrize(("low", "high"), [(0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_an_impossible_range_is_refused_by_name(low, high):
    with pytest.raises(ValueError, match=f"low {low} and high {high}"):
        within_success_rate(torch.ones(1), torch.zeros(1, dtype=torch.long), low=low, high=high)
