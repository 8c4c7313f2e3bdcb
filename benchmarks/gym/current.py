"""The world that this process trains in: what ``reward.function`` and ``integrity.oracle`` name in the gym's runs.

A setting of the trainer is a string; a world's direction and its learned reward model are not: `use` says before training which it is.
"""

from __future__ import annotations

from benchmarks.gym.worlds import Setting
from megatron_rema.types import Episode

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
    global oracle_calls
    oracle_calls += 1
    return setting().gold(episode)
