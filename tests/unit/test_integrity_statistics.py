"""Numbers of audits by hand."""

from __future__ import annotations

import pytest

from megatron_rema.integrity.statistics import cusum, mcnemar, paired_effect, rate_interval, robust_z, slope


def test_robust_z_uses_median_and_mad():
    # median 3, deviations 2 1 0 1 97 -> MAD 1: (6 - 3) / 1.4826
    assert robust_z(6.0, [1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(3.0 / 1.4826)
    assert robust_z(1.0, [0.5] * 5, floor=0.25) == pytest.approx(2.0)


def test_cusum_adds_what_exceeds_the_slack_and_never_falls_below_zero():
    assert cusum([1.0, 0.0, 2.0, -5.0, 1.0], slack=0.5) == [0.5, 0.0, 1.5, 0.0, 0.5]


def test_slope():
    assert slope([1.0, 3.0, 5.0]) == pytest.approx(2.0)
    assert slope([1.0]) == 0.0


def test_paired_effect_of_twenty_pairs():
    # 12 pairs lose (1 -> 0), 2 gain, 6 tie: mean (12 - 2) / 20 = 0.5; exact McNemar of 12 against 2: 2 * (1 + 14 + 91) / 2^14
    full, edited = [1.0] * 12 + [0.0] * 2 + [1.0] * 6, [0.0] * 12 + [1.0] * 2 + [1.0] * 6
    effect = paired_effect(full, edited)
    assert effect.mean == pytest.approx(0.5) and effect.num_pairs == 20
    assert effect.p == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert effect.is_positive and 0.1 < effect.low < 0.5 < effect.high < 0.9


def test_pairs_that_are_all_alike_are_not_certain():
    effect = paired_effect([1.0] * 30, [1.0] * 30)
    assert (effect.mean, effect.low, effect.high, effect.p) == (0.0, pytest.approx(-0.1), pytest.approx(0.1), 1.0)
    assert effect.includes_zero


def test_no_pair_has_no_effect_and_unequal_lists_are_refused():
    assert paired_effect([], []) is None
    with pytest.raises(ValueError, match=r"full \(2\).*edited \(1\)"):
        paired_effect([1.0, 0.0], [1.0])


def test_mcnemar_counts_signs():
    assert mcnemar([1, 1, 1, 1, 1]) == pytest.approx(2 / 32)
    assert mcnemar([0, 0]) == 1.0


def test_rate_interval():
    # Wilson, 0 of 10: upper = z^2 / (n + z^2) with z = 1.96
    assert rate_interval(0, 10) == (0.0, pytest.approx(3.8415 / 13.8415, abs=1e-3))
    assert rate_interval(0, 0) == (0.0, 1.0)
