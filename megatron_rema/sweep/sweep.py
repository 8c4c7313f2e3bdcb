"""A sweep told in order: take the folder, skip what is finished, run the rest, compare them, say what failed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from megatron_rema.config import RunConfig
from megatron_rema.report.compare import rich_tables
from megatron_rema.report.compare_figure import write_comparison
from megatron_rema.sweep.comparison import comparison_of
from megatron_rema.sweep.jobs import Job, State, make_jobs
from megatron_rema.sweep.record import Record, held, is_finished
from megatron_rema.sweep.watch import Watch

FAILED_EXIT_CODE = 1
_LOCK_WAIT_S = 45.0  # torchrun gives its ranks 30 s to end


class Queue(Protocol):
    """Where jobs run."""

    world_size: int  # ranks of a job

    def describe(self) -> str: ...

    def run(self, jobs: Sequence[Job], watch: Watch, *, lock: int) -> None: ...


def sweep(door: str, chosen: Sequence[tuple[Sequence[str], RunConfig]], queue: Queue) -> int:
    """Run (overrides, configuration) of every job that is not finished; the exit code of the whole: 0, 1 (a job failed), 128 + signal.

    Raises ConfigError for settings that no job could run with, and for a folder that is not this sweep's.
    """
    folder, jobs = make_jobs(door, chosen, world_size=queue.world_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700 if chosen[0][1].private_run_dir else 0o777, exist_ok=True)
    with held(folder, wait_s=_LOCK_WAIT_S) as lock:
        record = Record(folder, jobs)
        record.load()
        left = [job for job in jobs if not is_finished(job)]
        for job in jobs:
            record.facts[job.name]["state"] = State.WAITING if job in left else State.FINISHED
        record.write()
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
        watch = Watch(record, console)
        watch.say(f"sweep {folder}: {len(jobs)} jobs of {door}, {len(jobs) - len(left)} finished before; {queue.describe()}")
        with watch.at_work():
            queue.run(left, watch, lock=lock)
        return _close(watch, folder)


def _close(watch: Watch, folder: Path) -> int:
    """What has become of it, and the exit code."""
    record = watch.record
    failed = [job for job in record.jobs if record.state(job) is State.FAILED]
    if watch.is_stopping:
        finished = sum(record.state(job) is State.FINISHED for job in record.jobs)
        watch.say(f"sweep {folder} stopped with {finished} of {len(record.jobs)} jobs finished; the same command continues it")
        return 128 + watch.signals[0]
    _compare(watch, folder)
    for job in failed:
        facts = record.facts[job.name]
        print(f"error: job {job.name} ended with exit code {facts['exit_code']}; {job.log}: {facts['error']}", file=sys.stderr, flush=True)
    return FAILED_EXIT_CODE if failed else 0


def _compare(watch: Watch, folder: Path) -> None:
    """The one table and the one figure."""
    jobs = watch.record.jobs
    if not any((job.folder / name).is_file() for job in jobs for name in ("metrics.jsonl", "evaluations.jsonl")):
        return  # all have failed before their first step, which is said next
    comparison, missing = comparison_of([folder])
    for table in rich_tables(comparison):
        watch.console.print(table)
    if missing:
        watch.say(f"nothing to compare of {', '.join(missing)}")
    for file in write_comparison(comparison, folder):
        watch.say(f"comparison: {file}")
