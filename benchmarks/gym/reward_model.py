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
