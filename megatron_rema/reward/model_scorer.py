"""A reward model's head outputs -> one score per episode, added to the rewards. Pure: who runs the model is the trainer's business."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from megatron_rema.types import Episode

Ensemble = Literal["mean", "min"]


def combine(heads: Sequence[float], ensemble: Ensemble) -> float:
    """One score of K heads. ``min`` trusts the most pessimistic head (worst-case optimisation, arXiv:2310.02743)."""
    return min(heads) if ensemble == "min" else fmean(heads)


def add_model_scores(
    episodes: Sequence[Episode], heads: Sequence[Sequence[float]], *, weight: float, ensemble: Ensemble
) -> dict[str, float]:
    """Note each episode's score (``model_score``) and add ``weight`` times it to the last turn of every role that is rewarded.

    Returns metrics; ``heads`` holds the K outputs of each episode.
    """
    scores = [combine(values, ensemble) for values in heads]
    for episode, score in zip(episodes, scores, strict=True):
        episode.score["model_score"] = score
        for rewards in episode.turn_rewards.values():
            rewards[-1] += weight * score
    if not scores:
        return {}
    spread = [max(values) - min(values) for values in heads]
    right = [score for episode, score in zip(episodes, scores, strict=True) if episode.score.get("correct")]
    wrong = [score for episode, score in zip(episodes, scores, strict=True) if not episode.score.get("correct")]
    metrics = {"reward/model/mean": fmean(scores), "reward/model/head_spread_mean": fmean(spread)}
    if right:
        metrics["reward/model/mean_when_correct"] = fmean(right)
    if wrong:
        metrics["reward/model/mean_when_wrong"] = fmean(wrong)
    return metrics
