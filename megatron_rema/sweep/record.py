"""``sweep.json``: the jobs of a sweep, their overrides and settings, and how far each has come. Written whole or not at all.

It is also what says that a folder is this sweep's: the same command continues it, another one is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_rema.config import ConfigError
from megatron_rema.report.run_folder import flat
from megatron_rema.sweep.jobs import NOT_COMPARED, Job, State

RECORD, LOCK = "sweep.json", ".lock"
FINISHED = "finished.json"  # in a run folder: written when its job has ended well
_ABSENT = "(absent)"


class Record:
    """The state of every job, on disk after each change."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder = folder
        self.jobs = list(jobs)
        self.facts: dict[str, dict[str, Any]] = {job.name: {"state": State.WAITING} for job in jobs}

    def load(self) -> None:
        """What an earlier start of this sweep has left. Raises ConfigError where the folder holds something else."""
        file = self.folder / RECORD
        if not file.exists():
            strangers = sorted(path.name for path in self.folder.iterdir() if path.name != LOCK)
            if strangers:
                raise ConfigError(
                    f"run_dir {self.folder} is not empty and no sweep's folder (it holds {strangers[0]} and no {RECORD}); under -m it is "
                    "the folder in which every job gets its own: choose another run_dir."
                )
            return
        try:
            kept = json.loads(file.read_text())
            rows = {row["name"]: row for row in kept["jobs"]}
            before = {name: {"door": kept["door"], **kept["settings"], **row["settings"]} for name, row in rows.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is damaged ({type(error).__name__}: {error}); restore it, or choose another run_dir.") from error
        now = {job.name: {"door": job.door, **job.settings} for job in self.jobs}
        for name in {**now, **before}:
            if name not in before or name not in now:
                there = "has no job" if name not in before else "has a job more,"
                self._refuse(f"{there} {name!r}")
            if found := difference(before[name], now[name]):
                self._refuse(f"was begun with {found[0]}={found[1]!r} (job {name}), and {found[0]} is {found[2]!r} now")
        for name, row in rows.items():
            self.facts[name] = {key: value for key, value in row.items() if key not in ("name", "overrides", "settings")}

    def _refuse(self, reason: str) -> None:
        raise ConfigError(
            f"run_dir {self.folder} is the folder of another sweep: it {reason}; the same command continues a sweep: give that one, or "
            "choose another run_dir."
        )

    def change(self, job: Job, **facts: Any) -> None:
        """Note ``facts`` (None takes one away) and write."""
        merged = {**self.facts[job.name], **facts}
        self.facts[job.name] = {key: value for key, value in merged.items() if value is not None}
        self.write()

    def write(self) -> None:
        first, *others = [job.settings for job in self.jobs]
        common = {key: value for key, value in first.items() if all(key in own and own[key] == value for own in others)}
        rows = [
            {
                "name": job.name,
                **self.facts[job.name],
                "overrides": list(job.overrides),
                "settings": {key: value for key, value in job.settings.items() if key not in common},
            }
            for job in self.jobs
        ]
        write_whole(self.folder / RECORD, {"door": self.jobs[0].door, "jobs": rows, "settings": common})

    def state(self, job: Job) -> State:
        return State(self.facts[job.name]["state"])


def is_finished(job: Job) -> bool:
    """Whether the job has ended well before. Raises ConfigError where its run folder holds a run of other settings."""
    file = job.folder / "config.yaml"
    if file.exists():
        kept = flat(yaml.safe_load(file.read_text()) or {})
        if found := difference({key: value for key, value in kept.items() if key not in NOT_COMPARED}, job.settings):
            raise ConfigError(
                f"run folder {job.folder} was written with {found[0]}={found[1]!r}, and {found[0]} is {found[2]!r} in this sweep; move the "
                "folder away, or choose another run_dir."
            )
    return file.exists() and (job.folder / FINISHED).exists()


def mark_finished(job: Job, **facts: Any) -> None:
    write_whole(job.folder / FINISHED, facts)


def difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(key, before, now) of the first key whose values differ."""
    for key in {**before, **now}:
        if before.get(key, _ABSENT) != now.get(key, _ABSENT):
            return key, before.get(key, _ABSENT), now.get(key, _ABSENT)
    return None


def write_whole(file: Path, content: Any) -> None:
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as out:
        out.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


@contextmanager
def held(folder: Path, *, wait_s: float) -> Iterator[int]:
    """The folder for one sweep at a time; yields a descriptor that children inherit: the folder is free when the last of them has ended.

    Raises ConfigError when another one holds it for longer than ``wait_s`` (children of a sweep that was killed need a moment to end).
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 100, 0).decode(errors="replace").strip() or "unknown"
                    raise ConfigError(
                        f"run_dir {folder} is in use by another sweep or by its jobs (begun by process {holder}); wait for it, end it, or "
                        "choose another run_dir."
                    ) from None
                time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)
