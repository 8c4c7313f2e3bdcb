"""Verdicts -> score components -> turn rewards per role. Episodes whose worth is not known are set apart and counted, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_rema.reward.components import SCHEMES, components_of
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.reward.shaping import dropped_components
from megatron_rema.types import Episode, EpisodeStatus, Role, Verdict


@dataclass(frozen=True)
class Assigned:
    """``scored`` have turn_rewards; ``excluded`` (verdict UNKNOWN, or aborted by the engine) must not be trained on."""

    scored: list[Episode]
    excluded: list[Episode]


RewardFunction = Callable[[Episode], Mapping[str, float | Mapping[Role, float]]]


def assign(
    episodes: Sequence[Episode],
    judgements: Mapping[str, Judgement],
    *,
    scheme: str = "outcome",
    mask_unfinished_reward: bool = True,
    function: RewardFunction | None = None,
    weights: Mapping[str, float] | None = None,
    component_dropout: float = 0.0,
    step: int = 0,
) -> Assigned:
    """Fill verdict, score, turn_rewards and reward_parts of each episode, in place.

    ``function`` adds components of its own, raw in ``score`` and times their ``weights`` (1 where not given; ``outcome`` is the scheme's)
    in the reward.

    ``component_dropout``: that fraction of the function's components is not paid, drawn anew for each prompt and ``step`` (the raw
    ``score`` holds them all): see `dropped_components`.

    A role's reward stands on its last turn, 0.0 on the others. ``mask_unfinished_reward``: an episode that did not end as the protocol
    wants earns at most 0.0, be its answer right or wrong (a penalty of the scheme stays).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"reward.scheme is {scheme!r}, which is not one of {sorted(SCHEMES)}.")
    weights = weights or {}
    scored, excluded = [], []
    components: dict[str, Mapping[str, float | Mapping[Role, float]]] = {}
    for episode in episodes:
        judgement = judgements[episode.episode_id]
        episode.verdict = judgement.verdict
        episode.score = components_of(episode, judgement)
        if judgement.verdict is Verdict.UNKNOWN or episode.status is EpisodeStatus.ABORTED:
            episode.score, episode.turn_rewards, episode.reward_parts = {}, {}, {}
            excluded.append(episode)
            continue
        rewards = SCHEMES[scheme](episode.score)
        ceiling = 0.0 if mask_unfinished_reward and episode.status.is_cut else None
        episode.turn_rewards, episode.reward_parts = {}, {}
        for role in Role:
            if episode.turns_of(role):
                episode.add_reward("outcome", role, weights.get("outcome", 1.0) * rewards[role], ceiling=ceiling)
        if function is not None:
            components[episode.episode_id] = dict(function(episode))
        scored.append(episode)
    for prompt_id, group in _by_prompt(scored).items() if function is not None else ():
        names = {name for episode in group for name in components[episode.episode_id]}
        dropped = dropped_components(names, prompt_id=prompt_id, step=step, fraction=component_dropout)
        for episode in group:
            ceiling = 0.0 if mask_unfinished_reward and episode.status.is_cut else None
            for name, amount in components[episode.episode_id].items():
                per_role = amount if isinstance(amount, Mapping) else dict.fromkeys(episode.turn_rewards, amount)
                episode.score[name] = sum(map(float, per_role.values())) / max(len(per_role), 1)
                for role, value in per_role.items() if name not in dropped else ():
                    if role in episode.turn_rewards:
                        episode.add_reward(name, Role(role), weights.get(name, 1.0) * float(value), ceiling=ceiling)
    return Assigned(scored, excluded)


def _by_prompt(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.prompt.prompt_id, []).append(episode)
    return groups


def set_apart(assigned: Assigned) -> tuple[Assigned, Assigned]:
    """The real episodes and the counterfactual ones."""

    def only(counterfactual: bool) -> Assigned:
        return Assigned(*([e for e in part if e.is_counterfactual is counterfactual] for part in (assigned.scored, assigned.excluded)))

    return only(False), only(True)


def counterfactual_metrics(assigned: Assigned, counterfactual: Assigned) -> dict[str, float]:
    """What the meta-thinker would have earned, and the answers been worth, without the plan. {} when nothing counterfactual was played.

    plan_effect is mean reward with the plan - mean reward without any. Swapped plans have none: their mean over the group is that of the
    plans themselves, and the difference is 0 but for luck.
    """
    total = len(counterfactual.scored) + len(counterfactual.excluded)
    if not total:
        return {}
    metrics = {"rollout/counterfactual_episodes": float(total), "reward/counterfactual_excluded_frac": len(counterfactual.excluded) / total}
    planner = Role.META_THINKING
    real, other = ([sum(e.turn_rewards[planner]) for e in part.scored if planner in e.turn_rewards] for part in (assigned, counterfactual))
    if other:
        metrics["reward/counterfactual_mean"] = sum(other) / len(other)
        metrics["reward/counterfactual_correct_frac"] = sum(e.score["correct"] for e in counterfactual.scored) / len(counterfactual.scored)
    if real and other and all(e.plan_of is None for e in counterfactual.scored):
        metrics["reward/plan_effect"] = sum(real) / len(real) - sum(other) / len(other)
    return metrics


def reward_metrics(assigned: Assigned, judgements: Mapping[str, Judgement]) -> dict[str, float]:
    """Means over scored episodes (reward/mean: over their traces), fractions over all of ``assigned``; a mean over nothing is left out."""
    scored, total = assigned.scored, len(assigned.scored) + len(assigned.excluded)
    metrics: dict[str, float] = {}
    by_role = {role: [sum(e.turn_rewards[role]) for e in scored if role in e.turn_rewards] for role in Role}
    for role, rewards in by_role.items():
        if rewards:
            metrics[f"reward/{role}/mean"] = sum(rewards) / len(rewards)
    parts = dict.fromkeys(name for e in scored for name in e.reward_parts)
    for name in parts if len(parts) > 1 else ():
        for role in by_role:
            values = [sum(e.reward_parts[name][role]) for e in scored if role in e.reward_parts.get(name, {})]
            if values:
                metrics[f"reward/{role}/part/{name}_mean"] = sum(values) / len(values)
    everyone = [reward for rewards in by_role.values() for reward in rewards]
    if everyone:
        metrics["reward/mean"] = sum(everyone) / len(everyone)
    for name in ("correct", "lenient_correct", "finished", "answer_format", "plan_has_answer_format"):
        values = [e.score[name] for e in scored if name in e.score]
        if values:
            metrics[f"reward/{name}_frac"] = sum(values) / len(values)
    if total:
        metrics["reward/excluded_frac"] = len(assigned.excluded) / total
        metrics["reward/aborted_frac"] = sum(e.status is EpisodeStatus.ABORTED for e in assigned.excluded) / total
        for how in ("timeout", "crash"):
            metrics[f"reward/verifier_{how}_frac"] = sum(judgements[e.episode_id].how == how for e in (*scored, *assigned.excluded)) / total
    return metrics
