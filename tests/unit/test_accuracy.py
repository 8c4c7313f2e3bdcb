"""avg@k, pass@k and intervals against hand-computed numbers."""

from itertools import combinations
from math import isnan

import pytest

from megatron_rema.report import accuracy
from megatron_rema.report.accuracy import Problem, interval, pass_at_k, sizes, summary


def test_pass_at_k_is_one_minus_the_chance_of_k_wrong_samples():
    assert pass_at_k(4, 1, 2) == 0.5  # 1 - C(3, 2) / C(4, 2) = 1 - 3 / 6
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)  # 1 - C(3, 3) / C(5, 3) = 1 - 1 / 10
    assert pass_at_k(8, 2, 1) == 0.25  # pass@1 is the fraction right
    assert pass_at_k(4, 3, 2) == 1.0  # only one wrong sample: two cannot both be wrong
    assert pass_at_k(4, 0, 4) == 0.0


def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k_samples():
    for num_samples in range(1, 8):
        for num_right in range(num_samples + 1):
            samples = [True] * num_right + [False] * (num_samples - num_right)
            for k in range(1, num_samples + 1):
                draws = [any(draw) for draw in combinations(samples, k)]
                assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


@pytest.mark.parametrize(("num_samples", "num_right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_pass_at_k_of_too_few_samples_is_refused(num_samples, num_right, k):
    with pytest.raises(ValueError, match=f"num_right {num_right}, num_samples {num_samples} and k {k}"):
        pass_at_k(num_samples, num_right, k)


def test_k_doubles_up_to_the_number_of_samples():
    assert [sizes(most) for most in (0, 1, 2, 3, 8, 10)] == [[], [1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def test_the_summary_is_over_problems_and_not_over_samples():
    problems = [
        Problem([1.0, 0.0, 0.0, 0.0], False),  # mean 1/4, pass@2 1 - 3/6 = 1/2
        Problem([1.0, 1.0, 0.0], True),  # mean 2/3, pass@2 1 - 0/3 = 1: its fourth sample has no verdict
        Problem([0.0], None),  # mean 0: too few for pass@2
        Problem([], None),  # no verdict at all: left out
    ]
    found = summary(problems)
    assert (found.num_problems, found.num_samples, found.fewest, found.most) == (3, 8, 1, 4)
    assert found.mean == pytest.approx((1 / 4 + 2 / 3 + 0) / 3)  # 11/36, where 3 of 8 samples are right
    assert found.pass_at == pytest.approx({1: 11 / 36, 2: 3 / 4, 4: 1.0})  # 4: the first problem alone, 1 of 4 right
    assert found.pass_at_problems == {1: 3, 2: 2, 4: 1}
    assert found.majority == 0.5  # of the two that were asked
    assert found.low < found.mean < found.high


def test_a_summary_of_nothing_claims_nothing():
    found = summary([Problem([])])
    assert found.num_problems == 0 and isnan(found.mean) and isnan(found.low) and found.pass_at == {} and found.majority is None


def test_the_interval_of_equal_problems_is_the_exact_binomial_one():
    # all of 10 right: the lower bound solves p^10 = 0.025, p = 0.025^(1/10) = 0.6915
    assert interval([1.0] * 10) == pytest.approx((0.025**0.1, 1.0), abs=1e-6)
    assert interval([0.0] * 10) == pytest.approx((0.0, 1 - 0.025**0.1), abs=1e-6)


def test_the_interval_shrinks_with_problems_and_not_with_their_samples():
    # 100 problems, half of them right: standard error 0.5 / sqrt(100) = 0.05, hence 0.5 -+ 1.96 * 0.05. A quantile of 4000 resamples
    # of a grid of 1/100 is off by about one cell.
    low, high = interval([1.0] * 50 + [0.0] * 50)
    assert low == pytest.approx(0.402, abs=0.011) and high == pytest.approx(0.598, abs=0.011)
    # sixteen times the problems: a quarter of the width
    low_16, high_16 = interval([1.0] * 800 + [0.0] * 800)
    assert (high_16 - low_16) / (high - low) == pytest.approx(0.25, abs=0.02)


def test_the_interval_does_not_depend_on_how_many_resamples_are_drawn_at_once(monkeypatch):
    means = [i % 7 / 6 for i in range(50)]
    whole = interval(means)
    monkeypatch.setattr(accuracy, "_BATCH_VALUES", 500)  # ten resamples of 50 values at once
    assert interval(means) == whole
