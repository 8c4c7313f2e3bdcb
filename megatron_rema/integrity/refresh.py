"""Preference pairs for a reward model's next training, out of episodes that it, or the rest of the reward, falsely paid. Pure.

This spends gold on training: the pairs know it, so later audits should look at problems that gave none. Pairs are added to earlier ones and
never put in their place; docs/integrity.md, "Mitigations", M-X1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_rema.reward.gates import PREFIX, Gate
from megatron_rema.types import Episode, Role

Row = dict[str, Any]


def refreshed(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All old pairs as they stand, then the new ones that are not among them."""
    rows = list(old)
    for row in new:
        if row not in rows:
            rows.append(row)
    return rows


def pairs_of(episodes: Sequence[Episode], gate: Gate, oracle: Callable[[Episode], float], *, per_prompt: int = 4) -> list[Row]:
    """Rows of ``task.preference_file``, at most ``per_prompt`` of a prompt, each episode in one of them.

    rejected: shows the mechanism (``gate`` closes) and was paid for it, gates apart; chosen: an episode of the same prompt that does not
    show it and is worth more. Counterfactual, unscored and half-finished episodes, and blank messages, make no pair.
    """
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        if not episode.is_counterfactual and _is_whole(episode):
            groups.setdefault(episode.prompt.prompt_id, []).append(episode)
    rows = []
    for group in groups.values():
        falsely_paid = [episode for episode in group if gate.predicate(episode) and paid(episode) > 0.0]
        honest = sorted((e for e in group if not gate.predicate(e)), key=oracle, reverse=True)  # stable: as played where worth is equal
        pairs = zip(honest, sorted(falsely_paid, key=oracle), strict=False)
        rows += [_row(better, worse) for better, worse in list(pairs)[:per_prompt] if oracle(better) > oracle(worse)]
    return rows


def paid(episode: Episode) -> float:
    """What the reasoner earned, without what gates took away."""
    taken = sum(sum(part.get(Role.REASONING, ())) for name, part in episode.reward_parts.items() if name.startswith(PREFIX))
    return sum(episode.turn_rewards.get(Role.REASONING, ())) - taken


def _is_whole(episode: Episode) -> bool:
    """Ends with the reasoner's word, and every message says something: what a pair's file may hold."""
    turns = episode.turns
    return bool(episode.score) and bool(turns) and turns[-1].role is Role.REASONING and all(turn.text.strip() for turn in turns)


def _row(chosen: Episode, rejected: Episode) -> Row:
    def said(episode: Episode) -> list[Row]:
        return [{"role": str(turn.role), "text": turn.text} for turn in episode.turns]

    return {"question": chosen.prompt.question, **chosen.prompt.fields, "chosen": said(chosen), "rejected": said(rejected)}
