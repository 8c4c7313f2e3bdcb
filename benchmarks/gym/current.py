"""The world that this process trains in: what ``reward.function`` and ``integrity.oracle`` name in the gym's runs.

A setting of the trainer is a string; a world's direction and its learned reward model are not: `use` says before training which it is.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from benchmarks.gym import task
from benchmarks.gym.worlds import TWIN, Setting
from megatron_rema.types import Episode, Prompt

_setting: Setting | None = None
oracle_calls = 0


def use(setting: Setting) -> None:
    global _setting, oracle_calls
    _setting, oracle_calls = setting, 0


def setting() -> Setting:
    if _setting is None:
        raise ValueError("benchmarks.gym.current has no world yet; call use(setting) before training (benchmarks/integrity.py does).")
    return _setting


def proxy(episode: Episode) -> dict[str, float]:
    return setting().proxy(episode)


def gold(episode: Episode) -> float:
    """nan: no verdict. Nobody can say what a problem drawn anew is worth where the key is what counts (the twin of a world with a key)."""
    global oracle_calls
    oracle_calls += 1
    here = setting()
    if here.arm == TWIN and here.world.problems is not None and episode.prompt.prompt_id.startswith("renewed/"):
        return math.nan
    return here.gold(episode)


def renewed(prompt: Prompt, rng: random.Random) -> Prompt:
    """The problem drawn anew, hard or easy as it was, with an answer of its own (a key's mistakes are not renewed)."""
    question, answer = setting().world.draw(rng, hard=task.is_hard(prompt.question))
    return replace(prompt, question=question, answer=str(answer))
