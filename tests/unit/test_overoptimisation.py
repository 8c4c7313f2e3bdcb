"""Gao's curves: coefficients and peaks of gold scores made by hand, and what a report says of them."""

from __future__ import annotations

from math import e, exp, log, sqrt
from pathlib import Path

import pytest

from megatron_rema.report.overoptimisation import fit, overoptimisation_html, peak_of, points_of
from megatron_rema.report.run_folder import Run

D = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0]


def test_peaks():
    # d/dd of d (a - b ln d) = a - b ln d - b = 0; of d (a - b d) = a - 2 b d = 0
    assert peak_of(1.0, 0.5, "rl") == pytest.approx(e) and peak_of(1.0, 0.25, "bon") == 2.0
    assert peak_of(1.0, 0.0, "rl") is None and peak_of(-1.0, 0.5, "bon") is None and peak_of(1.0, 1e-3, "rl") is None


def test_an_exact_curve_gives_its_coefficients_back():
    found = fit(D, [0.2 + d * (1.0 - 0.5 * log(d)) for d in D], "rl")
    assert (found.start, found.alpha.value, found.beta.value) == pytest.approx((0.2, 1.0, 0.5))
    assert found.peak.value == pytest.approx(exp(1.0)) and found.peak_frac == 1.0 and found.rmse == pytest.approx(0.0, abs=1e-9)
    assert (found.alpha.low, found.alpha.high) == pytest.approx((1.0, 1.0)), "without noise every resample says the same"
    found = fit(D, [0.2 + d * (1.0 - 0.125 * d) for d in D], "bon")
    assert (found.start, found.alpha.value, found.beta.value, found.peak.value) == pytest.approx((0.2, 1.0, 0.125, 4.0))
    with_zero = [0.0, *D]
    assert fit(with_zero, [0.2 + d * (1.0 - 0.5 * log(d or 1.0)) for d in with_zero], "rl").start == pytest.approx(0.2)


def test_noise_opens_the_interval_around_the_truth():
    noise = [0.1, -0.1, 0.05, -0.05, 0.1, -0.1] * 2
    found = fit([*D, *D], [d * (1.0 - 0.125 * d) + n for d, n in zip([*D, *D], noise, strict=True)], "bon")
    assert found.alpha.low < found.alpha.value < found.alpha.high and found.beta.low < 0.125 < found.beta.high
    assert found.peak.low < 4.0 < found.peak.high


def test_a_curve_that_only_rises_has_no_peak():
    found = fit(D, [0.1 * d**2 for d in D], "bon")
    assert found.peak is None and found.peak_frac == 0.0 and found.beta.value == pytest.approx(-0.1)


def test_what_cannot_be_fitted():
    assert fit(D[:4], [1.0] * 4, "rl") is None and fit([1.0] * 9, [1.0] * 9, "rl") is None
    with pytest.raises(ValueError, match="6 distances and 1 gold"):
        fit(D, [1.0], "rl")
    with pytest.raises(ValueError, match="form must be one of"):
        fit(D, D, "ppo")


def run_of(*rows: dict) -> Run:
    return Run(Path("r"), "", {}, list(rows), [], [], [], {})


def audit(step: int, d: float, gold: float, **more) -> dict:
    """10 tokens an episode: d^2 / 10 nats a token."""
    tokens = {"rollout/sampled_tokens": 80, "rollout/episodes": 8}
    return {"step": step, "train/kl_ref_nats": d**2 / 10, "integrity/audit/proxy_gold/gold": gold, **tokens, **more}


def test_a_report_shows_the_fit_of_five_audits_and_says_what_it_is_not():
    rows = [audit(i, d, d * (1.0 - 0.125 * d)) for i, d in enumerate(D)]
    between = {"step": 99, "train/kl_ref_nats": 1.0, "rollout/sampled_tokens": 80, "rollout/episodes": 8}  # no audit at that step
    distances, gold = points_of(run_of(*rows, between))
    assert distances == pytest.approx(D) and gold == [row["integrity/audit/proxy_gold/gold"] for row in rows]
    page = overoptimisation_html(run_of(*rows))
    assert "Gold of 6 audits" in page and "no rule for stopping" in page and "4 [4, 4]" in page and "reached 6.00" in page
    assert overoptimisation_html(run_of(*rows[:4])) == "" and overoptimisation_html(run_of()) == ""


def test_several_policies_count_by_their_mean():
    row = audit(1, 0.0, 1.0) | {"train/planner/kl_ref_nats": 0.2, "train/solver/kl_ref_nats": 0.4}
    del row["train/kl_ref_nats"]
    assert points_of(run_of(row))[0] == [pytest.approx(sqrt(0.3 * 10))]
