"""GAE over own tokens against hand-computed numbers and a double loop. Shapes: T label positions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.algorithm.gae import gae

NAN = float("nan")
ALL_ONE = dict(discount=1.0, gae_lambda=1.0, turn_discount=1.0, turn_lambda=1.0)
INSIDE = dict(discount=0.9, gae_lambda=0.8)


def packed(*traces: list[tuple[int, float, float]], **numbers: float):
    """gae of traces given as rows (turn, reward, value); turn -1 is an observation token. Turn ids are made dense over the pack."""
    rows, first_turn = [], 0
    for trace, tokens in enumerate(traces):
        rows += [(first_turn + turn if turn >= 0 else -1, trace, reward, value) for turn, reward, value in tokens]
        first_turn += 1 + max((turn for turn, _, _ in tokens), default=-1)
    turn_ids_T, trace_ids_T = torch.tensor([row[:2] for row in rows], dtype=torch.long).reshape(-1, 2).unbind(1)
    rewards_T, values_T = torch.tensor([row[2:] for row in rows]).reshape(-1, 2).unbind(1)
    return gae(rewards_T, values_T, turn_ids_T, trace_ids_T, turn_ids_T >= 0, **numbers)


def by_definition(traces, *, discount: float, gae_lambda: float, turn_discount: float, turn_lambda: float) -> list[float]:
    """A_t = sum over later own tokens u of (product of the decays from t to u) * delta_u: two nested loops, no recursion."""
    advantages = []
    for tokens in traces:
        own = [token for token in tokens if token[0] >= 0]
        links = [(discount, gae_lambda) if a[0] == b[0] else (turn_discount, turn_lambda) for a, b in pairwise(own)]
        deltas = [reward - value for _, reward, value in own]
        for t, (link_discount, _) in enumerate(links):
            deltas[t] += link_discount * own[t + 1][2]
        of_own = []
        for t in range(len(own)):
            decay, total = 1.0, 0.0
            for u in range(t, len(own)):
                total += decay * deltas[u]
                decay *= links[u][0] * links[u][1] if u < len(links) else 0.0
            of_own.append(total)
        advantages += [of_own.pop(0) if token[0] >= 0 else 0.0 for token in tokens]
    return advantages


def test_one_turn_is_plain_gae():
    # delta2 = 1 - .4 = .6; delta1 = .9*.4 - .3 = .06; delta0 = .9*.3 - .2 = .07; decay .72
    # A2 = .6; A1 = .06 + .72*.6 = .492; A0 = .07 + .72*.492 = .42424; returns A + V
    # the numbers across turns are never used
    advantages_T, returns_T = packed([(0, 0, 0.2), (0, 0, 0.3), (0, 1, 0.4)], **INSIDE, turn_discount=0.0, turn_lambda=0.0)
    assert advantages_T.tolist() == pytest.approx([0.42424, 0.492, 0.6], abs=1e-6)
    assert returns_T.tolist() == pytest.approx([0.62424, 0.792, 1.0], abs=1e-6)
    assert advantages_T.dtype == returns_T.dtype == torch.float32


def test_the_step_to_the_next_turn_has_its_own_discount_and_lambda_and_observations_are_no_steps():
    # observation, turn 0 = two tokens, two observations, turn 1 = two tokens, observation
    # A4 = 1 - .4 = .6
    # A3 = .9*.4 - .3 + .72*.6 = .06 + .432 = .492
    # A1 = .5 + .5*.3 - .2 + (.5*.6)*.492 = .45 + .1476 = .5976     <- across: turn_discount .5, turn_lambda .6
    # A0 = .9*.2 - .1 + .72*.5976 = .08 + .430272 = .510272
    trace = [(-1, 9, 9), (0, 0, 0.1), (0, 0.5, 0.2), (-1, 9, 9), (-1, 9, 9), (1, 0, 0.3), (1, 1, 0.4), (-1, 9, 9)]
    advantages_T, returns_T = packed(trace, **INSIDE, turn_discount=0.5, turn_lambda=0.6)
    assert advantages_T.tolist() == pytest.approx([0, 0.510272, 0.5976, 0, 0, 0.492, 0.6, 0], abs=1e-6)
    assert returns_T.tolist() == pytest.approx([0, 0.610272, 0.7976, 0, 0, 0.792, 1.0, 0], abs=1e-6)


def test_one_token_turns_step_by_turn_numbers_alone():
    # A2 = 2 - .5 = 1.5; A1 = .5*.5 - 1 + .25*1.5 = -.375; A0 = 1 + .5*1 - .25 + .25*-.375 = 1.15625
    trace = [(0, 1, 0.25), (1, 0, 1.0), (2, 2, 0.5)]
    advantages_T, _ = packed(trace, discount=0.123, gae_lambda=0.456, turn_discount=0.5, turn_lambda=0.5)
    assert advantages_T.tolist() == [1.15625, -0.375, 1.5]  # powers of two: exact


def test_with_every_number_one_the_returns_are_the_rewards_to_come():
    # 1+0+4 = 5, 4, 4 | 2; values cancel, whatever they are
    _, returns_T = packed([(0, 1, 0.7), (0, 0, -3), (-1, 8, 8), (1, 4, 11)], [(0, 2, 5.5)], **ALL_ONE)
    assert returns_T.tolist() == pytest.approx([5, 4, 0, 4, 2], abs=1e-6)


def test_lambda_zero_is_the_one_step_error():
    # .9*.2 - .1 = .08; 1 + .5*.3 - .2 = .95; 2 - .3 = 1.7
    trace = [(0, 0, 0.1), (0, 1, 0.2), (1, 2, 0.3)]
    advantages_T, _ = packed(trace, discount=0.9, gae_lambda=0.0, turn_discount=0.5, turn_lambda=0.0)
    assert advantages_T.tolist() == pytest.approx([0.08, 0.95, 1.7], abs=1e-6)


def test_traces_without_own_tokens_and_empty_packs_are_zero():
    advantages_T, returns_T = packed([(-1, 1, 1)] * 2, [(0, 3, 1.0)], [(-1, 1, 1)], **ALL_ONE)
    assert advantages_T.tolist() == [0, 0, 2, 0]  # 3 - 1
    assert returns_T.tolist() == [0, 0, 3, 0]
    assert packed([(-1, NAN, NAN)] * 3, **ALL_ONE)[1].tolist() == [0, 0, 0]
    assert packed(**ALL_ONE)[0].tolist() == []


def test_a_nan_reaches_its_trace_up_to_where_it_stands_and_never_leaves_an_observation():
    trace = [(0, 1.0, 0.5), (0, 1.0, 0.5), (-1, NAN, NAN), (1, 1.0, 0.5)]
    spoilt = [(0, 1.0, 0.5), (0, NAN, 0.5), (-1, 1.0, 1.0), (1, 1.0, 0.5)]
    advantages_T, returns_T = packed(trace, spoilt, trace, **INSIDE, turn_discount=0.5, turn_lambda=0.0)
    assert advantages_T.isnan().tolist() == returns_T.isnan().tolist() == [False] * 4 + [True, True, False, False] + [False] * 4
    values_T = torch.tensor([0.0, 0.0, NAN])  # a NaN value spoils the step into it as well
    ids_T = torch.zeros(3, dtype=torch.long)
    advantages_T, _ = gae(torch.zeros(3), values_T, ids_T, torch.tensor([0, 1, 1]), torch.ones(3, dtype=torch.bool), **ALL_ONE)
    assert advantages_T.isnan().tolist() == [False, True, True]


NUMBERS = st.fixed_dictionaries({name: st.floats(0, 1) for name in ALL_ONE})
FLOATS = st.floats(-2, 2, width=32)


@st.composite
def dialogues(draw):
    """A pack of traces with any number of turns, own tokens and observations; some without an own token, some without any token."""
    traces = []
    for _ in range(draw(st.integers(0, 5))):
        tokens = []
        for turn in range(draw(st.integers(0, 4))):
            tokens += [-1] * draw(st.integers(0, 2)) + [turn] * draw(st.integers(1, 4))
        tokens += [-1] * draw(st.integers(0, 2))
        traces.append([(turn, draw(FLOATS), draw(FLOATS)) for turn in tokens])
    return traces


@given(dialogues(), NUMBERS)
@settings(max_examples=100, deadline=None)
def test_any_pack_equals_the_definition(traces, numbers):
    advantages_T, returns_T = packed(*traces, **numbers)
    expected = by_definition(traces, **numbers)
    # both in float64, ours rounded to float32 once: at most 16 tokens of |delta| <= 6, so half an ulp of 96
    assert advantages_T.tolist() == pytest.approx(expected, abs=4e-6)
    own = [(turn >= 0, value) for tokens in traces for turn, _, value in tokens]
    assert returns_T.tolist() == pytest.approx([a + v if is_own else 0.0 for a, (is_own, v) in zip(expected, own, strict=True)], abs=4e-6)


@given(dialogues(), NUMBERS, st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_packing_does_not_move_a_bit(traces, numbers, random):
    order = list(range(len(traces)))
    random.shuffle(order)
    sizes = [len(tokens) for tokens in traces]
    apart = packed(*traces, **numbers)[0].split(sizes) if traces else ()
    shuffled = packed(*(traces[i] for i in order), **numbers)[0].split([sizes[i] for i in order]) if traces else ()
    for i, advantages_L in zip(order, shuffled, strict=True):
        assert torch.equal(advantages_L, apart[i])
        assert torch.equal(packed(traces[i], **numbers)[0], apart[i])


def test_nothing_flows_back_to_the_critic_through_its_own_targets():
    values_T = torch.ones(2, requires_grad=True)
    ids_T = torch.zeros(2, dtype=torch.long)
    advantages_T, returns_T = gae(torch.ones(2), values_T, ids_T, ids_T, ids_T == 0, **ALL_ONE)
    assert not advantages_T.requires_grad and not returns_T.requires_grad


@pytest.mark.parametrize("name", list(ALL_ONE))
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_a_discount_or_lambda_outside_the_unit_interval_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be in .*, got {value}"):
        packed([(0, 1.0, 1.0)], **{**ALL_ONE, name: value})


def test_broken_packs_are_refused():
    ids_T, ones_T = torch.tensor([0, 1, 0]), torch.ones(3)
    with pytest.raises(AssertionError, match="next to each other"):
        gae(ones_T, ones_T, ids_T, ids_T, ones_T.bool(), **ALL_ONE)
    with pytest.raises(AssertionError, match="needs a turn id"):
        gae(ones_T, ones_T, ids_T - 1, ids_T * 0, ones_T.bool(), **ALL_ONE)
