"""What many samples of many problems say of accuracy: avg@k with its interval, pass@k, majority@k. Pure numbers: no torch, no verifier.

The unit is the problem: its samples share the question and are not independent, so means and intervals are over problems. Problems that
belong together (both orders of a judge's comparison) count as one there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, nan
from statistics import fmean

import numpy as np
from scipy import stats

BOOTSTRAP_RESAMPLES = 4000
_BATCH_VALUES = 4_000_000  # numbers drawn at once: 32 MB, however many problems there are


@dataclass(frozen=True)
class Problem:
    """One problem's samples that have a verdict; samples without one are excluded (and counted) by the caller."""

    right: Sequence[float]  # 1.0 or 0.0 each
    majority_right: bool | None = None  # None: was not asked for
    cluster: str | None = None  # problems of the same cluster are not independent of each other; None: stands alone


@dataclass(frozen=True)
class Accuracy:
    """Of the problems with at least one verdict. ``low`` and ``high`` bound the 95% interval of ``mean``."""

    num_problems: int
    num_samples: int
    fewest: int  # samples of a problem
    most: int
    mean: float  # avg@k: mean over problems (clusters of them) of the fraction right
    low: float
    high: float
    pass_at: dict[int, float]  # k -> pass@k over the problems with at least k samples
    pass_at_problems: dict[int, int]  # k -> their number
    majority: float | None  # majority@k: fraction of problems whose most frequent answer is right


def interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over problems: percentile bootstrap (problems are the unit, their samples are not independent).

    Where every problem has the same mean a bootstrap has nothing to resample: the exact binomial interval over problems stands in.
    """
    values = np.asarray(problem_means, dtype=float)
    if np.ptp(values) == 0.0:
        exact = stats.binomtest(round(values[0] * len(values)), len(values)).proportion_ci(0.95)
        return float(exact.low), float(exact.high)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        batch=max(1, _BATCH_VALUES // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that k samples drawn without replacement from the n of a problem, c of them right, hold a right one.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of pass@k (arXiv:2107.03374 eq. 1); integers, hence exact to rounding.
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@k needs 0 <= num_right <= num_samples and 1 <= k <= num_samples, got num_right {num_right}, num_samples {num_samples} "
            f"and k {k}: with fewer than k samples pass@k cannot be estimated; sample more or ask for a smaller k."
        )
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def sizes(most: int) -> list[int]:
    """The k for which pass@k is reported where a problem has up to ``most`` samples: 1, 2, 4, ... and ``most``."""
    powers = [2**i for i in range(most.bit_length())]
    return powers if not powers or powers[-1] == most else [*powers, most]


def summary(problems: Sequence[Problem]) -> Accuracy:
    """Problems without a sample are left out; of none at all every figure is NaN."""
    problems = [problem for problem in problems if len(problem.right)]
    if not problems:
        return Accuracy(0, 0, 0, 0, nan, nan, nan, {}, {}, None)
    counts = [(len(problem.right), round(sum(problem.right))) for problem in problems]
    clusters: defaultdict[str | int, list[float]] = defaultdict(list)
    for index, problem in enumerate(problems):
        clusters[index if problem.cluster is None else problem.cluster].append(fmean(problem.right))
    means = [fmean(members) for members in clusters.values()]
    most = max(n for n, _ in counts)
    passes = {k: [pass_at_k(n, c, k) for n, c in counts if n >= k] for k in sizes(most)}
    majorities = [float(problem.majority_right) for problem in problems if problem.majority_right is not None]
    low, high = interval(means)
    return Accuracy(
        num_problems=len(problems),
        num_samples=sum(n for n, _ in counts),
        fewest=min(n for n, _ in counts),
        most=most,
        mean=fmean(means),
        low=low,
        high=high,
        pass_at={k: fmean(values) for k, values in passes.items()},
        pass_at_problems={k: len(values) for k, values in passes.items()},
        majority=fmean(majorities) if majorities else None,
    )
