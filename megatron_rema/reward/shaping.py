"""What is done to a reward after its components are known and before anything is compared. Pure: episodes in, rewards changed, metrics out.

Sources: PAR arXiv:2502.18770; length as in R-DPO arXiv:2403.19159; rubric dropout arXiv:2608.11669 (docs/integrity.md, "Mitigations").
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from megatron_rema.types import Episode, Role

PAR = "par"  # the component
KEPT_COMPONENTS = 3  # that dropout always leaves


def preference_as_reward(reward: float, references: Sequence[float]) -> float:
    """PAR: mean over references of sigmoid(reward - reference), in (0, 1): steep near what was usual, flat far above it."""
    return fmean(_sigmoid(reward - reference) for reference in references)


def references_of(rewards: Sequence[float], count: int) -> list[float]:
    """At most ``count`` of the rewards that stand for all of them: the middles of ``count`` equal parts of the sorted ones."""
    ordered = sorted(rewards)
    if len(ordered) <= count:
        return ordered
    return [ordered[math.floor((part + 0.5) * len(ordered) / count)] for part in range(count)]


def noted_references(episodes: Sequence[Episode], known: Mapping[str, Sequence[float]], *, count: int) -> dict[str, list[float]]:
    """``known`` references of each role; a role without any takes them from what these episodes earn (counterfactual ones left out), so
    that the run's first step is the reference of all later ones."""
    references = {role: list(values) for role, values in known.items()}
    for role in Role:
        real = [sum(episode.turn_rewards[role]) for episode in episodes if role in episode.turn_rewards and not episode.is_counterfactual]
        if real and str(role) not in references:
            references[str(role)] = references_of(real, count)
    return references


def shape_by_references(episodes: Sequence[Episode], references: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Replace what each role earns in all by its PAR; the change is component ``par``. In place. A role without references keeps its
    reward. Returns metrics."""
    metrics = {}
    for role in Role:
        known = references.get(str(role))
        paid = [episode for episode in episodes if role in episode.turn_rewards]
        if not known or not paid:
            continue
        for episode in paid:
            total = sum(episode.turn_rewards[role])
            episode.add_reward(PAR, role, preference_as_reward(total, known) - total)
        metrics[f"reward/{role}/par_reference_mean"] = fmean(known)
    return metrics


def debias_length(episodes: Sequence[Episode], *, coefficient: float) -> None:
    """Take ``coefficient`` (reward per token) times (L - mean L) off each role's reward; L are the role's own sampled tokens, the mean is
    over the prompt's real episodes that pay the role. Component ``length``. In place; the group's mean reward stays."""
    if coefficient == 0.0:
        return
    for role in Role:
        paid = [episode for episode in episodes if role in episode.turn_rewards]
        lengths: dict[str, list[int]] = defaultdict(list)
        for episode in paid:
            if not episode.is_counterfactual:
                lengths[episode.prompt.prompt_id].append(_length(episode, role))
        for episode in paid:
            if lengths[episode.prompt.prompt_id]:
                excess = _length(episode, role) - fmean(lengths[episode.prompt.prompt_id])
                episode.add_reward("length", role, -coefficient * excess)


def dropped_components(names: Collection[str], *, prompt_id: str, step: int, fraction: float) -> frozenset[str]:
    """floor(fraction * n) of n component names, drawn by a hash of (prompt_id, step): the same for a whole group and on every rank. At
    least ``KEPT_COMPONENTS`` stay."""
    number = min(math.floor(fraction * len(names)), len(names) - KEPT_COMPONENTS)

    def draw(name: str) -> bytes:
        return hashlib.blake2b(repr((prompt_id, step, name)).encode(), digest_size=8).digest()

    return frozenset(sorted(names, key=draw)[: max(number, 0)])


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _length(episode: Episode, role: Role) -> int:
    return sum(len(turn.completion.token_ids) for turn in episode.turns_of(role))
