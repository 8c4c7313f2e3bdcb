"""Where this process is and when it last got on: what the watchdog (trainer/watchdog.py) publishes. A beat is two assignments; nothing is
sent, and no lock is taken.

Whoever does long work in pieces beats once a piece: an engine step, a microbatch, a tensor that is loaded, a verdict.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """One process's progress. Written by its main thread alone, read by any."""

    def __init__(self) -> None:
        self.step = 0  # the step at work, 0 before the first
        self.beats = 0
        self.beat_at = self.phase_at = time.monotonic()
        self.place = "the start"  # names of the phases at work, outermost first; between two: the one that ended last
        self._phases: list[str] = []

    def beat(self) -> None:
        self.beat_at = time.monotonic()
        self.beats += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        self._move(" / ".join(self._phases))
        try:
            yield
        finally:
            ended = " / ".join(self._phases)
            self._phases.pop()
            self._move(" / ".join(self._phases) or f"after {ended}")

    def _move(self, place: str) -> None:
        self.beat()
        self.place, self.phase_at = place, self.beat_at


PULSE = Pulse()
beat = PULSE.beat
