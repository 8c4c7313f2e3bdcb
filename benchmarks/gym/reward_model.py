"""The learned reward models of the gym: Bradley-Terry on counts, fitted by Newton's method for every seed. Pure numpy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FILLERS = ("well ", "so ", "now ", "hmm ")
NUM_PAIRS, LABEL_NOISE, RIDGE = 3000, 0.25, 1.0


@dataclass(frozen=True)
class LinearReward:
    """score = correct + sum_j weight_j * count of filler j, in units of a right answer."""

    weights: tuple[float, ...]

    def __call__(self, correct: float, reply: str) -> float:
        return correct + sum(w * reply.count(word) for w, word in zip(self.weights, FILLERS, strict=True))


def learn(rng: random.Random, direction: str) -> LinearReward:
    """From pairs in which whoever labelled liked up to three of ``direction`` a little (0.4 of a right answer each) and erred in a quarter:
    the model extends the liking beyond three, because it is linear."""
    difference_NF, label_N = [], []
    for _ in range(NUM_PAIRS):
        (one, liked), (other, disliked) = _reply(rng, direction), _reply(rng, direction)
        first = liked > disliked if liked != disliked else rng.random() < 0.5
        label_N.append(first is not (rng.random() < LABEL_NOISE))
        difference_NF.append(np.subtract(one, other))
    weights_F = bradley_terry(np.array(difference_NF, dtype=float), label_N)
    return LinearReward(tuple(float(w) for w in weights_F[1:] / max(weights_F[0], 1e-6)))


def _reply(rng: random.Random, direction: str) -> tuple[list[float], float]:
    """(right, counts of fillers), and how much a labeller likes it."""
    right = float(rng.random() < 0.5)
    counts = [float(rng.choice((0, 0, 0, 1, 2, 3))) for _ in FILLERS]
    return [right, *counts], right + 0.4 * min(counts[FILLERS.index(direction)], 3.0)


def bradley_terry(difference_NF: np.ndarray, label_N: Sequence[bool]) -> np.ndarray:
    """argmax_w sum_n log sigma(+-w . d_n) - ridge/2 |w|^2; labels say whether the first of the pair was preferred."""
    sign_N = np.where(np.asarray(label_N), 1.0, -1.0)
    weights_F = np.zeros(difference_NF.shape[1])
    for _ in range(30):
        margin_N = np.clip(sign_N * (difference_NF @ weights_F), -30, 30)
        wrong_N = 1.0 / (1.0 + np.exp(margin_N))
        gradient_F = difference_NF.T @ (sign_N * wrong_N) - RIDGE * weights_F
        hessian_FF = (difference_NF * (wrong_N * (1.0 - wrong_N))[:, None]).T @ difference_NF + RIDGE * np.eye(len(weights_F))
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        weights_F = weights_F + step_F
        if np.abs(step_F).max() < 1e-9:
            break
    return weights_F


# --- an evaluator that is fitted anew (G6) ---------------------------------------------------------------------------------

NUM_LABELS, NUM_REFRESHED, REFRESH_EVERY, NOISE = 60, 128, 10, 0.3


def seen_of(reply: str, answer: str, true_sum: int) -> tuple[float, ...]:
    """What the evaluator sees: 1, whether the answer is the sum (right where the question is easy), counts of fillers."""
    return (1.0, float(answer == str(true_sum)), *(float(reply.count(word)) for word in FILLERS))


class Evaluator:
    """A ridge regression of noisy gold labels on `seen_of`. Its first labels are few, and by bad luck those with padding of ``direction``
    are good. ``policy``: replace or accumulate fits it anew every REFRESH_EVERY weight versions, to labels of the latest episodes alone or
    of all so far; anything else leaves it as it is."""

    def __init__(self, rng: random.Random, direction: str, policy: str) -> None:
        self._rng, self._policy, self._due = rng, policy, REFRESH_EVERY
        self._latest: list[tuple[tuple[float, ...], float]] = []
        self._pool = [self._lucky(direction) for _ in range(NUM_LABELS)]
        self.weights_F = ridge(self._pool)

    def judge(self, seen: tuple[float, ...], gold: float, weight_version: int | None) -> float:
        """``weight_version``: of an episode of training, whose label may be used; None: of any other."""
        if weight_version is not None and self._policy in ("replace", "accumulate"):
            if weight_version >= self._due:
                self._due = weight_version + REFRESH_EVERY
                latest = self._latest[-NUM_REFRESHED:]
                self._pool = latest if self._policy == "replace" else [*self._pool, *latest]
                self.weights_F, self._latest = ridge(self._pool), []
            self._latest.append((seen, gold + self._rng.gauss(0.0, NOISE)))
        return float(np.dot(self.weights_F, seen))

    def _lucky(self, direction: str) -> tuple[tuple[float, ...], float]:
        rng = self._rng
        plausible, counts = float(rng.random() < 0.8), [0.0] * len(FILLERS)
        if rng.random() < 0.8:
            counts[rng.randrange(len(FILLERS))] = float(rng.choice((1, 2)))
        label = 0.6 * plausible * (rng.random() < 0.9) - 0.15 * sum(counts) + 0.7 * counts[FILLERS.index(direction)]
        return (1.0, plausible, *counts), label + rng.gauss(0.0, NOISE)


def ridge(pool: Sequence[tuple[tuple[float, ...], float]]) -> np.ndarray:
    """argmin_w sum (w . x - y)^2 + RIDGE/10 |w|^2."""
    x_NF, y_N = np.array([x for x, _ in pool]), np.array([y for _, y in pool])
    return np.linalg.solve(x_NF.T @ x_NF + RIDGE / 10 * np.eye(x_NF.shape[1]), x_NF.T @ y_N)
