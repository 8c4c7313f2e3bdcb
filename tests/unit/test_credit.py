"""Which rewards stand on which token before a critic's advantages are taken."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_rema.config import AlgorithmConfig, RolloutConfig
from megatron_rema.trainer.credit import (
    assign_advantages,
    chosen_for_training,
    credit_plans,
    generalized_advantages,
    informative_frac,
    penalise_overlong,
    share_plan_rewards,
)
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Trace, Turn

# two turns: prompt, own, own | heard | own; six tokens, so five labels: own at labels 0, 1 and 3, heard at 2 and 4
TRACE = Trace(
    episode_id="e",
    role=Role.REASONING,
    token_ids=(5, 6, 7, 8, 9, 4),
    loss_mask=(False, True, True, False, True, False),
    turn_ids=(-1, 0, 0, -1, 1, -1),
    rollout_logprobs=(0.0,) * 6,
    turn_rewards=(1.0, 3.0),
)


def returns(columns: dict, **algorithm) -> list[float]:
    """With values 0 and every discount and lambda 1 a token's return is the plain sum of rewards from it on."""
    found = generalized_advantages([TRACE], {"values": [torch.zeros(5)], **columns}, AlgorithmConfig(advantage="gae", **algorithm))
    return found["returns"][0].tolist()


def test_a_turns_reward_stands_on_its_last_token():
    # rewards 0, 1, -, 3: sums from each own token on are 4, 4, 3
    assert returns({}) == [4.0, 4.0, 0.0, 3.0, 0.0]


def test_every_own_token_pays_for_its_distance_from_the_reference():
    # k1 = old - ref: .5, -1, -, 2; rewards -.1*.5, 1 + .1*1, -, 3 - .1*2 = -.05, 1.1, -, 2.8; sums 3.85, 3.9, -, 2.8
    old, ref = torch.tensor([-1.0, -2.0, -9.0, -1.0, -9.0]), torch.tensor([-1.5, -1.0, -1.0, -3.0, -1.0])
    found = returns({"old_logprobs": [old], "ref_logprobs": [ref]}, reward_kl_coef=0.1)
    assert found == pytest.approx([3.85, 3.9, 0.0, 2.8, 0.0], abs=1e-6)


# --- episodes of a step -----------------------------------------------------------------------------------------------

META, REASONING = Role.META_THINKING, Role.REASONING


def spoken(role: Role, text: str, num_tokens: int = 4) -> Turn:
    return Turn(role, 0, (1,), Completion("r", (5,) * num_tokens, (-1.0,) * num_tokens, StopReason.STOP, 0), text)


def episode(prompt: str, index: int, correct: float, *, box: str = "", plan_of: str | None = None, num_tokens: int = 4) -> Episode:
    return Episode(
        f"0/{prompt}/{index}",
        Prompt(prompt, "?", "5"),
        index,
        turns=[spoken(META, "plan"), spoken(REASONING, f"\\boxed{{{box}}}" if box else "no box", num_tokens)],
        status=EpisodeStatus.FINISHED,
        score={"correct": correct},
        turn_rewards={META: [correct], REASONING: [correct]},
        plan_of=plan_of,
    )


def test_prompts_that_are_hopeless_or_solved_are_not_trained_on():
    # fractions right: a 0/2, b 1/2, c 2/2, d 1/2
    rights = {"a": (0, 0), "b": (0, 1), "c": (1, 1), "d": (1, 0)}
    episodes = [episode(prompt, i, right) for prompt, values in rights.items() for i, right in enumerate(values)]
    settings = RolloutConfig(success_low=0.2, success_high=0.8, prompts_per_step=8)
    assert [e.episode_id for e in chosen_for_training(episodes, settings)] == ["0/b/0", "0/b/1", "0/d/0", "0/d/1"]
    one = replace(settings, prompts_per_step=1)
    assert [e.episode_id for e in chosen_for_training(episodes, one)] == ["0/b/0", "0/b/1"], "no more prompts than a step asks for"
    assert chosen_for_training(episodes, RolloutConfig(prompts_per_step=8)) == episodes, "the default keeps them all"
    assert chosen_for_training([], settings) == []
    assert informative_frac(episodes) == 0.5 and informative_frac([]) == 0.0  # b and d of four: their rewards differ


def test_the_penalty_for_length_grows_over_the_last_tokens_of_the_budget():
    # 4 + 4 = 8 and 4 + 14 = 18 tokens of 20, buffer 8: 0 and (12 - 18) / 8 = -0.75, on top of 1.0
    short, long = episode("a", 0, 1.0), episode("a", 1, 1.0, num_tokens=14)
    penalise_overlong([short, long], buffer_tokens=8, max_tokens=20)
    assert short.turn_rewards == {META: [1.0], REASONING: [1.0]}
    assert long.turn_rewards == {META: [0.25], REASONING: [0.25]} and long.score["overlong_penalty"] == -0.75


def test_a_plan_earns_the_mean_of_its_answers_once():
    family = [episode("a", 0, 1.0), episode("a", 1, 0.0, plan_of="0/a/0"), episode("a", 2, 0.0, plan_of="0/a/0")]
    alone = episode("a", 3, 1.0)
    share_plan_rewards([*family, alone], scheme="base")
    assert family[0].turn_rewards == {META: [pytest.approx(1 / 3)], REASONING: [1.0]}
    assert [e.turn_rewards for e in family[1:]] == [{REASONING: [0.0]}] * 2
    assert alone.turn_rewards == {META: [1.0], REASONING: [1.0]}
    # advantages: the two plans are compared with each other, the four answers with one another
    assign_advantages([*family, alone], (META, REASONING), AlgorithmConfig(advantage="dr_grpo"), {})
    assert family[0].advantages[META] == [pytest.approx(-1 / 3)] and alone.advantages[META] == [pytest.approx(1 / 3)]  # mean 2/3
    assert [e.advantages[REASONING] for e in [*family, alone]] == [[0.5], [-0.5], [-0.5], [0.5]]
    assert META not in family[1].advantages


def test_where_the_planning_episode_was_excluded_another_one_carries_the_plan():
    left = [episode("a", 1, 1.0, plan_of="0/a/0"), episode("a", 2, 0.0, plan_of="0/a/0")]
    share_plan_rewards(left, scheme="base")
    assert [e.plan_of for e in left] == [None, "0/a/1"] and left[0].turn_rewards[META] == [0.5] and META not in left[1].turn_rewards


def test_consistency_pays_the_plan_for_agreement_whether_right_or_wrong():
    # answers 7, 7 (written otherwise), 5 and none: the most frequent has 2 of 4, although 5 is the right one
    boxes = ["7", " 7. ", "5", ""]
    family = [episode("a", i, float(box == "5"), box=box, plan_of="0/a/0" if i else None) for i, box in enumerate(boxes)]
    share_plan_rewards(family, scheme="consistency")
    assert family[0].turn_rewards[META] == [0.5] and [e.turn_rewards[REASONING] for e in family] == [[0.0], [0.0], [1.0], [0.0]]


def test_each_role_is_compared_with_its_own_past():
    algorithm = AlgorithmConfig(advantage="ema", ema_decay=0.5)
    first, second = [episode("a", 0, 1.0), episode("a", 1, 0.0)], [episode("b", 0, 1.0), episode("b", 1, 1.0)]
    after = assign_advantages(first, (META, REASONING), algorithm, {})
    # the first step has no past: its own mean 0.5 stands in; after it sum = 0.5 * 0.5, weight = 0.5
    assert [e.advantages[META] for e in first] == [[0.5], [-0.5]] and after == {META: [0.25, 0.5], REASONING: [0.25, 0.5]}
    restored = json.loads(json.dumps(after))  # as a checkpoint holds it
    after = assign_advantages(second, (META, REASONING), algorithm, restored)
    assert [e.advantages[REASONING] for e in second] == [[0.5], [0.5]]  # 1 - 0.25 / 0.5
    assert after[META] == [0.625, 0.75]  # 0.5 * 0.25 + 0.5 * 1, 0.5 * 0.5 + 0.5


# --- without the plan under test ---------------------------------------------------------------------------------------


def without(prompt: str, index: int, correct: float, of: str, plan_of: str | None = None) -> Episode:
    other = episode(prompt, index, correct, plan_of=plan_of)
    other.counterfactual_of = of
    return other


def test_a_plan_is_compared_with_the_prompts_answers_without_any():
    real = [episode("a", i, right) for i, right in enumerate([1.0, 0.0, 1.0])] + [episode("b", 0, 1.0), episode("b", 1, 1.0)]
    ablated = [without("a", 3, 1.0, "a"), without("a", 4, 0.0, "a"), without("b", 2, 0.0, "b"), without("b", 3, 0.0, "b")]
    assign_advantages(real, (META, REASONING), AlgorithmConfig(advantage="dr_grpo", credit="ablated"), {}, counterfactuals=ablated)
    # a: baseline (1 + 0) / 2 = 0.5; b: 0, and although all of b are right its plans earn: without them nothing was
    assert [e.advantages[META] for e in real] == [[0.5], [-0.5], [0.5], [1.0], [1.0]]
    # the reasoner as ever: a against its mean 2/3, b against 1; no counterfactual answer is among those compared
    assert [e.advantages[REASONING][0] for e in real] == pytest.approx([1 / 3, -2 / 3, 1 / 3, 0.0, 0.0])
    assert all(not other.advantages for other in ablated)


def test_a_plan_is_compared_with_the_answers_to_the_plans_in_its_place():
    real = [episode("a", i, right) for i, right in enumerate([1.0, 0.0, 1.0])]
    swapped = [
        without("a", 3, 1.0, "0/a/0", "0/a/1"), without("a", 4, 0.0, "0/a/0", "0/a/2"),
        without("a", 5, 1.0, "0/a/1", "0/a/2"), without("a", 6, 1.0, "0/a/1", "0/a/0"),
    ]  # fmt: skip
    credit_plans(real, swapped)
    # 1 - (1 + 0) / 2 and 0 - (1 + 1) / 2; of the third episode's no answer has a verdict: nothing to compare with
    assert [e.advantages[META] for e in real] == [[0.5], [-1.0], [0.0]]


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "ema", "reinforce_plus_plus"])
def test_the_estimator_is_the_reasoners_and_counterfactual_credit_the_meta_thinkers(advantage):
    def advantages(credit: str) -> tuple[list, list, dict]:
        real = [episode("a", 0, 1.0), episode("a", 1, 0.0), episode("b", 0, 1.0), episode("b", 1, 1.0)]
        ablated = [without("a", 2, 0.25, "a"), without("b", 2, 0.75, "b")]
        settings = AlgorithmConfig(advantage=advantage, credit=credit)
        after = assign_advantages(real, (META, REASONING), settings, {}, counterfactuals=ablated if credit == "ablated" else ())
        return [e.advantages[META] for e in real], [e.advantages[REASONING] for e in real], after

    planner, reasoner, after = advantages("ablated")
    assert planner == [[0.75], [-0.25], [0.25], [0.25]]
    assert reasoner == advantages("outcome")[1]
    assert set(after) == ({"reasoning"} if advantage == "ema" else set()), "the meta-thinker has no running mean"


def test_a_prompt_that_is_left_out_leaves_its_counterfactuals_out():
    real, others = [episode("a", 0, 1.0), episode("a", 1, 0.0)], [without("b", 2, 1.0, "b"), without("a", 2, 1.0, "a")]
    credit_plans(real, others)
    assert [e.advantages[META] for e in real] == [[0.0], [-1.0]]
    credit_plans([], others)
    assert all(not e.advantages for e in others)
