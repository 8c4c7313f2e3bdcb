"""Vetoes: an episode that shows a named mechanism earns nothing, whatever its worth. Pure: episodes in, rewards changed, metrics out.

A gate is data: ``ambiguous_answer``, ``plan_leak``, ``phrase:TEXT``, or ``module:name`` of a predicate of the user's.
Source of vetoes beside separately normalised rewards: GDPO arXiv:2601.05242 (conditioned rewards); docs/integrity.md, "Mitigations".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rema.reward.answers import is_ambiguous
from megatron_rema.reward.behaviour import leaks_first
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.phrases import has_phrase
from megatron_rema.types import Episode, Role

PREFIX = "gate/"  # of a gate's component in Episode.reward_parts
_PHRASE = "phrase:"


@dataclass(frozen=True)
class Gate:
    """``predicate`` is true of an episode that is vetoed: then none of ``roles`` earns more than 0."""

    name: str  # in metrics and reward parts: without white space and "/"
    description: str
    roles: tuple[Role, ...]
    predicate: Callable[[Episode], bool]


def gate_of(text: str) -> Gate:
    """The gate behind an entry of ``reward.gates``. Raises ValueError naming what is wrong with it.

    ambiguous_answer   the reasoner's last message can be read in several ways: differing boxes, or alternatives in one
    plan_leak          the meta-thinker is the first to state the answer; only its own reward is vetoed
    phrase:TEXT        some message of either role holds TEXT, word by word and mark by mark (reward/phrases.py); case does not count
    module:name        a function Episode -> bool; it must say the same on every rank
    """
    everyone = tuple(Role)
    if text == "ambiguous_answer":
        return Gate(text, "the last message's answer can be read in several ways", everyone, _is_ambiguous)
    if text == "plan_leak":
        return Gate(text, "the meta-thinker is the first to state the answer", (Role.META_THINKING,), leaks_first)
    name = re.sub(r"[\s/]+", "_", text.strip())
    if text.startswith(_PHRASE):
        phrase = text.removeprefix(_PHRASE)
        if not phrase.strip():
            raise ValueError(f"reward.gates holds {text!r}; phrase: needs a text to look for: give phrase:TEXT.")
        return Gate(name, f"a message holds {phrase.strip()!r}", everyone, _holder(phrase))
    if ":" not in text:
        raise ValueError(
            f"reward.gates holds {text!r}; a gate is ambiguous_answer, plan_leak, phrase:TEXT or module:name of a function Episode -> bool."
        )
    return Gate(name, f"{text} says so", everyone, named_function("reward.gates", text))


def gates_of(texts: Sequence[str]) -> list[Gate]:
    """All gates of a run, in order. Raises ValueError for two of one name."""
    gates = [gate_of(text) for text in texts]
    names = [gate.name for gate in gates]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reward.gates holds {name!r} twice, which could not be told apart in metrics: remove one.")
    return gates


def apply_gates(episodes: Sequence[Episode], gates: Sequence[Gate]) -> dict[str, float]:
    """R = min(0, R) of each role that a gate concerns, where its predicate is true; what that takes away is component ``gate/NAME``.

    In place; ``episodes`` are rewarded. A penalty stays. A role that would have earned nothing anyway gets a component of 0.0: that it is
    there says that the gate closed. Returns ``reward/gate/NAME_frac``, over episodes in which a role concerned is rewarded (counterfactual
    ones left out).
    """
    metrics = {}
    for gate in gates:
        closed = []
        for episode in episodes:
            roles = [role for role in gate.roles if role in episode.turn_rewards]
            if not roles:
                continue
            vetoed = bool(gate.predicate(episode))
            if not episode.is_counterfactual:
                closed.append(vetoed)
            for role in roles if vetoed else ():
                total = sum(episode.turn_rewards[role])
                episode.add_reward(PREFIX + gate.name, role, min(0.0, total) - total)
        if closed:
            metrics[f"reward/{PREFIX}{gate.name}_frac"] = sum(closed) / len(closed)
    return metrics


def _is_ambiguous(episode: Episode) -> bool:
    messages = episode.turns_of(Role.REASONING)
    return bool(messages) and is_ambiguous(messages[-1].text)


def _holder(phrase: str) -> Callable[[Episode], bool]:
    wanted = phrase.lower()
    return lambda episode: any(has_phrase(turn.text.lower(), wanted) for turn in episode.turns)
