"""Mitigations in rewards: every number by hand."""

import json
from math import exp, log

import pytest
import torch

from megatron_rema.config import AlgorithmConfig, RewardConfig
from megatron_rema.reward.assign import assign
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.reward.model_scorer import combine
from megatron_rema.reward.shaping import (
    debias_length,
    dropped_components,
    noted_references,
    preference_as_reward,
    references_of,
    shape_by_references,
)
from megatron_rema.trainer.credit import assign_advantages, component_weights, normalised_components
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn, Verdict

META, REASONING = Role.META_THINKING, Role.REASONING
LN3 = log(3.0)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4


def episode(name: str, *, prompt: str = "p", tokens: int = 2, **parts: float) -> Episode:
    """Both roles spoke once, the reasoner so many tokens, and both were paid ``parts``."""
    turns = [
        Turn(role, 0, (1,), Completion("", (1,) * n, (-1.0,) * n, StopReason.STOP, 0), "text")
        for role, n in ((META, 2), (REASONING, tokens))
    ]
    one = Episode(name, Prompt(prompt, "?", "5"), 0, turns, EpisodeStatus.FINISHED)
    for component, amount in parts.items():
        for role in (META, REASONING):
            one.add_reward(component, role, amount)
    return one


# --- ensembles ---------------------------------------------------------------------------------------------------------


def test_ensembles_between_the_mean_and_the_most_pessimistic_head():
    heads = [1.0, 3.0]  # mean 2, variance 1
    assert combine(heads, "uwo", 0.5) == 1.5
    assert combine(heads, "entropic", 1.0) == pytest.approx(-log((exp(-1.0) + exp(-3.0)) / 2))
    assert combine(heads, "entropic", 1e6) == pytest.approx(2.0, abs=1e-5), "a large beta: the mean"
    assert combine(heads, "entropic", 1e-3) == pytest.approx(1.0, abs=1e-3), "a small one: the minimum"
    assert combine(heads, "entropic", 50.0) == pytest.approx(2.0 - 1.0 / (2 * 50.0), abs=1e-4), "in between uwo with lambda 1 / (2 beta)"
    assert combine([1000.0, 1002.0], "entropic", 1e-3) == pytest.approx(1000.0, abs=1e-2), "no exponential overflows"
    assert {combine([4.0], name, 0.7) for name in ("mean", "min", "uwo", "entropic")} == {4.0}


# --- PAR ---------------------------------------------------------------------------------------------------------------


def test_preference_as_reward_is_the_mean_chance_to_beat_a_reference():
    assert preference_as_reward(1.0 + LN3, [1.0]) == pytest.approx(0.75)
    assert preference_as_reward(1.0, [1.0, 1.0 + LN3]) == pytest.approx((0.5 + 0.25) / 2)
    assert preference_as_reward(1e4, [0.0]) == 1.0 and preference_as_reward(-1e4, [0.0]) == 0.0


def test_references_stand_for_all_rewards():
    assert references_of([3.0, 1.0], 8) == [1.0, 3.0]
    # eight sorted, two parts of four: places 0.5 * 8 / 2 = 2 and 1.5 * 8 / 2 = 6
    assert references_of([7.0, 0.0, 2.0, 1.0, 3.0, 6.0, 5.0, 4.0], 2) == [2.0, 6.0]
    assert references_of([5.0] * 100, 1) == [5.0]


def test_the_first_step_gives_the_references_of_every_later_one():
    first = [episode("a", outcome=0.0), episode("b", outcome=LN3)]
    other = episode("c", outcome=99.0)
    other.counterfactual_of = "p"
    references = noted_references([*first, other], {}, count=8)
    metrics = shape_by_references([*first, other], references)
    assert references == {"meta_thinking": [0.0, LN3], "reasoning": [0.0, LN3]}, "counterfactual ones are no reference"
    # 0 against 0 and ln 3: (1/2 + 1/4) / 2; ln 3 against them: (3/4 + 1/2) / 2
    assert [sum(e.turn_rewards[REASONING]) for e in first] == pytest.approx([0.375, 0.625])
    assert first[1].reward_parts["par"][META] == [pytest.approx(0.625 - LN3)], "parts still sum to the reward"
    assert metrics == {f"reward/{role}/par_reference_mean": pytest.approx(LN3 / 2) for role in Role}
    later = episode("d", outcome=LN3)
    restored = json.loads(json.dumps(references))  # as a checkpoint holds it
    assert noted_references([later], restored, count=8) == references
    shape_by_references([later], restored)
    assert later.turn_rewards[REASONING] == [pytest.approx(0.625)]


def test_a_step_in_which_nobody_was_paid_gives_no_reference():
    assert noted_references([], {}, count=4) == {} == shape_by_references([], {})


# --- length ------------------------------------------------------------------------------------------------------------


def test_tokens_beyond_the_groups_mean_cost_and_those_below_pay():
    # 2 and 6 tokens: mean 4; another prompt's 10 are its own mean
    short, long, elsewhere = (
        episode("a", outcome=1.0),
        episode("b", tokens=6, outcome=1.0),
        episode("c", prompt="q", tokens=10, outcome=1.0),
    )
    debias_length([short, long, elsewhere], coefficient=0.05)
    assert [e.turn_rewards[REASONING] for e in (short, long, elsewhere)] == [[pytest.approx(1.1)], [pytest.approx(0.9)], [1.0]]
    assert [e.turn_rewards[META] for e in (short, long, elsewhere)] == [[1.0]] * 3, "a role answers for its own tokens: all plans have 2"
    assert long.reward_parts["length"][REASONING] == [pytest.approx(-0.1)]
    before = episode("d", tokens=9, outcome=1.0)
    debias_length([before], coefficient=0.0)
    assert set(before.reward_parts) == {"outcome"}


# --- component dropout -------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e", "f")


def test_dropout_takes_a_fraction_of_the_components_and_leaves_three():
    def drawn(fraction: float, names=NAMES, prompt_id="p", step=0) -> frozenset[str]:
        return dropped_components(names, prompt_id=prompt_id, step=step, fraction=fraction)

    assert len(drawn(0.5)) == 3 and len(drawn(0.4)) == 2 and len(drawn(0.9)) == 3 and not drawn(0.0)  # floor(2.4) = 2; 5 would leave 1
    assert not drawn(0.9, names=("a", "b", "c"))
    assert drawn(0.5) == drawn(0.5, names=NAMES[::-1]) and drawn(0.5) <= set(NAMES)
    assert len({drawn(0.5, prompt_id=str(i)) for i in range(20)}) > 5 and len({drawn(0.5, step=i) for i in range(20)}) > 5
    assert {name for i in range(40) for name in drawn(0.2, step=i)} == set(NAMES), "each has its turn"


def test_a_dropped_component_is_not_paid_to_any_episode_of_the_prompt():
    group = [episode(str(i)) for i in range(3)]
    judged = {one.episode_id: Judgement(Verdict.CORRECT, None, "verified") for one in group}
    assign(group, judged, function=lambda one: dict.fromkeys(NAMES, 1.0), component_dropout=0.5, step=4)
    dropped = dropped_components(NAMES, prompt_id="p", step=4, fraction=0.5)
    for one in group:
        assert one.turn_rewards == {META: [4.0], REASONING: [4.0]}  # outcome 1 and three of six
        assert set(one.reward_parts) == {"outcome"} | (set(NAMES) - dropped)
        assert all(one.score[name] == 1.0 for name in NAMES), "the raw score holds them all"


# --- per-component normalisation ---------------------------------------------------------------------------------------


def advantages(episodes: list[Episode], **weights: float) -> list[float]:
    groups = torch.zeros(len(episodes), dtype=torch.long)
    return normalised_components(episodes, REASONING, groups, weights).tolist()


def test_each_component_counts_by_its_own_spread():
    # outcome 0, 1: mean .5, std sqrt(.5); style 0, 100: mean 50, std sqrt(5000). Both normalise to -+ 1/sqrt(2)
    half = 0.5**0.5
    alike = [episode("a", outcome=0.0, style=0.0), episode("b", outcome=1.0, style=100.0)]
    assert advantages(alike) == pytest.approx([-2 * half, 2 * half], rel=1e-5)
    against = [episode("a", outcome=0.0, style=100.0), episode("b", outcome=1.0, style=0.0)]
    assert advantages(against) == pytest.approx([0.0, 0.0], abs=1e-5), "summed first, style would decide: -100 against 1"
    # parts are as weighted: style -0.5 * 200. Its sign is in the part, its weight is applied anew
    weighed = [episode("a", outcome=0.0, style=-100.0), episode("b", outcome=1.0, style=0.0)]
    assert advantages(weighed, style=-0.5) == pytest.approx([-1.5 * half, 1.5 * half], rel=1e-5)


def test_a_veto_cannot_be_divided_away():
    # 1, 1, vetoed 1: outcome counts as 1, 1, 0: mean 2/3, std sqrt(1/3): 1/3 / sqrt(1/3) = 1/sqrt(3) and -2/sqrt(3)
    group = [episode(name, outcome=1.0) for name in "abc"]
    group[2].add_reward("gate/x", REASONING, -1.0)
    assert advantages(group) == pytest.approx([3**-0.5, 3**-0.5, -2 * 3**-0.5], rel=1e-5)
    group = [episode(name, outcome=1.0) for name in "abc"]
    group[2].add_reward("bonus", REASONING, 1.0, ceiling=0.0)  # unfinished: held at 0
    assert advantages(group) == pytest.approx([3**-0.5, 3**-0.5, -2 * 3**-0.5], rel=1e-5)
    punished = [episode("a", outcome=1.0), episode("b", outcome=-1.0)]
    punished[1].add_reward("gate/x", REASONING, 0.0)
    assert advantages(punished) == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5), "a penalty stays"


def test_advantages_of_a_step_are_by_component_where_the_settings_want_it():
    settings = RewardConfig(weights={"style": 0.5}, model_weight=2.0)
    assert component_weights(settings) == {"style": 0.5, "model": 2.0}
    group = [episode("a", outcome=0.0, style=0.0), episode("b", outcome=1.0, style=50.0)]
    algorithm = AlgorithmConfig(advantage_components="normalised")
    assign_advantages(group, (META, REASONING), algorithm, {}, weights=component_weights(settings))
    assert [e.advantages[role][0] for e in group for role in Role] == pytest.approx([-1.5 * 0.5**0.5] * 2 + [1.5 * 0.5**0.5] * 2, rel=1e-5)
