"""Importance ratios against hand-computed numbers. Shapes: T label positions."""

import math

import pytest
import torch

from megatron_rema.algorithm.ratio import importance_ratio

NAN = float("nan")
# trace 0: turn 0 (2 tokens), turn 1 (1 token); trace 1: turn 2 (2 tokens); the rest is context
TURN_IDS_T = torch.tensor([-1, 0, 0, -1, 1, -1, 2, 2])
TRACE_IDS_T = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
LOSS_MASK_T = TURN_IDS_T >= 0
DELTA_T = torch.tensor([9.0, 0.2, 0.4, 9.0, -0.9, 9.0, 1.0, -1.0])


def ratio(delta_T, level, mean="geometric", **kwargs):
    old_T = torch.full_like(delta_T, -2.0)
    return importance_ratio(old_T + delta_T, old_T, TURN_IDS_T, TRACE_IDS_T, LOSS_MASK_T, num_turns=3, level=level, mean=mean, **kwargs)


@pytest.mark.parametrize(
    ("level", "mean", "expected"),
    [
        ("token", "geometric", [0.2, 0.4, -0.9, 1.0, -1.0]),
        ("token", "arithmetic", [0.2, 0.4, -0.9, 1.0, -1.0]),
        ("turn", "geometric", [0.3, 0.3, -0.9, 0.0, 0.0]),  # (.2 + .4) / 2, -.9, (1 - 1) / 2
        ("trace", "geometric", [-0.1, -0.1, -0.1, 0.0, 0.0]),  # (.2 + .4 - .9) / 3, (1 - 1) / 2
    ],
)
def test_each_level_shares_the_mean_log_ratio_of_its_unit(level, mean, expected):
    ratio_T = ratio(DELTA_T, level, mean)
    assert ratio_T[LOSS_MASK_T].log().tolist() == pytest.approx(expected, abs=1e-6)
    assert ratio_T[~LOSS_MASK_T].tolist() == [1.0, 1.0, 1.0]


def test_arithmetic_means_average_the_ratios_themselves():
    e = math.exp
    turn0, turn2 = (e(0.2) + e(0.4)) / 2, (e(1) + e(-1)) / 2
    assert ratio(DELTA_T, "turn", "arithmetic")[LOSS_MASK_T].tolist() == pytest.approx([turn0, turn0, e(-0.9), turn2, turn2], abs=1e-6)
    trace0 = (e(0.2) + e(0.4) + e(-0.9)) / 3
    assert ratio(DELTA_T, "trace", "arithmetic")[LOSS_MASK_T].tolist() == pytest.approx([trace0] * 3 + [turn2] * 2, abs=1e-6)


@pytest.mark.parametrize("level", ["token", "turn", "trace"])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_the_log_ratio_is_capped_above_and_never_below(level, mean):
    high_T = ratio(torch.full((8,), 80.0), level, mean)[LOSS_MASK_T]
    assert high_T.tolist() == pytest.approx([math.exp(3.0)] * 5, rel=1e-6)
    low_T = ratio(torch.full((8,), -80.0), level, mean)[LOSS_MASK_T]
    # log-probabilities near -82 have a float32 spacing of 8e-6, exp turns that into a relative error
    assert low_T.tolist() == pytest.approx([math.exp(-80.0)] * 5, rel=1e-5)


def test_a_geometric_ratio_caps_the_mean_and_an_arithmetic_one_each_token():
    delta_T = torch.tensor([0, 5.0, -1.0, 0, 0, 0, 0, 0])  # turn 0: mean 2, below the cap of 3, though one token is above
    assert ratio(delta_T, "turn", "geometric")[1].item() == pytest.approx(math.exp(2), rel=1e-6)
    assert ratio(delta_T, "turn", "arithmetic")[1].item() == pytest.approx((math.exp(3) + math.exp(-1)) / 2, rel=1e-6)


def test_the_gradient_is_zero_beyond_the_cap():
    logprobs_T = torch.full((8,), -1.0, requires_grad=True)
    importance_ratio(logprobs_T, logprobs_T.detach() - 80, TURN_IDS_T, TRACE_IDS_T, LOSS_MASK_T, num_turns=3, level="turn").sum().backward()
    assert logprobs_T.grad.tolist() == [0.0] * 8


@pytest.mark.parametrize("level", ["token", "turn", "trace"])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_gradients_match_finite_differences(level, mean):
    delta_T = DELTA_T.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: ratio(d, level, mean), delta_T)


@pytest.mark.parametrize("level", ["token", "turn", "trace"])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_a_nan_shows_in_its_unit_and_an_untrained_nan_nowhere(level, mean):
    delta_T = DELTA_T.clone()
    delta_T[0] = NAN  # context
    assert not ratio(delta_T, level, mean).isnan().any()
    delta_T[6] = NAN  # a token of turn 2, trace 1
    unit_T = {"token": torch.arange(8) == 6, "turn": TURN_IDS_T == 2, "trace": (TRACE_IDS_T == 1) & LOSS_MASK_T}[level]
    assert torch.equal(ratio(delta_T, level, mean).isnan(), unit_T)


def test_unknown_levels_and_means_are_refused_by_name():
    with pytest.raises(ValueError, match="'episode'"):
        ratio(DELTA_T, "episode")
    with pytest.raises(ValueError, match="'harmonic'"):
        ratio(DELTA_T, "turn", "harmonic")
