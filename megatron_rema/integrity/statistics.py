"""The statistics of detectors and audits: robust z-scores, CUSUM, paired effects with intervals. numpy and scipy underneath."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MAD_TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
RESAMPLES = 2000


def robust_z(value: float, reference: Sequence[float], *, floor: float = 1e-9) -> float:
    """(value - median) / (1.4826 MAD) of the reference; ``floor`` is the least spread that is believed."""
    median = float(np.median(reference))
    spread = MAD_TO_SIGMA * float(np.median(np.abs(np.asarray(reference) - median)))
    return (value - median) / max(spread, floor)


def cusum(values: Sequence[float], *, slack: float) -> list[float]:
    """One-sided upward CUSUM: S_t = max(0, S_{t-1} + u_t - slack), S_0 = 0. Page 1954."""
    sums, total = [], 0.0
    for value in values:
        total = max(0.0, total + value - slack)
        sums.append(total)
    return sums


def slope(values: Sequence[float]) -> float:
    """Least-squares slope over 0, 1, 2, ...; 0.0 for fewer than two."""
    return float(np.polyfit(np.arange(len(values)), values, 1)[0]) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences, its 95% bootstrap interval over pairs, and the two-sided p of McNemar's exact test for 0/1 outcomes."""

    mean: float
    low: float
    high: float
    num_pairs: int
    p: float

    @property
    def is_positive(self) -> bool:
        return self.low > 0.0

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def paired_effect(full: Sequence[float], edited: Sequence[float], *, seed: int = 0) -> Effect | None:
    """Effect of leaving out what ``edited`` lacks: mean of full - edited, item by item. None of no pair.

    Pairs that are all alike leave nothing to resample: the interval is then that of a rate never seen in n trials, +-3/n (rule of three).
    """
    if len(full) != len(edited):
        raise ValueError(f"pairs need as many full ({len(full)}) as edited ({len(edited)}) outcomes: pass the same items in one order.")
    if not len(full):
        return None
    difference_N = np.asarray(full, dtype=float) - np.asarray(edited, dtype=float)
    mean, n = float(difference_N.mean()), len(difference_N)
    if np.ptp(difference_N) == 0.0:
        low, high = mean - 3.0 / n, mean + 3.0 / n
    else:
        found = stats.bootstrap(
            (difference_N,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    return Effect(mean, low, high, n, mcnemar(difference_N))


def mcnemar(differences_N: Sequence[float]) -> float:
    """Exact two-sided p that gains and losses among paired outcomes are equally likely (a sign test where outcomes are not 0/1)."""
    differences_N = np.asarray(differences_N)
    gains, losses = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    return float(stats.binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


def rate_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% Wilson interval of a rate; (0, 1) of no trial."""
    if trials == 0:
        return 0.0, 1.0
    found = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
