"""Baselines (a role's past, a plan's samples, without the plan) against hand-computed numbers. Shapes: N traces, R roles, P plans."""

import math

import pytest
import torch

from megatron_rema.algorithm.baseline import RunningMean, counterfactual_advantage, ema_baseline, plan_rewards

NAN = float("nan")


def test_a_reward_is_compared_with_the_running_mean_of_its_role():
    state = RunningMean.start(2)
    # step 1, nothing before: role 0 mean (1 + 0) / 2 = 0.5, role 1 mean 4
    advantages_N, state = ema_baseline(torch.tensor([1.0, 4.0, 0.0]), torch.tensor([0, 1, 0]), state, decay=0.75)
    assert advantages_N.tolist() == [0.5, 0.0, -0.5] and advantages_N.dtype == torch.float32
    # s0 = 0.25 * 0.5 = 0.125, w0 = 0.25; s1 = 0.25 * 4 = 1, w1 = 0.25
    assert state.sums_R.tolist() == [0.125, 1.0] and state.weights_R.tolist() == [0.25, 0.25]
    # step 2, role 0 alone: b0 = 0.125 / 0.25 = 0.5 (not this step's mean, 2); s0 = 0.75 * 0.125 + 0.25 * 2 = 0.59375, w0 = 0.4375
    advantages_N, state = ema_baseline(torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), state, decay=0.75)
    assert advantages_N.tolist() == [2.5, 0.5]
    assert state.sums_R.tolist() == [0.59375, 1.0] and state.weights_R.tolist() == [0.4375, 0.25]  # role 1 did not play: kept
    # step 3: b0 = 0.59375 / 0.4375 = 1.357142..., b1 = 1 / 0.25 = 4
    advantages_N, _ = ema_baseline(torch.tensor([1.0, 4.0]), torch.tensor([0, 1]), state, decay=0.75)
    assert advantages_N.tolist() == pytest.approx([1 - 19 / 14, 0.0], abs=1e-7)


def test_a_constant_reward_has_advantage_zero_from_the_first_step_on():
    state = RunningMean.start(1)
    for _ in range(5):
        advantages_N, state = ema_baseline(torch.full((3,), 0.7), torch.zeros(3, dtype=torch.long), state, decay=0.9)
        assert advantages_N.tolist() == pytest.approx([0.0] * 3, abs=1e-7)


def test_the_state_given_in_is_not_changed_and_no_trace_changes_nothing():
    before = RunningMean(torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    ema_baseline(torch.tensor([3.0]), torch.tensor([0]), before, decay=0.5)
    assert before.sums_R.tolist() == before.weights_R.tolist() == [0.5]
    advantages_N, after = ema_baseline(torch.zeros(0), torch.zeros(0, dtype=torch.long), before, decay=0.5)
    assert advantages_N.tolist() == [] and after.sums_R.tolist() == after.weights_R.tolist() == [0.5]


def test_a_nan_reward_shows_in_its_role_and_only_there():
    state = RunningMean.start(2)
    advantages_N, state = ema_baseline(torch.tensor([NAN, 1.0, 2.0]), torch.tensor([0, 0, 1]), state, decay=0.5)
    assert advantages_N.isnan().tolist() == [True, True, False]
    assert state.sums_R.isnan().tolist() == [True, False]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_learns_nothing_is_refused_by_name(decay):
    with pytest.raises(ValueError, match=f"decay .* got {decay}"):
        ema_baseline(torch.ones(1), torch.zeros(1, dtype=torch.long), RunningMean.start(1), decay=decay)


def test_a_plan_earns_the_mean_of_its_reasoner_samples():
    # plan 0: (1 + 0 + 0 + 1) / 4 = 0.5; plan 1: no sample; plan 2: (-1 + 0.5) / 2 = -0.25; plan 3: 1
    rewards_N = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, 0.5, 1.0])
    rewards_P = plan_rewards(rewards_N, torch.tensor([0, 2, 0, 0, 3, 2, 0]), 4)
    assert rewards_P[[0, 2, 3]].tolist() == [0.5, -0.25, 1.0] and rewards_P.dtype == torch.float32
    assert math.isnan(rewards_P[1])  # not known is not 0


def test_a_plan_outside_the_number_of_plans_is_refused():
    with pytest.raises(AssertionError):
        plan_rewards(torch.ones(1), torch.tensor([2]), 2)


def test_an_episode_is_compared_with_the_prompts_episodes_without_its_plan():
    # group 7: with plan [1, 0, 1], without [0, 0.5] -> b = 0.25; group 3: with [1], without [1] -> b = 1; group 5: none without
    rewards_N = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 1.0, 2.0])
    group_ids_N = torch.tensor([7, 7, 3, 7, 7, 7, 3, 5])
    is_without_N = torch.tensor([False, True, False, False, True, False, True, False])
    expected = [0.75, 0.0, 0.0, -0.25, 0.0, 0.75, 0.0, 0.0]
    advantages_N = counterfactual_advantage(rewards_N, group_ids_N, is_without_N)
    assert advantages_N.tolist() == expected and advantages_N.dtype == torch.float32


def test_a_plan_that_changes_nothing_earns_nothing_and_a_harmful_one_less():
    group_ids_N, is_without_N = torch.zeros(4, dtype=torch.long), torch.tensor([False, False, True, True])
    assert counterfactual_advantage(torch.tensor([0.9] * 4), group_ids_N, is_without_N).tolist() == [0.0] * 4
    # right 1 of 2 with its plan, 2 of 2 without: 1 - 1 = 0 and 0 - 1 = -1
    assert counterfactual_advantage(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_ids_N, is_without_N).tolist() == [0.0, -1.0, 0.0, 0.0]


def test_a_nan_of_the_baseline_shows_in_its_group_and_a_factual_nan_only_in_itself():
    group_ids_N, is_without_N = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([False, False, True] * 2)
    of_baseline_N = counterfactual_advantage(torch.tensor([1.0, 0.0, NAN, 1.0, 0.0, 0.0]), group_ids_N, is_without_N)
    assert of_baseline_N.isnan().tolist() == [True, True, False, False, False, False]
    of_episode_N = counterfactual_advantage(torch.tensor([NAN, 0.0, 1.0, 1.0, 0.0, 0.0]), group_ids_N, is_without_N)
    assert of_episode_N.isnan().tolist() == [True, False, False, False, False, False]
