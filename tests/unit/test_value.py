"""The critic's loss against hand-computed numbers. Shapes: T label positions."""

import math

import pytest
import torch

from megatron_rema.algorithm.value import ValueLossStats, value_loss

NAN = float("nan")


def one_token(value: float, target: float, old: float, *, clip: float | None):
    """Loss, its gradient and the stats of one token of weight 1."""
    values_T = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    loss, stats = value_loss(
        values_T, torch.tensor([target]).double(), torch.tensor([old]).double(), torch.ones(1).double(), torch.ones(1).bool(), clip=clip
    )
    loss.backward()
    return loss.item(), values_T.grad.item(), stats.clipped_tokens.item()


@pytest.mark.parametrize(
    ("value", "target", "old", "clip", "loss", "grad", "clipped"),
    [
        (1.1, 2.0, 1.0, 0.2, 0.405, -0.9, 0),  # inside: .5 * .9^2, gradient V - R
        (1.5, 2.0, 1.0, 0.2, 0.32, 0.0, 1),  # gone too far towards R: held at 1.2, .5 * .8^2, no gradient
        (0.5, 0.0, 1.0, 0.2, 0.32, 0.0, 1),  # the same downwards: held at .8
        (0.5, 2.0, 1.0, 0.2, 1.125, -1.5, 0),  # gone away from R: .5 * 1.5^2 is the larger, pulled back
        (1.5, 1.15, 1.0, 0.2, 0.06125, 0.35, 0),  # overshot R: .5 * .35^2 against .5 * .05^2
        (1.5, 2.0, 1.0, None, 0.125, -0.5, 0),  # no clip: .5 * .5^2
        (1.5, 2.0, 1.0, 0.0, 0.125, -0.5, 0),  # 0 switches it off as well
    ],
)
def test_the_larger_of_the_plain_and_the_clipped_error_counts(value, target, old, clip, loss, grad, clipped):
    got_loss, got_grad, got_clipped = one_token(value, target, old, clip=clip)
    assert got_loss == pytest.approx(loss, abs=1e-6)
    assert got_grad == pytest.approx(grad, abs=1e-6)
    assert got_clipped == clipped


def test_the_loss_is_a_weighted_sum_and_the_stats_are_plain_sums():
    values_T = torch.tensor([1.0, NAN, 3.0, 0.0], requires_grad=True)
    returns_T = torch.tensor([2.0, NAN, 1.0, 0.5])
    mask_T = torch.tensor([True, False, True, True])
    weights_T = torch.tensor([0.5, NAN, 0.25, 2.0])
    loss, stats = value_loss(values_T, returns_T, torch.tensor([1.0, NAN, 1.0, 0.0]), weights_T, mask_T, clip=0.5)
    loss.backward()
    # .5 * (.5 * 1^2 + .25 * max(2^2, .5^2) + 2 * .5^2) = .5 * (.5 + 1 + .5) = 1
    assert loss.item() == 1.0
    assert values_T.grad.tolist() == [-0.5, 0.0, 0.5, -1.0]  # weight * (V - R); the untrained NaN meets no gradient
    assert {name: value.item() for name, value in stats.as_dict().items()} == {
        "loss": 1.0,
        "num_tokens": 3.0,
        "clipped_tokens": 0.0,
        "values_tokens": 4.0,  # 1 + 3 + 0
        "returns_tokens": 3.5,  # 2 + 1 + .5
        "squared_returns_tokens": 5.25,  # 4 + 1 + .25
        "squared_errors_tokens": 5.25,  # 1 + 4 + .25
    }
    metrics = ValueLossStats.means({name: value.item() for name, value in stats.as_dict().items()})
    # spread of R: 5.25 - 3.5^2 / 3 = 1.16667; 1 - 5.25 / 1.16667 = -3.5
    assert metrics["explained_variance"] == pytest.approx(-3.5)
    assert metrics["value_mean"] == pytest.approx(4 / 3)
    assert metrics["return_mean"] == pytest.approx(3.5 / 3)
    assert metrics["squared_error_mean"] == pytest.approx(1.75)


def sums_of(values: list[float], returns: list[float]) -> dict[str, float]:
    ones_T = torch.ones(len(values))
    values_T, returns_T = torch.tensor(values), torch.tensor(returns)
    _, stats = value_loss(values_T, returns_T, values_T, ones_T, ones_T.bool(), clip=None)
    return {name: value.item() for name, value in stats.as_dict().items()}


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], 1.0),  # perfect
        ([0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.0], 0.0),  # the mean as a constant: 1 - 1 / 1
        ([0.75, 0.25, 0.75, 0.25], [1.0, 0.0, 1.0, 0.0], 0.75),  # 1 - 4 * .0625 / 1
        ([1.5, 0.5, 1.5, 0.5], [1.0, 0.0, 1.0, 0.0], 0.0),  # right but for a bias of .5, which is error: 1 - 1 / 1
        ([0.2] * 89, [0.7] * 89, 0.0),  # nothing to explain, although 89 times .7 leaves a rounding to divide by
        ([1000.3125] * 2, [1000.0625, 1000.5625], 0.0),  # the mean again: squares near 1e6 would drown .125 in float32
    ],
)
def test_explained_variance(values, returns, expected):
    assert ValueLossStats.means(sums_of(values, returns))["explained_variance"] == pytest.approx(expected, abs=1e-9)


def test_sums_over_microbatches_give_the_metrics_of_the_whole():
    values, returns = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).tolist()
    whole = ValueLossStats.means(sums_of(values, returns))
    first, second = sums_of(values[:4], returns[:4]), sums_of(values[4:], returns[4:])
    # the losses are float32 sums; the variance comes from float64 ones
    assert ValueLossStats.means({name: first[name] + second[name] for name in first}) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_gradient_is_that_of_the_definition(clip):
    g = torch.Generator().manual_seed(3)
    values_T, returns_T, old_T, weights_T = torch.rand(4, 40, generator=g, dtype=torch.float64)
    mask_T = torch.rand(40, generator=g) < 0.7
    assert value_loss(values_T, returns_T, old_T, weights_T, mask_T, clip=clip)[1].clipped_tokens.item() > 0 or clip is None
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, returns_T, old_T, weights_T, mask_T, clip=clip)[0], values_T.clone().requires_grad_()
    )


def test_only_the_values_get_a_gradient():
    tensors = [torch.ones(2, requires_grad=True) for _ in range(4)]
    value_loss(*tensors, torch.ones(2).bool(), clip=0.1)[0].backward()
    assert [t.grad is None for t in tensors] == [False, True, True, True]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_nan_at_a_trained_token_shows_in_the_loss(place, clip):
    tensors = [torch.ones(2) for _ in range(4)]
    tensors[place][1] = NAN
    loss, stats = value_loss(*tensors, torch.ones(2).bool(), clip=clip)
    shows = clip is not None or place != 2  # without a clip the old values are not read
    assert math.isnan(loss.item()) == math.isnan(stats.loss.item()) == shows
    sums = {name: value.item() for name, value in stats.as_dict().items()}
    assert math.isnan(ValueLossStats.means(sums)["explained_variance"]) == (place == 1)  # of V alone: constant returns, nothing to explain


def test_no_trained_token_gives_loss_zero_gradient_zero_and_metrics_zero():
    values_T = torch.full((3,), NAN, requires_grad=True)
    nan_T = torch.full((3,), NAN)
    loss, stats = value_loss(values_T, nan_T, nan_T, nan_T, torch.zeros(3).bool(), clip=0.2)
    loss.backward()
    assert loss.item() == 0.0 and values_T.grad.tolist() == [0.0] * 3
    assert set(ValueLossStats.means({name: value.item() for name, value in stats.as_dict().items()}).values()) == {0.0}


@pytest.mark.parametrize("clip", [-0.1, NAN])
def test_a_negative_clip_is_refused_with_its_value(clip):
    with pytest.raises(ValueError, match=f"got {clip}"):
        one_token(0.0, 0.0, 0.0, clip=clip)
