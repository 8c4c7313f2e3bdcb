"""What a person sees while a run works: rank 0 draws one live line on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reporter:
    """Phase, count, rate, reward and time left. Silent on every rank but the first."""

    def __init__(self, *, speaks: bool) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        self._bar: Progress | None = None
        self._steps = None
        self._phase = None
        self.seconds: dict[str, float] = {}  # time spent per phase since ``restart_clock``

    @contextmanager
    def run(self, title: str, *, total: int, done: int = 0) -> Iterator[None]:
        """The whole run: a bar of steps, and under it the phase at work."""
        live = self.console.is_terminal and not self.console.quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not live,
        )
        with self._bar:
            self._steps = self._bar.add_task(title, total=total, completed=done, note="")
            yield
        self._bar = self._steps = None

    @contextmanager
    def phase(self, name: str, *, total: int | None = None) -> Iterator[None]:
        """Time one phase of a step; ``advance`` moves its bar."""
        begin = time.perf_counter()
        if self._bar is not None:
            self._phase = self._bar.add_task(f"  {name}", total=total, note="")
        try:
            yield
        except Exception as error:
            error.add_note(f"in phase {name}")
            raise
        finally:
            if self._bar is not None and self._phase is not None:
                self._bar.remove_task(self._phase)
            self._phase = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def advance(self, completed: int, note: str = "") -> None:
        if self._bar is not None and self._phase is not None:
            self._bar.update(self._phase, completed=completed, note=note)

    def step_done(self, step: int, note: str) -> None:
        if self._bar is not None and self._steps is not None:
            self._bar.update(self._steps, completed=step, note=note)
        self.say(f"step {step:>4}  {note}")

    def restart_clock(self) -> None:
        self.seconds = {}

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
