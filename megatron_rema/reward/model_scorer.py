"""A reward model's head outputs -> one score per episode, added to the rewards. Pure: who runs the model is the trainer's business."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from megatron_rema.types import Episode

Ensemble = Literal["mean", "min", "uwo", "entropic"]


def combine(heads: Sequence[float], ensemble: Ensemble, coefficient: float = 1.0) -> float:
    """One score of K heads (sources: arXiv:2310.02743 for min and uwo; the entropic risk measure, Foellmer and Schied 2002).

    mean       mu
    min        the most pessimistic head: worst-case optimisation
    uwo        mu - coefficient * sigma^2, the variance over heads (of K, not K - 1): uncertainty-weighted optimisation
    entropic   -coefficient * log mean exp(-r / coefficient): the mean for a large coefficient, the minimum for a small one, and
               mu - sigma^2 / (2 coefficient) in between
    """
    if ensemble == "min":
        return min(heads)
    mean = fmean(heads)
    if ensemble == "uwo":
        return mean - coefficient * fmean((head - mean) ** 2 for head in heads)
    if ensemble == "entropic":
        least = min(heads)  # taken out of the exponents, none of which is then above 0
        return least - coefficient * math.log(fmean(math.exp(-(head - least) / coefficient) for head in heads))
    return mean


def add_model_scores(
    episodes: Sequence[Episode],
    heads: Mapping[str, Sequence[float]],
    *,
    weight: float,
    ensemble: Ensemble,
    coefficient: float = 1.0,
    mask_unfinished_reward: bool = True,
) -> dict[str, float]:
    """Note each episode's score (``model_score``) and add ``weight`` times it to the last turn of every role that is rewarded.

    ``heads`` holds the K outputs of each episode by its id. An episode in which the reasoner never spoke has none: it gets the lowest
    score of the others, for no answer must not be worth more than a bad one. ``mask_unfinished_reward``: as in `assign`, an episode that
    did not end as the protocol wants earns at most 0.0, however well it scores. Returns metrics, counterfactual episodes left out.
    """
    scores = {episode_id: combine(values, ensemble, coefficient) for episode_id, values in heads.items()}
    lowest = min(scores.values(), default=0.0)
    for episode in episodes:
        episode.score["model_score"] = scores.get(episode.episode_id, lowest)
        ceiling = 0.0 if mask_unfinished_reward and episode.status.is_cut else None
        for role in episode.turn_rewards:
            episode.add_reward("model", role, weight * episode.score["model_score"], ceiling=ceiling)
    episodes = [episode for episode in episodes if not episode.is_counterfactual]
    if not episodes:
        return {}
    answered = [episode for episode in episodes if episode.episode_id in scores]
    groups = {
        "mean": answered,
        "mean_when_correct": [episode for episode in answered if episode.score.get("correct")],
        "mean_when_wrong": [episode for episode in answered if not episode.score.get("correct")],
    }
    metrics = {f"reward/model/{name}": fmean(e.score["model_score"] for e in group) for name, group in groups.items() if group}
    metrics["reward/model/unanswered_frac"] = 1 - len(answered) / len(episodes)
    if answered:
        metrics["reward/model/head_spread_mean"] = fmean(max(heads[e.episode_id]) - min(heads[e.episode_id]) for e in answered)
    return metrics
