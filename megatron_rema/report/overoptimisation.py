"""How gold depends on the distance from the reference, fitted after a run: Gao et al. arXiv:2210.10760.

With d = sqrt(KL(policy || reference)), KL in nats of a whole episode, R0 the gold where d = 0:

rl    R = R0 + d (alpha - beta ln d)    highest at d* = exp(alpha / beta - 1)
bon   R = R0 + d (alpha - beta d)       highest at d* = alpha / (2 beta)

A description of what happened and no rule for stopping: no part of training reads it. Before the peak is passed d* is an extrapolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, get_args

import numpy as np

from megatron_rema.report.run_folder import Run

Form = Literal["rl", "bon"]
FORMULAS: dict[str, str] = {"rl": "R0 + d (\u03b1 \u2212 \u03b2 ln d)", "bon": "R0 + d (\u03b1 \u2212 \u03b2 d)"}
FEWEST = 5  # audits
RESAMPLES = 1000
LARGEST_EXPONENT = 20.0  # of d* = exp(alpha / beta - 1): beyond it there is no peak that a run could reach


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float  # 95% bootstrap interval over audits
    high: float


@dataclass(frozen=True)
class Fit:
    form: Form
    start: float  # R0
    alpha: Estimate
    beta: Estimate
    rmse: float
    peak: Estimate | None  # d*; None where the fitted curve has none. Its interval is over those resamples that have one,
    peak_frac: float  # which are this fraction of all


def fit(d_N: Sequence[float], gold_N: Sequence[float], form: Form, *, seed: int = 0) -> Fit | None:
    """Least squares over audits, and intervals from resampling them. None of fewer than ``FEWEST``, or of too few different distances."""
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}.")
    d_N, gold_N = np.asarray(d_N, dtype=float), np.asarray(gold_N, dtype=float)
    if len(d_N) != len(gold_N):
        raise ValueError(f"{len(d_N)} distances and {len(gold_N)} gold scores; a fit needs one of each for every audit.")
    if len(d_N) < FEWEST or (best := _solve(d_N, gold_N, form)) is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(d_N), size=len(d_N)) for _ in range(RESAMPLES))
    found = [coefficients for index_N in drawn if (coefficients := _solve(d_N[index_N], gold_N[index_N], form)) is not None]
    peaks = [peak for _, alpha, beta in found if (peak := peak_of(alpha, beta, form)) is not None]
    start, alpha, beta = best
    peak = peak_of(alpha, beta, form)
    return Fit(
        form=form,
        start=start,
        alpha=_estimate(alpha, [row[1] for row in found]),
        beta=_estimate(beta, [row[2] for row in found]),
        rmse=float(np.sqrt(np.mean((_design(d_N, form) @ np.array(best) - gold_N) ** 2))),
        peak=None if peak is None else _estimate(peak, peaks),
        peak_frac=len(peaks) / max(len(found), 1),
    )


def peak_of(alpha: float, beta: float, form: Form) -> float | None:
    """d* > 0 at which the curve is highest; None where it only rises or only falls."""
    if beta <= 0.0 or (form == "bon" and alpha <= 0.0):
        return None
    if form == "bon":
        return alpha / (2.0 * beta)
    exponent = alpha / beta - 1.0
    return float(np.exp(exponent)) if abs(exponent) <= LARGEST_EXPONENT else None


def points_of(run: Run) -> tuple[list[float], list[float]]:
    """d and gold of every audit of a run that kept a reference.

    KL of an episode = train/kl_ref_nats (nats per token, mean over policies where there are several) times its sampled tokens.
    """
    gold = {row["step"]: row[name] for row in run.metrics if isinstance(row.get(name := "integrity/audit/proxy_gold/gold"), int | float)}
    kl = list(run.series_by_owner("train/kl_ref_nats").values())
    by_step = [dict(zip(series.steps, series.values, strict=True)) for series in kl]
    distances, worth = [], []
    for row in run.metrics:
        step, tokens, episodes = row["step"], row.get("rollout/sampled_tokens"), row.get("rollout/episodes")
        found = [values[step] for values in by_step if step in values]
        if step in gold and found and tokens and episodes:
            nats = float(np.mean(found)) * tokens / episodes
            if np.isfinite(nats) and np.isfinite(gold[step]):
                distances.append(float(np.sqrt(max(nats, 0.0))))
                worth.append(float(gold[step]))
    return distances, worth


def overoptimisation_html(run: Run) -> str:
    """Both forms with intervals; nothing where there are too few audits, or no KL was measured."""
    distances, worth = points_of(run)
    fits = [found for form in get_args(Form) if (found := fit(distances, worth, form)) is not None]
    if not fits:
        return ""
    head = "".join(f"<th>{cell}</th>" for cell in ("gold as", "R0", "\u03b1", "\u03b2", "d* of the peak", "KL there, nats", "rmse"))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(found)) + "</tr>" for found in fits)
    return (
        f"<p>Gold of {len(worth)} audits against d = \u221aKL of an episode from the reference, which reached {max(distances):.2f} "
        "(Gao et al., arXiv:2210.10760). 95% intervals, by resampling audits. Fitted after the run: it describes what happened and is no "
        "rule for stopping, and nothing in training reads it. A d* beyond what was reached is an extrapolation.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(found: Fit) -> list[str]:
    def shown(estimate: Estimate) -> str:
        return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"

    peak = "none" if found.peak is None else f"{shown(found.peak)}, in {found.peak_frac:.0%} of resamples"
    nats = "" if found.peak is None else f"{found.peak.value**2:.3g}"
    return [FORMULAS[found.form], f"{found.start:.3g}", shown(found.alpha), shown(found.beta), peak, nats, f"{found.rmse:.2g}"]


def _design(d_N: np.ndarray, form: Form) -> np.ndarray:
    """[N, 3] columns of R0, alpha and beta."""
    bend_N = d_N**2 if form == "bon" else d_N * np.log(np.where(d_N > 0.0, d_N, 1.0))
    return np.stack([np.ones_like(d_N), d_N, -bend_N], axis=1)


def _solve(d_N: np.ndarray, gold_N: np.ndarray, form: Form) -> tuple[float, float, float] | None:
    solution, _, rank, _ = np.linalg.lstsq(_design(d_N, form), gold_N, rcond=None)
    return tuple(map(float, solution)) if rank == 3 else None


def _estimate(value: float, resampled: Sequence[float]) -> Estimate:
    if not resampled:
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
