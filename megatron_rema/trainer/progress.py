"""What a person sees while a run works: rank 0 draws one live line on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_rema.parallel.pulse import PULSE

if TYPE_CHECKING:
    from collections.abc import Iterator


class Reporter:
    """Phase, count, rate, reward and time left. Silent on every rank but the first; on every rank what is reported is progress to the
    watchdog."""

    def __init__(self, *, speaks: bool) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
        self._bar: Progress | None = None
        self._steps = None
        self._phase = None
        self.seconds: dict[str, float] = {}  # time spent per phase since ``begin_step``

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
    def phase(self, name: str, *, total: int | None = None, draws: bool = True) -> Iterator[None]:
        """Time one phase of a step; ``advance`` moves its bar. Phases may lie in one another. ``draws``: it has a bar."""
        begin, outer = time.perf_counter(), self._phase
        own = self._bar.add_task(f"  {name}", total=total, note="") if self._bar is not None and draws else None
        self._phase = own
        try:
            with PULSE.phase(name):
                yield
        except Exception as error:
            error.add_note(f"in phase {name}")
            raise
        finally:
            if self._bar is not None and own is not None:
                self._bar.remove_task(own)
            self._phase = outer
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def advance(self, completed: int, note: str = "") -> None:
        PULSE.beat()
        if self._bar is not None and self._phase is not None:
            self._bar.update(self._phase, completed=completed, note=note)

    def step_done(self, step: int, note: str) -> None:
        if self._bar is not None and self._steps is not None:
            self._bar.update(self._steps, completed=step, note=note)
        self.say(f"step {step:>4}  {note}")

    def begin_step(self, step: int) -> None:
        """Step ``step`` begins, and its clock."""
        PULSE.step = step
        PULSE.beat()
        self.seconds = {}

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
