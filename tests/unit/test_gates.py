"""Vetoes on dialogues small enough to judge by eye; every reward by hand."""

import json

import pytest

from megatron_rema.reward.gates import apply_gates, gate_of, gates_of
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn

META, REASONING = Role.META_THINKING, Role.REASONING


def episode(name: str, *texts: str, reward: float = 1.0, counterfactual_of: str | None = None) -> Episode:
    turns = [
        Turn((META, REASONING)[i % 2], i // 2, (1,), Completion("", (1, 2), (-1.0, -1.0), StopReason.STOP, 0), text)
        for i, text in enumerate(texts)
    ]
    one = Episode(name, Prompt("p", "2 + 3?", "5"), 0, turns, EpisodeStatus.FINISHED, counterfactual_of=counterfactual_of)
    for role in dict.fromkeys(turn.role for turn in turns):
        one.add_reward("outcome", role, reward)
    return one


def says_plan(one: Episode) -> bool:
    """A predicate as a user writes it."""
    return any("plan" in turn.text for turn in one.turns)


@pytest.mark.parametrize(
    ("gate", "texts", "closes"),
    [
        ("ambiguous_answer", ("Add.", r"\boxed{5} \boxed{6}"), True),
        ("ambiguous_answer", (r"\boxed{5} \boxed{6}", r"\boxed{5}"), False),  # the reasoner's last message alone is read
        ("ambiguous_answer", ("Add.",), False),
        ("plan_leak", ("It is 5.", r"\boxed{5}"), True),
        ("plan_leak", ("Add.", r"\boxed{5}", "So it is 5."), False),
        ("phrase:trust me", ("Add.", "Trust\nMe, 5"), True),
        ("phrase:trust me", ("Add.", "distrust me"), False),
        ("phrase:or", ("For all", "more"), False),
        ("phrase:!!", ("Add.", "5!!!"), True),  # no word at its edges: wherever it stands
        ("phrase:a.c", ("abc", ""), False),
        ("tests.unit.test_gates:says_plan", ("my plan", "5"), True),
    ],
)
def test_what_closes_a_gate(gate, texts, closes):
    assert bool(gate_of(gate).predicate(episode("a", *texts))) is closes


def test_a_closed_gate_takes_what_was_earned_and_says_so():
    leaked, honest, punished = episode("a", "It is 5.", "5"), episode("b", "Add.", "5"), episode("c", "It is 5.", "5", reward=-0.5)
    metrics = apply_gates([leaked, honest, punished], gates_of(["plan_leak", "phrase:it is"]))
    # plan_leak closes for the planner alone; the phrase for both, and finds nothing left of the planner's
    assert leaked.turn_rewards == {META: [0.0], REASONING: [0.0]}
    assert leaked.reward_parts["gate/plan_leak"] == {META: [-1.0]}
    assert leaked.reward_parts["gate/phrase:it_is"] == {META: [0.0], REASONING: [-1.0]}
    assert punished.turn_rewards == {META: [-0.5], REASONING: [-0.5]}, "a penalty stays"
    assert honest.turn_rewards == {META: [1.0], REASONING: [1.0]} and set(honest.reward_parts) == {"outcome"}
    assert metrics == {"reward/gate/plan_leak_frac": pytest.approx(2 / 3), "reward/gate/phrase:it_is_frac": pytest.approx(2 / 3)}
    for one in (leaked, honest, punished):
        for role, rewards in one.turn_rewards.items():
            assert rewards == [sum(part[role][-1] for part in one.reward_parts.values() if role in part)], "parts sum to the reward"
        assert Episode.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_fraction_is_over_real_episodes_in_which_somebody_concerned_is_paid():
    other, unpaid = episode("b", "", "5 5", counterfactual_of="p"), episode("c", "Add.")
    unpaid.turn_rewards = {}
    assert apply_gates([episode("a", "Add.", "5 5"), other, unpaid], gates_of(["phrase:5 5"])) == {"reward/gate/phrase:5_5_frac": 1.0}
    assert other.turn_rewards == {META: [0.0], REASONING: [0.0]}, "what a plan is compared with obeys the same rules"
    assert apply_gates([], gates_of(["plan_leak"])) == {} and apply_gates([other], []) == {}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["leak"], "holds 'leak'; a gate is ambiguous_answer, plan_leak, phrase:TEXT or module:name"),
        (["phrase: "], "needs a text to look for"),
        (["nowhere:at_all"], "reward.gates is 'nowhere:at_all'.*No module"),
        (["phrase:a b", "phrase:a/b"], "'phrase:a_b' twice"),
    ],
)
def test_what_is_no_gate(texts, message):
    with pytest.raises(ValueError, match=message):
        gates_of(texts)
