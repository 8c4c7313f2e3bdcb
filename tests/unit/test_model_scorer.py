"""A reward model's scores as rewards: combined over heads, weighed, added to each role's last turn, and told apart in metrics."""

from __future__ import annotations

import pytest

from megatron_rema.reward.model_scorer import add_model_scores, combine
from megatron_rema.types import Episode, EpisodeStatus, Prompt, Role


def episode(episode_id: str, correct: float, status: EpisodeStatus = EpisodeStatus.FINISHED) -> Episode:
    rewards = {Role.META_THINKING: [0.0, correct], Role.REASONING: [0.0, correct]}
    return Episode(episode_id, Prompt("p", "q", "a"), 0, status=status, score={"correct": correct}, turn_rewards=rewards)


def test_heads_are_averaged_or_the_most_pessimistic_one_is_believed():
    assert combine([1.0, 3.0], "mean") == 2.0
    assert combine([1.0, 3.0], "min") == 1.0


def test_the_weighted_score_is_added_to_the_last_turn_of_every_rewarded_role():
    right, wrong = episode("r", 1.0), episode("w", 0.0)
    metrics = add_model_scores([right, wrong], {"r": [2.0, 4.0], "w": [-1.0, -1.0]}, weight=0.1, ensemble="mean")
    # 1 + 0.1 * 3 = 1.3; 0 + 0.1 * -1 = -0.1
    assert right.turn_rewards == {role: [0.0, pytest.approx(1.3)] for role in Role}
    assert wrong.turn_rewards == {role: [0.0, pytest.approx(-0.1)] for role in Role}
    assert right.score["model_score"] == 3.0
    assert metrics["reward/model/mean"] == 1.0 and metrics["reward/model/head_spread_mean"] == 1.0  # (3 - 1) / 2; (2 + 0) / 2
    assert metrics["reward/model/mean_when_correct"] == 3.0 and metrics["reward/model/mean_when_wrong"] == -1.0
    assert metrics["reward/model/unanswered_frac"] == 0.0


def test_an_episode_without_an_answer_is_worth_no_more_than_the_worst_answer():
    good, bad, silent = episode("good", 1.0), episode("bad", 0.0), episode("silent", 0.0, EpisodeStatus.TRUNCATED)
    silent.turn_rewards = {Role.META_THINKING: [0.0]}
    metrics = add_model_scores([good, bad, silent], {"good": [2.0], "bad": [-4.0]}, weight=0.5, ensemble="min")
    assert silent.turn_rewards == {Role.META_THINKING: [-2.0]}  # 0.5 * -4, as the bad one
    assert metrics["reward/model/unanswered_frac"] == pytest.approx(1 / 3) and metrics["reward/model/mean"] == -1.0  # (2 - 4) / 2


@pytest.mark.parametrize(("masked", "expected"), [(True, 0.0), (False, 1.5)])
def test_a_high_score_does_not_pay_for_an_unfinished_dialogue(masked, expected):
    cut = episode("cut", 0.0, EpisodeStatus.MAX_ROUNDS)
    add_model_scores([cut], {"cut": [3.0]}, weight=0.5, ensemble="mean", mask_unfinished_reward=masked)
    assert cut.turn_rewards == {role: [0.0, expected] for role in Role}


def test_a_counterfactual_episode_is_scored_and_left_out_of_the_means():
    real, other = episode("real", 1.0), episode("other", 0.0)
    other.counterfactual_of = "p"
    metrics = add_model_scores([real, other], {"real": [2.0, 1.0], "other": [-4.0, 8.0]}, weight=0.5, ensemble="min")
    assert other.turn_rewards == {role: [0.0, -2.0] for role in Role}  # 0 + 0.5 * -4
    assert metrics["reward/model/mean"] == 1.0 and metrics["reward/model/head_spread_mean"] == 1.0
    assert "reward/model/mean_when_wrong" not in metrics


def test_a_step_without_scored_episodes_has_no_model_metrics():
    assert add_model_scores([], {}, weight=1.0, ensemble="min") == {}
