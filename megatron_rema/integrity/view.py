"""What detectors see of an episode: one row per role, without anything that an oracle knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_rema.types import Episode, Role


@dataclass(frozen=True)
class Rollout:
    """One role's part of one episode, and what it earned by the reward that training uses (the proxy)."""

    episode_id: str
    prompt_id: str
    role: Role
    text: str  # the role's messages, a line each
    last_text: str  # its last message
    tokens: int  # sampled by the role
    proxy: float  # sum of its turns' rewards
    parts: Mapping[str, float] = field(default_factory=dict)  # the proxy by component, as weighted and shaped; they sum to it
    members: tuple[float, ...] = ()  # what each member of a reward ensemble says of the episode
    advantage: float = 0.0  # mean over its turns


@dataclass(frozen=True)
class Observation:
    """One step, as signals see it. ``metrics``: what the trainer measured of it."""

    step: int
    rollouts: Sequence[Rollout]
    metrics: Mapping[str, float] = field(default_factory=dict)

    def of(self, role: Role) -> Observation:
        return Observation(self.step, [rollout for rollout in self.rollouts if rollout.role is role], self.metrics)


def rollouts_of(episodes: Sequence[Episode], members: Mapping[str, Sequence[float]] | None = None) -> list[Rollout]:
    """Rows of every role that was rewarded; counterfactual episodes are left out. ``members``: ensemble scores by episode_id."""
    rows = []
    for episode in episodes:
        if episode.is_counterfactual:
            continue
        for role, rewards in episode.turn_rewards.items():
            turns, advantages = episode.turns_of(role), episode.advantages.get(role, [])
            rows.append(
                Rollout(
                    episode_id=episode.episode_id,
                    prompt_id=episode.prompt.prompt_id,
                    role=role,
                    text="\n".join(turn.text for turn in turns),
                    last_text=turns[-1].text,
                    tokens=sum(len(turn.completion.token_ids) for turn in turns),
                    proxy=sum(rewards),
                    parts={name: sum(values[role]) for name, values in episode.reward_parts.items() if role in values},
                    members=tuple((members or {}).get(episode.episode_id, ())),
                    advantage=sum(advantages) / len(advantages) if advantages else 0.0,
                )
            )
    return rows


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Groups of one prompt and role, in the order of first appearance."""
    groups: dict[tuple[str, Role], list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.prompt_id, rollout.role), []).append(rollout)
    return list(groups.values())
