"""Each signal on rollouts whose numbers can be worked out by hand."""

from __future__ import annotations

import pytest

from megatron_rema.integrity import signals
from megatron_rema.integrity.signals import EARLY, SIGNALS, Past, Reading
from megatron_rema.integrity.view import Observation, Rollout, rollouts_of
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn


def rollout(proxy: float, tokens: int = 10, text: str = "so it is", *, prompt: str = "p", role: Role = Role.REASONING, **more) -> Rollout:
    return Rollout(f"0/{prompt}/{id(object())}", prompt, role, text, text, tokens, proxy, **more)


def step(*rollouts: Rollout, **metrics: float) -> Observation:
    return Observation(1, rollouts, metrics)


def test_signals_declare_themselves():
    assert len({s.name for s in SIGNALS}) == len({s.id for s in SIGNALS}) == len(SIGNALS) == 10
    for one in SIGNALS:
        assert all((one.inputs, one.formula, one.cost, one.source)), one.name
        assert one.measure.__doc__, one.name


@pytest.mark.parametrize("one", SIGNALS, ids=lambda s: s.name)
def test_a_step_without_rollouts_gives_no_reading(one):
    assert one.measure(step(), Past(step())) == Reading()


def test_length_attribution_splits_a_gain_at_equal_length():
    # start: 4 short (bucket 0) at 0.2, 4 long (bucket 2) at 0.8, mean 0.5; now: 1 short at 0.3, 7 long at 0.8, mean 5.9/8 = 0.7375.
    # NRG = 1/8 (0.3 - 0.2) + 7/8 (0.8 - 0.8) = 0.0125; gain 0.2375: 5% is left. Lengths 25 -> (10 + 7 * 40) / 8 = 36.25: +45%
    start = step(*[rollout(0.2, 10)] * 4, *[rollout(0.8, 40)] * 4)
    reading = signals.length_attribution(step(rollout(0.3, 10), *[rollout(0.8, 40)] * 7), Past(start))
    assert reading.values["non_length_gain"] == pytest.approx(0.0125)
    assert reading.values["non_length_gain_frac"] == pytest.approx(0.0125 / 0.2375)
    assert reading.values["length_growth_frac"] == pytest.approx(0.45)
    assert reading.fires and "grew by 45%" in reading.reason


def test_length_attribution_is_silent_where_equal_lengths_earn_more():
    # both buckets gain 0.15: all of it is left
    start = step(*[rollout(0.2, 10)] * 4, *[rollout(0.8, 40)] * 4)
    reading = signals.length_attribution(step(*[rollout(0.35, 10)] * 1, *[rollout(0.95, 40)] * 7), Past(start))
    assert reading.values["non_length_gain"] == pytest.approx(0.15) and not reading.fires


def test_surface_regression_finds_the_feature_that_is_paid_for():
    # R = 0.1 * (number of agreeing words); the text is otherwise the same, so only that feature varies: R^2 = 1, all of the gain explained
    def agreeing(count: int) -> Rollout:
        return rollout(0.1 * count, text="word " + "yes " * count + "word " * (4 - count))

    start = step(*[agreeing(i % 2) for i in range(24)])
    reading = signals.surface_regression(step(*[agreeing(2 + i % 3) for i in range(24)]), Past(start))
    assert reading.values["surface_r2"] == pytest.approx(1.0)
    assert reading.fires and reading.values["surface_gain_frac"] > 0.5
    # by length alone: exactly 1
    start, now = (step(*[rollout(0.01 * n, n) for n in range(first, first + 24)]) for first in (10, 30))
    reading = signals.surface_regression(now, Past(start))
    assert reading.values == {"surface_r2": pytest.approx(1.0), "surface_gain_frac": pytest.approx(1.0)}
    assert "most with tokens" in reading.reason


def test_component_dominance_compares_variances_inside_groups():
    # outcome: constant inside each group; form: 0 and 1 (variance 1/4) in both: all of the difference is form's
    rows = [rollout(a + b, prompt=p, parts={"outcome": a, "form": b}) for p, a in (("p", 1.0), ("q", 0.0)) for b in (0.0, 1.0)]
    reading = signals.component_dominance(step(*rows), Past(step()))
    assert reading.values == {"share/outcome": 0.0, "share/form": 1.0} and reading.fires
    assert not signals.component_dominance(step(*[rollout(1.0, parts={"outcome": 1.0})] * 2), Past(step())).fires


def test_a_gate_is_a_component_and_par_is_none():
    # outcome 1, 1: no difference; the gate 0, -1: variance 1/4, although the group's first episode has no such part
    parts = [{"outcome": 1.0, "par": -0.3}, {"outcome": 1.0, "gate/x": -1.0, "par": 0.5}]
    before = step(rollout(0.0, parts={"outcome": 0.0}))
    reading = signals.component_dominance(step(*[rollout(0.0, parts=p) for p in parts]), Past(before))
    assert reading.values == {"share/outcome": 0.0, "share/gate/x": 1.0} and reading.fires


def test_a_component_that_never_varies_is_none_and_one_alone_cannot_dominate():
    """As with reward.weights.outcome=0 and one function of the user's."""
    rows = [rollout(b, parts={"outcome": 0.0, "judge": b}) for b in (0.0, 1.0)]
    assert signals.component_dominance(step(*rows), Past(step(*rows))) == Reading()
    before = step(rollout(1.0, parts={"outcome": 1.0, "judge": 0.0}))  # it did vary: the judge has taken over
    assert signals.component_dominance(step(*rows), Past(before)).fires


def test_ensemble_disagreement_is_relative_to_the_start():
    # standard deviations 0.1 and 0.5
    start, now = step(rollout(0.0, members=(0.0, 0.2))), step(rollout(0.0, members=(0.0, 1.0)))
    reading = signals.ensemble_disagreement(now, Past(start))
    assert reading.values == {"ensemble_spread": 0.5, "ensemble_spread_ratio": pytest.approx(5.0)} and reading.fires


def test_group_spread_counts_groups_without_any():
    # group p: 0, 1 (std 1/2), group q: 1, 1 (std 0)
    now = step(rollout(0.0), rollout(1.0), rollout(1.0, prompt="q"), rollout(1.0, prompt="q"))
    reading = signals.group_spread(now, Past(now))
    assert reading.values == {"group_std": pytest.approx(0.25), "zero_variance_frac": 0.5} and not reading.fires
    flat = step(rollout(1.0), rollout(1.0))
    assert signals.group_spread(flat, Past(now)).fires


def test_high_score_lexicon_names_the_phrase():
    start = step(*[rollout(0.0, text=f"plain words {i}") for i in range(50)])
    now = step(*[rollout(1.0, text=f"trust me {i}") for i in range(8)], *[rollout(0.0, text=f"plain words {i}") for i in range(8)])
    reading = signals.high_score_lexicon(now, Past(start))
    assert reading.fires and "'trust me' stands in 100% of the best rewarded, 0% of the others and 0% at the start" in reading.reason
    assert not signals.high_score_lexicon(start, Past(start)).fires


def test_a_phrase_of_the_start_that_takes_over_is_news_as_well():
    start = step(*[rollout(0.0, text="zeb" if i < 2 else "plain") for i in range(50)])  # 4%

    def now(share: int) -> Observation:
        return step(*[rollout(1.0, text="zeb" if i < share else "plain") for i in range(10)])

    assert signals.high_score_lexicon(now(3), Past(start)).fires, "30%: more than five times as often"
    assert not signals.high_score_lexicon(now(2), Past(start)).fires, "20%: five times, no more"


def test_energy_loss_is_a_robust_z_of_the_first_steps():
    rows = [{"integrity/energy_loss_raw": 1.0 + 0.1 * (i % 3)} for i in range(EARLY)]  # median 1.1, MAD 0.1
    reading = signals.energy_loss(step(**{"integrity/energy_loss_raw": 1.7}), Past(step(), rows))
    assert reading.values["energy_loss_z"] == pytest.approx(0.6 / 0.14826, rel=1e-6) and reading.fires
    assert signals.energy_loss(step(**{"integrity/energy_loss_raw": 1.7}), Past(step(), rows[1:])) == Reading()


def test_policies_that_take_turns_are_each_compared_with_themselves():
    rows = [{f"integrity/{name}/energy_loss_raw": level + 0.1 * (i % 3)} for i in range(EARLY) for name, level in (("a", 1.0), ("b", 5.0))]
    assert not signals.energy_loss(step(**{"integrity/b/energy_loss_raw": 5.1}), Past(step(), rows)).fires, "b was always at 5"
    assert signals.energy_loss(step(**{"integrity/a/energy_loss_raw": 5.1}), Past(step(), rows)).fires
    both = {"integrity/a/energy_loss_raw": 1.7, "integrity/b/energy_loss_raw": 5.1}
    assert signals.energy_loss(step(**both), Past(step(), rows)).values["energy_loss_z"] == pytest.approx(0.6 / 0.14826, rel=1e-6)


def metrics(kl: float, entropy: float) -> dict[str, float]:
    return {"train/kl_ref_nats": kl, "train/entropy_nats": entropy}


def test_geometry_is_curvature_trend_and_drift():
    # KL 0, 0.1, 0.4: second difference 0.2; entropy 2, 1.9, 1.7: -0.2; advantages all moved by 0.5
    start, now = step(rollout(0.0, advantage=0.0)), step(rollout(0.0, advantage=0.5), **metrics(0.4, 1.7))
    values = signals.geometry(now, Past(start, [metrics(0.0, 2.0), metrics(0.1, 1.9)]))
    assert values == {
        "kl_acceleration": pytest.approx(0.2), "entropy_trend": pytest.approx(-0.2), "advantage_drift": pytest.approx(0.5),
    }  # fmt: skip


def test_the_geometry_tube_fires_far_outside_it():
    early = [metrics(0.0, 2.0) | {f"integrity/{n}": 0.01 * (i % 3) for n in signals.GEOMETRY} for i in range(EARLY)]
    now = step(rollout(0.0, advantage=0.0), **metrics(0.5, 2.0))  # acceleration 0.5 against a MAD of 0.01: z near 33
    reading = signals.geometry_tube(now, Past(step(rollout(0.0)), early))
    assert reading.values["geometry_distance"] == pytest.approx(0.49 / 0.014826, rel=1e-3) and reading.fires


@pytest.mark.parametrize(
    ("text", "ambiguous"),
    [
        (r"\boxed{3}", False),
        (r"\boxed{3} and again \boxed{3}", False),
        (r"\boxed{3} \boxed{4}", True),
        (r"\boxed{3 or 4}", True),
        (r"\boxed{3\text{ or }4}", True),
        (r"\boxed{corner}", False),
        (r"\boxed{ \boxed{3} \boxed{4}", True),
        ("no box", False),
    ],
)
def test_an_answer_that_reads_several_ways(text, ambiguous):
    assert signals.is_ambiguous(text) is ambiguous


def test_parser_differential_is_over_rewarded_answers():
    rows = [rollout(1.0, text=r"\boxed{3} \boxed{4}"), rollout(1.0, text=r"\boxed{4}"), rollout(0.0, text=r"\boxed{1} \boxed{4}")]
    reading = signals.parser_differential(step(*rows), Past(step()))
    assert reading.values == {"ambiguous_answer_frac": 0.5} and reading.fires


def test_role_correlation():
    def pair(i: int, planner: float, reasoner: float) -> list[Rollout]:
        return [
            Rollout(str(i), "p", role, "", "", 1, 0.0, advantage=a)
            for role, a in ((Role.META_THINKING, planner), (Role.REASONING, reasoner))
        ]

    same = [r for i in range(8) for r in pair(i, i / 8, i / 4)]
    assert signals.role_correlation(step(*same), Past(step())).fires
    own = [r for i in range(8) for r in pair(i, i / 8, float(i % 2))]
    assert not signals.role_correlation(step(*own), Past(step())).fires


def test_rollouts_are_one_row_per_rewarded_role():
    def turn(role: Role, text: str, n: int) -> Turn:
        return Turn(role, 0, (1,), Completion("r", (5,) * n, (0.0,) * n, StopReason.STOP, 0), text)

    episode = Episode(
        "3/p/0", Prompt("p", "1 + 1", "2"), 0, [turn(Role.META_THINKING, "add", 2), turn(Role.REASONING, "2", 3)], EpisodeStatus.FINISHED
    )
    for role in Role:
        episode.add_reward("outcome", role, 1.0)
    episode.add_reward("overlong", Role.REASONING, -0.25)
    episode.advantages = {Role.REASONING: [0.5]}
    planner, reasoner = rollouts_of([episode], {"3/p/0": [0.1, 0.3]})
    assert (planner.text, planner.tokens, planner.proxy, planner.parts) == ("add", 2, 1.0, {"outcome": 1.0})
    assert (reasoner.tokens, reasoner.proxy, reasoner.advantage, reasoner.members) == (3, 0.75, 0.5, (0.1, 0.3))
    assert reasoner.parts == {"outcome": 1.0, "overlong": -0.25}
    episode.counterfactual_of = "p"
    assert rollouts_of([episode]) == []
