"""Verdict and status -> turn rewards per role; behaviour counters on dialogues small enough to count by hand."""

import json
from dataclasses import replace

import pytest

from megatron_rema.reward.answers import boxes
from megatron_rema.reward.assign import assign, counterfactual_metrics, reward_metrics, set_apart
from megatron_rema.reward.behaviour import behaviour_metrics, copy_ratio, leak_round, leaks_first, repetition, states_answer
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.types import Action, Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn, Verdict

META, REASONING = Role.META_THINKING, Role.REASONING
FINISHED, MAX_ROUNDS, TRUNCATED = EpisodeStatus.FINISHED, EpisodeStatus.MAX_ROUNDS, EpisodeStatus.TRUNCATED


def episode(name: str, *texts: str, status=FINISHED, question="2 + 3?", gold="5", one_role=False) -> Episode:
    roles = (REASONING,) if one_role else (META, REASONING)
    turns = [
        Turn(roles[i % len(roles)], i // len(roles), (1,), Completion("", (1, 2), (-1.0, -1.0), StopReason.STOP, 0), text)
        for i, text in enumerate(texts)
    ]
    return Episode(name, Prompt("p", question, gold), 0, turns, status)


def judged(verdict: Verdict, lenient: Verdict | None = None, how: str = "verified") -> Judgement:
    return Judgement(verdict, lenient, how)


RIGHT, WRONG, UNKNOWN = judged(Verdict.CORRECT), judged(Verdict.WRONG), judged(Verdict.UNKNOWN, how="timeout")


def rewards_of(one: Episode, judgement: Judgement, **options) -> dict[Role, list[float]]:
    assert assign([one], {one.episode_id: judgement}, **options).scored == [one]
    return one.turn_rewards


def test_a_finished_correct_episode_pays_both_roles_on_their_last_turn():
    one = episode("a", "Add.", "5?", "Yes. [FINISH]", "\\boxed{5}")
    assert rewards_of(one, RIGHT) == {META: [0.0, 1.0], REASONING: [0.0, 1.0]}
    assert one.verdict is Verdict.CORRECT and one.score["correct"] == one.score["finished"] == one.score["answer_format"] == 1.0


@pytest.mark.parametrize("status", [MAX_ROUNDS, TRUNCATED, EpisodeStatus.CONTEXT_OVERFLOW])
def test_an_unfinished_episode_earns_nothing_unless_the_mask_is_off(status):
    assert rewards_of(episode("a", "Add.", "\\boxed{5}", status=status), RIGHT) == {META: [0.0], REASONING: [0.0]}
    unmasked = rewards_of(episode("a", "Add.", "\\boxed{5}", status=status), RIGHT, mask_unfinished_reward=False)
    assert unmasked == {META: [1.0], REASONING: [1.0]}


def test_a_wrong_answer_earns_nothing():
    assert rewards_of(episode("a", "Add.", "\\boxed{6}"), WRONG) == {META: [0.0], REASONING: [0.0]}


def test_only_roles_that_spoke_are_paid():
    assert rewards_of(episode("a", "\\boxed{5}", one_role=True), RIGHT) == {REASONING: [1.0]}
    assert rewards_of(episode("a", "cut", status=TRUNCATED), WRONG) == {META: [0.0]}
    assert rewards_of(episode("a", status=EpisodeStatus.CONTEXT_OVERFLOW), WRONG) == {}


@pytest.mark.parametrize(
    ("texts", "judgement", "meta", "reasoner"),
    [
        (("Add.", "\\boxed{5}"), RIGHT, 1.0, 1.0),
        (("Add.", "\\boxed{6}"), WRONG, 0.0, -0.5),
        (("Add.", "it is 5"), WRONG, 0.0, -1.0),
        (("Say \\boxed{5}.", "\\boxed{5}"), RIGHT, -1.0, 1.0),
    ],
)
def test_the_base_scheme_pays_by_correctness_and_format(texts, judgement, meta, reasoner):
    assert rewards_of(episode("a", *texts), judgement, scheme="base") == {META: [meta], REASONING: [reasoner]}


def test_masking_never_forgives_a_penalty():
    one = episode("a", "Add.", "it is", status=TRUNCATED)
    assert rewards_of(one, WRONG, scheme="base") == {META: [0.0], REASONING: [-1.0]}


def test_unknown_and_aborted_episodes_are_set_apart_and_counted():
    timeout, aborted, fine = episode("t", "p", "a"), episode("x", "p", status=EpisodeStatus.ABORTED), episode("f", "p", "\\boxed{5}")
    timeout.turn_rewards = {META: [1.0]}  # of an earlier assignment: must not stay
    judgements = {"t": UNKNOWN, "x": WRONG, "f": RIGHT}
    assigned = assign([timeout, aborted, fine], judgements)
    assert assigned.scored == [fine] and assigned.excluded == [timeout, aborted]
    assert timeout.turn_rewards == aborted.turn_rewards == {} and timeout.verdict is Verdict.UNKNOWN
    metrics = reward_metrics(assigned, judgements)
    assert metrics["reward/excluded_frac"] == pytest.approx(2 / 3) and metrics["reward/aborted_frac"] == pytest.approx(1 / 3)
    assert metrics["reward/verifier_timeout_frac"] == pytest.approx(1 / 3) and metrics["reward/verifier_crash_frac"] == 0.0
    assert metrics["reward/mean"] == metrics["reward/correct_frac"] == 1.0


def test_reward_metrics_average_over_traces_and_leave_out_what_is_not_there():
    two, one = episode("a", "p", "\\boxed{5}"), episode("b", "x", one_role=True)
    judgements = {"a": judged(Verdict.CORRECT, Verdict.CORRECT), "b": judged(Verdict.WRONG, Verdict.UNKNOWN)}
    metrics = reward_metrics(assign([two, one], judgements), judgements)
    assert metrics["reward/mean"] == pytest.approx(2 / 3)  # traces 1, 1 and 0
    assert metrics["reward/reasoning/mean"] == 0.5 and metrics["reward/meta_thinking/mean"] == 1.0
    assert metrics["reward/lenient_correct_frac"] == 1.0  # known for one episode
    assert reward_metrics(assign([], {}), {}) == {}


def without(name: str, *texts: str, of: str, plan_of: str | None = None) -> Episode:
    other = episode(name, *texts)
    other.counterfactual_of, other.plan_of = of, plan_of
    return other


def test_counterfactual_episodes_are_paid_and_stay_out_of_every_mean():
    real = [episode("a", "Add.", "\\boxed{5}"), episode("b", "Say \\boxed{5}.", "\\boxed{5}"), episode("c", "Add.", "\\boxed{6}")]
    others = [without("d", "", "\\boxed{6}", of="p"), without("e", "", "\\boxed{5}", of="p"), without("f", "", "?", of="p")]
    judgements = {"a": RIGHT, "b": RIGHT, "c": WRONG, "d": WRONG, "e": RIGHT, "f": UNKNOWN}
    assigned, counterfactual = set_apart(assign([*real, *others], judgements, scheme="base"))
    assert assigned.scored == real and counterfactual.scored == others[:2] and counterfactual.excluded == others[2:]
    assert [e.turn_rewards for e in others] == [{META: [0.0], REASONING: [-0.5]}, {META: [1.0], REASONING: [1.0]}, {}]
    alone = {name: judgements[name] for name in "abc"}
    assert reward_metrics(assigned, judgements) == reward_metrics(assign(real, alone, scheme="base"), alone)
    # the meta-thinker: with its plan 1, -1 (a box), 0, mean 0; without it 0, 1, mean 0.5
    assert counterfactual_metrics(assigned, counterfactual) == {
        "rollout/counterfactual_episodes": 3.0, "reward/counterfactual_excluded_frac": pytest.approx(1 / 3),
        "reward/counterfactual_mean": 0.5, "reward/counterfactual_correct_frac": 0.5, "reward/plan_effect": -0.5,
    }  # fmt: skip


def test_swapped_plans_have_a_mean_and_no_plan_effect():
    real, other = episode("a", "Add.", "\\boxed{5}"), without("b", "Count.", "\\boxed{6}", of="a", plan_of="c")
    metrics = counterfactual_metrics(*set_apart(assign([real, other], {"a": RIGHT, "b": WRONG})))
    assert metrics["reward/counterfactual_mean"] == 0.0 and "reward/plan_effect" not in metrics
    assert counterfactual_metrics(*set_apart(assign([real], {"a": RIGHT}))) == {}


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(ValueError, match=r"reward.scheme is 'vibes', which is not one of \['base', 'consistency', 'outcome'\]"):
        assign([], {}, scheme="vibes")


@pytest.mark.parametrize(
    ("text", "gold", "stated"),
    [
        ("the answer is 5.", "5", True),
        ("5", "5", True),
        ("it is 15", "5", False),
        ("it is 5.2", "5", False),
        ("it is 2.5", "5", False),
        ("x5", "5", False),
        ("get \\frac{1}{2}, so", "\\frac{1}{2}", True),
        ("write \\boxed{} at the end", "5", True),
    ],
)
def test_stating_the_answer_means_standing_on_its_own(text, gold, stated):
    assert states_answer(text, gold) is stated


def test_a_leak_is_first_only_if_neither_question_nor_reasoner_said_it_before():
    assert leak_round(episode("a", "Add.", "6", "It is 5.", "\\boxed{5}")) == 1
    assert leaks_first(episode("a", "Add.", "6", "It is 5.", "\\boxed{5}"))
    confirmed = episode("a", "Add.", "\\boxed{5}", "5 is right. [FINISH]", "\\boxed{5}")
    assert leak_round(confirmed) == 1 and not leaks_first(confirmed)
    assert not leaks_first(episode("a", "Use the 5.", "\\boxed{5}", question="5 + 0?"))
    assert leak_round(episode("a", "Add.", "\\boxed{5}")) is None


def test_copy_ratio_and_repetition_count_four_grams():
    assert copy_ratio("a b c d e", "x a b c d y") == 0.5  # (a b c d) of two
    assert copy_ratio("yes", "oh yes") == 1.0 and copy_ratio("yes", "no") == 0.0
    assert copy_ratio("", "a b") is None and copy_ratio("a b c d", "") == 0.0
    assert repetition("a b a b a b a b") == pytest.approx(3 / 5)  # 5 four-grams, 2 different
    assert repetition("a b c d e") == 0.0 and repetition("a b c") is None


def test_behaviour_metrics_by_hand():
    episodes = [
        episode("1", "Add two and three now.", "Add two and three now.", "[FINISH]", "\\boxed{5}"),
        episode("2", "The answer is 5.", "5 [FINISH]", status=MAX_ROUNDS),
        episode("3", "Add.", "\\boxed{5}", one_role=False),
        episode("4", "", status=TRUNCATED),
    ]
    episodes[0].verdict, episodes[1].verdict, episodes[2].verdict = Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT
    metrics = behaviour_metrics(episodes, "[FINISH]")
    expected = {
        "turns_per_episode": (4 + 2 + 2 + 1) / 4,
        "end/finished_frac": 0.5,
        "end/max_rounds_frac": 0.25,
        "end/truncated_frac": 0.25,
        "end/aborted_frac": 0.0,
        "finish_round_mean": 0.5,  # rounds 1 and 0
        "finish_round/0_frac": 0.5,
        "finish_round/1_frac": 0.5,
        "meta_thinking/leak_rate": 0.25,
        "meta_thinking/leak_first_rate": 0.25,
        "meta_thinking/leak_round_mean": 0.0,
        "meta_thinking/accuracy_given_leak": 0.0,
        "meta_thinking/accuracy_given_no_leak": 1.0,  # episode 4 has no verdict
        "reasoning/marker_rate": 1 / 3,  # of the three in which the reasoner spoke
        "meta_thinking/empty_rate": 2 / 5,  # the bare marker and the empty message
        "reasoning/empty_rate": 0.0,
        "meta_thinking/tokens_per_turn": 2.0,
        "reasoning/copy_ratio": (1 + 0 + 0 + 0) / 4,
        "meta_thinking/copy_ratio": 0.0,  # its one reply is the marker
        "meta_thinking/repetition": 0.0,
    }
    for name, value in expected.items():
        assert metrics[f"behaviour/{name}"] == pytest.approx(value), name


def test_the_share_of_every_action_is_counted_over_the_meta_thinkers_messages():
    episodes = [episode("1", "a", "b", "", "c"), episode("2", "", "c"), episode("3", '{"action": "REW', status=TRUNCATED)]
    actions = iter((Action.DECOMPOSE, Action.EMPTY, Action.EMPTY, None))
    for one in episodes:
        one.turns = [replace(turn, action=next(actions)) if turn.role is META else turn for turn in one.turns]
    metrics = behaviour_metrics(episodes, None, json_actions=True)
    assert {name: value for name, value in metrics.items() if "action" in name} == {
        "behaviour/action_decompose_frac": 1 / 4,
        "behaviour/action_rewrite_frac": 0.0,  # an action that nobody takes is a zero, not a hole
        "behaviour/action_empty_frac": 2 / 4,
        "behaviour/action_invalid_frac": 1 / 4,
    }
    assert not any("action" in name for name in behaviour_metrics(episodes, None))


def test_behaviour_of_nothing_and_of_one_role_leaves_rates_out():
    assert behaviour_metrics([], "[FINISH]") == {}
    metrics = behaviour_metrics([episode("a", "\\boxed{5}", one_role=True)], None)
    assert not any("meta_thinking" in name or "marker" in name or "copy" in name for name in metrics)
    assert metrics["behaviour/end/finished_frac"] == 1.0


def test_reward_parts_say_what_made_the_reward_and_sum_to_it():
    one = episode("a", "plan", "x", "more")
    one.add_reward("outcome", Role.META_THINKING, 1.0)
    one.add_reward("model", Role.META_THINKING, 0.5, ceiling=0.0)  # 1.5 is cut to 0: the mask takes 1.5
    one.add_reward("overlong", Role.META_THINKING, -0.25)
    assert one.turn_rewards == {Role.META_THINKING: [0.0, -0.25]}
    assert {name: part[Role.META_THINKING] for name, part in one.reward_parts.items()} == {
        "outcome": [0.0, 1.0], "model": [0.0, 0.5], "mask": [0.0, -1.5], "overlong": [0.0, -0.25],
    }  # fmt: skip
    assert Episode.from_json(json.loads(json.dumps(one.to_json()))) == one
    one.drop_reward(Role.META_THINKING)
    assert one.turn_rewards == {} and not any(one.reward_parts.values())


def test_boxes_are_all_answers_of_a_text():
    assert boxes(r"\boxed{1} \boxed{\frac{1}{2}} \boxed{x \} y}") == ["1", r"\frac{1}{2}", r"x \} y"]
    assert boxes(r"\boxed{a \boxed{b}} }}") == [r"a \boxed{b}"]
    assert boxes(r"\boxed{ \boxed{3} \boxed{4}") == ["3", "4"], "one that never closes hides nothing"
    assert len(boxes(r"\boxed{" * 50_000 + "}" * 50_000)) == 1


def brevity(one: Episode) -> dict:
    """A reward function as a user writes it."""
    return {"brevity": -0.1 * len(one.turns), "style": {META: 0.5}}


def test_a_reward_function_adds_components_with_their_weights():
    one = episode("a", "Add.", "\\boxed{5}")
    rewards_of(one, RIGHT, function=brevity, weights={"outcome": 0.5, "style": 2.0})
    # both roles: 0.5 * 1 - 0.1 * 2; the planner also 2 * 0.5
    assert one.turn_rewards == {META: [pytest.approx(1.3)], REASONING: [pytest.approx(0.3)]}
    assert one.score["brevity"] == pytest.approx(-0.2) and one.score["style"] == 0.5, "raw"
    assert one.reward_parts["style"] == {META: [1.0]}, "as weighted"
    metrics = reward_metrics(assign([one], {"a": RIGHT}, function=brevity), {"a": RIGHT})
    assert metrics["reward/reasoning/part/brevity_mean"] == pytest.approx(-0.2) and "reward/reasoning/part/style_mean" not in metrics


def test_components_do_not_lift_an_unfinished_dialogue():
    one = episode("a", "Add.", "\\boxed{5}", status=MAX_ROUNDS)
    rewards_of(one, WRONG, function=lambda e: {"bonus": 1.0})
    assert one.turn_rewards == {META: [0.0], REASONING: [0.0]} and one.reward_parts["mask"] == {META: [-1.0], REASONING: [-1.0]}


def test_a_reward_function_is_found_by_its_name():
    assert named_function("reward.function", "tests.unit.test_rewards:brevity").__name__ == "brevity"
    for name, what in (("nowhere:at_all", "No module"), ("json:none", "no attribute"), ("json", "attribute"), ("math:pi", "float")):
        with pytest.raises(ValueError, match=rf"reward.function is '{name}'.*{what}"):
            named_function("reward.function", name)
