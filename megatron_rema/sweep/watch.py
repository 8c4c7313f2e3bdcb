"""What a person sees of a sweep, what is noted of it, and how it is told to stop."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_rema.sweep.jobs import Job, State
from megatron_rema.sweep.record import Record, mark_finished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_EVERY_S, _SAY_EVERY_S = 1.0, 60.0
_TAIL_BYTES = 1 << 16
# A line that says what went wrong; torchrun's own account of it, which follows, says only that a child failed.
_ERROR = re.compile(r"error: |(^|[\s.])[A-Z]\w*(Error|Exception|Interrupt)\b|Segmentation fault|out of memory|Killed", re.IGNORECASE)
_LAUNCHER = re.compile(r"ChildFailedError|torch/distributed|elastic|error_file|SignalException|traceback :", re.IGNORECASE)


class Watch:
    """A line when a job begins and ends; on a terminal a bar for every job that runs, elsewhere a line a minute."""

    def __init__(self, record: Record, console: Console) -> None:
        self.record, self.console = record, console
        self.signals: list[int] = []  # received so far
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            auto_refresh=False,  # no thread: children are forked
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._looked = self._said = time.monotonic()

    @property
    def is_stopping(self) -> bool:
        return bool(self.signals)

    @property
    def is_hurried(self) -> bool:
        """Told to stop more than once."""
        return len(self.signals) > 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Signals are noted instead of ending us in the middle of something; bars are drawn."""

        def note(number: int, frame: FrameType | None) -> None:
            self.signals.append(number)

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            with self._bars:
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, job: Job, where: str, **facts: Any) -> None:
        done = steps_done(job)
        self.record.change(job, state=State.RUNNING, log=str(job.log), error=None, exit_code=None, **facts)
        self.say(f"{self._place(job)}: {f'continues at step {done}' if done else 'begins'} {where}; log {job.log}")
        if job.name not in self._tasks:
            self._tasks[job.name] = self._bars.add_task(job.name, total=job.steps, completed=done, note="")

    def ended(self, job: Job, *, seconds: float, exit_code: int, error: str) -> None:
        if exit_code == 0:
            mark_finished(job, seconds=round(seconds, 3))
            self.record.change(job, state=State.FINISHED, seconds=round(seconds, 3), pid=None)
            self.say(f"{self._place(job)}: finished after {seconds:.0f} s")
        else:
            self.record.change(job, state=State.FAILED, seconds=round(seconds, 3), exit_code=exit_code, error=error, pid=None)
            self.say(f"{self._place(job)}: FAILED with exit code {exit_code} after {seconds:.0f} s; log {job.log}: {error}")
        self._drop(job)

    def stopped(self, job: Job) -> None:
        self.record.change(job, state=State.STOPPED, pid=None)
        self._drop(job)

    def tick(self, running: Sequence[Job]) -> None:
        """Call it often."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        speaks = not self.console.is_terminal and now - self._said > _SAY_EVERY_S
        for job in running:
            if self.console.is_terminal:
                self._bars.update(self._tasks[job.name], completed=steps_done(job))
            elif speaks:
                self.say(f"{self._place(job)}: step {steps_done(job)} of {job.steps}")
        if speaks:
            self._said = now
        self._bars.refresh()

    def _place(self, job: Job) -> str:
        jobs = self.record.jobs
        return f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}"

    def _drop(self, job: Job) -> None:
        if job.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(job.name))


def steps_done(job: Job) -> int:
    """The last whole row of the run's metrics."""
    for line in reversed(tail(job.folder / "metrics.jsonl", 0).split("\n")):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # torn at either end
            continue
    return 0


def last_error(log: Path, begin: int, *others: Path) -> str:
    """The last line from byte ``begin`` on that says what went wrong, or such a line of ``others``; else the last line at all. A run's own
    message, in whichever of the logs, comes before any other: a node's launcher may only complain that another one is gone."""
    logs = [[line.strip() for line in text.splitlines() if line.strip()] for text in (tail(log, begin), *(tail(o, 0) for o in others))]
    for tells in (lambda line: line.startswith("error: "), _ERROR.search):
        for lines in logs:
            if telling := [line for line in lines if tells(line) and not _LAUNCHER.search(line)]:
                return telling[-1][:500]
    return (logs[0] or ["no output"])[-1][:500]


def tail(file: Path, begin: int) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as content:
        content.seek(max(begin, file.stat().st_size - _TAIL_BYTES))
        return content.read().decode(errors="replace")
