"""What a sweep is made of: one job for every combination of values, each with a run folder named after its values.

Nothing here knows Hydra or torch: overrides are texts, configurations are the typed ones of ``config/``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_rema.config import ConfigError, RunConfig, as_mapping, check
from megatron_rema.report.run_folder import flat

# Not settings of the run's computation: a sweep that is continued differs from itself in these.
NOT_COMPARED = ("resume", "resume_from")
OWNED = ("run_dir", "resume")  # keys that the sweep sets for each job
_LONGEST_VALUE = 40  # characters of a value in a folder's name, its last ones: paths differ there
_PLAIN = re.compile(r"[A-Za-z0-9_./@%+-]+")  # what Hydra reads as it stands


class State(StrEnum):
    """Of a job. What is no longer true after a kill (RUNNING) is found out from the run folders when the sweep starts again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Job:
    """One run of the sweep."""

    name: str  # of its folder
    door: str  # train, sft, ...
    overrides: tuple[str, ...]  # as the command line has them, without OWNED
    settings: Mapping[str, Any]  # the resolved configuration, keys joined by dots, without NOT_COMPARED
    folder: Path  # run_dir
    log: Path
    steps: int

    @property
    def arguments(self) -> list[str]:
        """What the front door is given. A folder that holds something is continued from its latest checkpoint."""
        resume = ["resume=true"] if self.folder.exists() and any(self.folder.iterdir()) else []
        return [*self.overrides, f"run_dir={quoted(str(self.folder))}", *resume]


def make_jobs(door: str, chosen: Sequence[tuple[Sequence[str], RunConfig]], *, world_size: int) -> tuple[Path, list[Job]]:
    """The sweep's folder, and a job for each (overrides, configuration).

    The folder is the configurations' ``run_dir``, under which every job gets a run folder of its own.
    Raises ConfigError where two jobs would have different sweep folders, where a job's settings break a rule, and for what no sweep can do.
    """
    folders = {config.run_dir for _, config in chosen}
    if len(folders) != 1:
        raise ConfigError(
            f"run_dir differs between the jobs of the sweep ({', '.join(sorted(folders))}); it is the sweep's folder, in which every job "
            "gets its own: give one run_dir=FOLDER."
        )
    folder = Path(folders.pop())
    kept = [tuple(o for o in overrides if key_of(o) not in OWNED) for overrides, _ in chosen]
    names = names_of(kept)
    jobs = []
    for name, overrides, (_, config) in zip(names, kept, chosen, strict=True):
        if config.resume_from is not None:
            raise ConfigError(
                f"resume_from is {config.resume_from} in a sweep; each of its jobs continues from its own latest checkpoint, by the same "
                "command: remove resume_from."
            )
        if config.score_file is not None:
            raise ConfigError(
                f"score_file is {config.score_file} in a sweep; scoring writes no run folder: score one file at a time, without -m."
            )
        config = replace(config, run_dir=str(folder / name))
        try:
            check(config, world_size)
        except ConfigError as error:
            raise ConfigError(f"job {name}: {error}") from error
        settings = {key: value for key, value in flat(as_mapping(config)).items() if key not in NOT_COMPARED}
        jobs.append(Job(name, door, overrides, settings, folder / name, folder / "logs" / f"{name}.log", config.trainer.steps))
    return folder, jobs


def key_of(override: str) -> str:
    """``+a.b=3``, ``a.b=3`` and ``~a.b`` -> ``a.b``."""
    return override.split("=", 1)[0].lstrip("+~")


def names_of(overrides: Sequence[Sequence[str]]) -> list[str]:
    """``lr-0.001__seed-0``: the values of the keys that are not the same in all jobs; short keys where they say enough. No two are equal.

    Without ``=`` and commas: a path with these needs quotes on Hydra's command line.
    """
    names = ["__".join(f"{_plain(key)}-{_plain(value)}" for key, value in own.items()) or "job" for own in swept_values(overrides)]
    again = Counter(names)
    return [name if again[name] == 1 else f"{number:03d}_{name}" for number, name in enumerate(names)]


def swept_values(overrides: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Of each job the keys that are not the same in all, as short as they can be, and their values."""
    values = [{key_of(o): o.split("=", 1)[1] if "=" in o else "" for o in own} for own in overrides]
    keys = dict.fromkeys(key for own in values for key in own)
    swept = [key for key in keys if len({own.get(key) for own in values}) > 1]
    last = Counter(key.rsplit(".", 1)[-1] for key in swept)
    labels = {key: key.rsplit(".", 1)[-1] if last[key.rsplit(".", 1)[-1]] == 1 else key for key in swept}
    return [{labels[key]: own[key] for key in swept if key in own} for own in values]


def quoted(value: str) -> str:
    """``value`` as Hydra's grammar reads it back."""
    if _PLAIN.fullmatch(value) and "/" in value:  # without a slash it may be a number, or null
        return value
    # Hydra takes a backslash for itself only where it stands before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _plain(text: str) -> str:
    """Characters that need no quotes in a shell, in Hydra and in a file name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-")[-_LONGEST_VALUE:] or "none"
