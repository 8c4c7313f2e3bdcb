"""Advantage estimators against hand-computed numbers. Shapes: N traces, K turns, T label positions."""

import math

import pytest
import torch

from megatron_rema.algorithm.advantage import group_advantage, reinforce_plus_plus, turn_returns, turn_to_tokens

NAN = float("nan")
# two interleaved groups: 7 = [1, 0, 0, 1], 3 = [0, 3], and 5 = [2] alone
REWARDS_N = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 1.0])
GROUPS_N = torch.tensor([7, 3, 7, 5, 7, 3, 7])


def test_grpo_divides_by_the_sample_deviation():
    # group 7: mean 0.5, std sqrt(4 * 0.25 / 3) = 0.5774 -> +-0.8660; group 3: mean 1.5, std sqrt(2 * 2.25 / 1) = 2.1213 -> +-0.7071
    expected = [0.8660, -0.7071, -0.8660, 0.0, -0.8660, 0.7071, 0.8660]
    assert group_advantage(REWARDS_N, GROUPS_N, estimator="grpo").tolist() == pytest.approx(expected, abs=1e-4)


def test_dr_grpo_only_subtracts_the_group_mean():
    expected = [0.5, -1.5, -0.5, 0.0, -0.5, 1.5, 0.5]
    assert group_advantage(REWARDS_N, GROUPS_N, estimator="dr_grpo").tolist() == expected


def test_rloo_compares_with_the_mean_of_the_others():
    # group 7: 1 - (0+0+1)/3 = 2/3 and 0 - (1+0+1)/3 = -2/3; group 3: 0 - 3 and 3 - 0
    expected = [2 / 3, -3.0, -2 / 3, 0.0, -2 / 3, 3.0, 2 / 3]
    assert group_advantage(REWARDS_N, GROUPS_N, estimator="rloo").tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("rewards", [[0.7], [0.9] * 3, [0.7] * 13])
def test_a_group_of_one_or_of_equal_rewards_has_advantage_exactly_zero(estimator, rewards):
    # in float32 the mean of three 0.9 is 6e-8 off 0.9, which (std + 1e-6) would magnify to an advantage of 0.06
    advantages_N = group_advantage(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long), estimator=estimator)
    assert advantages_N.tolist() == [0.0] * len(rewards)
    assert advantages_N.dtype == torch.float32


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_nan_reward_shows_in_its_group_and_only_there(estimator):
    advantages_N = group_advantage(torch.tensor([1.0, NAN, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]), estimator=estimator)
    assert advantages_N.isnan().tolist() == [True, True, False, False]


def test_no_traces_give_no_advantages():
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long), estimator="grpo").tolist() == []


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="'gae'"):
        group_advantage(REWARDS_N, GROUPS_N, estimator="gae")


def test_turn_returns_are_discounted_inside_each_trace():
    # trace 4: 2 + .5 * 1 = 2.5 | trace 1: 1 + .5 * (0 + .5 * 4) = 2, 0 + .5 * 4 = 2, 4 | trace 9: 3
    returns_K = turn_returns(torch.tensor([2.0, 1.0, 1.0, 0.0, 4.0, 3.0]), torch.tensor([4, 4, 1, 1, 1, 9]), turn_discount=0.5)
    assert returns_K.tolist() == [2.5, 1.0, 2.0, 2.0, 4.0, 3.0]
    assert turn_returns(torch.zeros(0), torch.zeros(0, dtype=torch.long), turn_discount=0.5).tolist() == []


def test_turn_returns_refuse_a_trace_in_two_pieces():
    with pytest.raises(AssertionError, match="next to each other"):
        turn_returns(torch.ones(3), torch.tensor([0, 1, 0]), turn_discount=1.0)


def test_reinforce_plus_plus_whitens_returns_over_tokens():
    # returns (discount 1): trace 0 -> 1, 1; trace 1 -> 0. tokens 1, 2, 3: mean 3/6 = 0.5, variance 0.25 -> +1, +1, -1
    advantages_K = reinforce_plus_plus(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), turn_discount=1.0)
    assert advantages_K.tolist() == pytest.approx([1.0, 1.0, -1.0], abs=1e-6)


def test_turn_values_reach_their_tokens_discounted_by_the_tokens_to_come():
    turn_ids_T = torch.tensor([-1, 1, 1, 1, -1, 0, -1])
    values_K = torch.tensor([5.0, 8.0, 100.0])  # turn 2 has no token here
    assert turn_to_tokens(values_K, turn_ids_T).tolist() == [0, 8, 8, 8, 0, 5, 0]
    # turn 1: 8 * .5^2, 8 * .5, 8
    assert turn_to_tokens(values_K, turn_ids_T, token_discount=0.5).tolist() == [0, 2, 4, 8, 0, 5, 0]


def test_grpo_is_blind_to_a_shift_and_a_scale_of_the_rewards():
    rewards_N = torch.rand(64, generator=torch.Generator().manual_seed(1))
    group_ids_N = torch.arange(64) % 8
    a = group_advantage(rewards_N, group_ids_N, estimator="grpo")
    b = group_advantage(rewards_N * 8 - 2, group_ids_N, estimator="grpo")
    # std is about 0.3, so eps 1e-6 moves the scale by 3e-6 relative; advantages are below 3
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert math.isclose(a.double().sum().item(), 0.0, abs_tol=1e-5)
