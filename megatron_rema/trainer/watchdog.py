"""Names what hung: after ``trainer.watchdog_seconds`` in which NO rank got on, one report says where every rank waits, and the job ends.

Progress is a beat of `parallel.pulse` on the main thread: a phase that begins or ends, an engine step, a microbatch, a verdict, a tensor
loaded or sent. A rank that waits for another one that still gets on is no hang, however long it waits.

Two daemon threads a rank. One talks, by way of the launcher's store and over a connection of its own:

pulse/R      beats of rank R and where it is, each interval and when it moved. As long as R gets on, this and one question is all
alarm        set by a rank that got on with nothing for the limit and saw the same of all others; every rank then tells
statement/R  where R waits, since when, in which collective, its Python stack; recorder/R: torch's flight recorder
reported     set by the one rank that collected them all (the first to claim it), printed them and wrote run_dir/hang.json

then all end with EXIT_CODE, and torchrun, with restarts left, starts the workers again. A rank that does not tell is named as silent, with
its last pulse. The other thread keeps watch over the first: where the store itself does not answer, each rank reports alone.

Clocks of different hosts are never compared: how long another rank has stood still is measured by whoever watches it, from when it looked
first. It looks once it stands still itself, after a tenth of the limit; so a hang is named between 1 and 1.1 limits after the last beat.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from megatron_rema.parallel.pulse import PULSE, Pulse
from megatron_rema.trainer.hang import EXIT_CODE, NAMED, Others, Statement, latest_entries, report_lines, waits_in, with_recorder
from megatron_rema.trainer.restart import CONFIG

COLLECTIVE_TIMEOUT = timedelta(days=1)  # of the backends where the watchdog is on: a rank may wait long for one that still gets on
REPORT = "hang.json"
MOVED_S = 1.0  # a rank says that it is in another phase after so long at most: the last word of one that is stopped is about as old
STACK_LINES = 8  # printed; the file has all
ANSWER_S = 5.0  # beyond two intervals: for a rank to tell, once asked


def interval_s(limit_s: float) -> float:
    """Between two words of a rank."""
    return min(limit_s / 20, 30.0)


class Watchdog:
    """``leave`` ends the process; a test gives another."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        *,
        limit_s: float,
        folder: str | Path,
        pulse: Pulse = PULSE,
        main_thread: int | None = None,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store = dist.PrefixStore("watchdog", store.clone())  # a connection of its own: another thread's wait must not hold it up
        self._rank, self._world, self._limit_s, self._folder, self._pulse = rank, world, limit_s, Path(folder), pulse
        self._main_thread = main_thread or threading.main_thread().ident
        self._leave, self._host = leave, socket.gethostname()
        self._interval_s = interval_s(limit_s)
        self._others, self._idle_s = Others(), dict.fromkeys(range(world), 0.0)
        self._words: dict[int, dict[str, Any]] = {}
        self._stopped = threading.Event()
        self._heard_at = self._ticked_at = self._awake_at = time.monotonic()  # the store answered; see _idle
        self._threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in (self._talk, self._keep_watch)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)  # a store that does not answer must not keep a run from ending
        faulthandler.cancel_dump_traceback_later()

    def _talk(self) -> None:
        said, said_at = None, 0.0
        while not self._stopped.wait(min(self._interval_s, MOVED_S)):
            here, now = (self._pulse.step, self._pulse.place), time.monotonic()
            if here == said and now - said_at < self._interval_s:
                continue
            said, said_at = here, now
            # Python code cannot run where something holds the interpreter's lock for good; this timer can, and shows the stack
            faulthandler.dump_traceback_later(self._limit_s, file=sys.__stderr__)
            with suppress(RuntimeError):  # of the store (DistStoreError): it is not heard, which the other thread watches
                self._round()
                self._heard_at = time.monotonic()
        with suppress(RuntimeError):
            self._publish(has_left=True)

    def _keep_watch(self) -> None:
        while not self._stopped.wait(self._interval_s):
            idle_s = self._idle()
            self._ticked_at = time.monotonic()
            unheard_s = self._ticked_at - max(self._heard_at, self._awake_at)
            if idle_s >= self._limit_s and unheard_s >= self._limit_s / 2 + ANSWER_S:
                unheard = f"the launcher's store has not answered for {unheard_s:.1f} s: each rank reports alone"
                self._report([self._testify()], {}, name=f"hang_rank_{self._rank}.json", note=unheard)
                self._end()

    def _idle(self) -> float:
        """Seconds in which this rank could have got on and did not. The thread that keeps watch waits for nobody: where it did not come
        round, the whole process was stopped (a suspended job, a paused machine), and what was before counts no more."""
        now = time.monotonic()
        if now - self._ticked_at > self._limit_s / 2:
            self._awake_at, self._others = now, Others()
        return now - max(self._pulse.beat_at, self._awake_at)

    def _round(self) -> None:
        self._publish()
        if not self._store.check(["alarm"]):
            if self._idle() < self._limit_s / 10:
                return  # the usual case
            self._look()
            if min(self._idle_s.values()) < self._limit_s:
                return
            self._store.set("alarm", str(self._rank))
        self._tell()

    def _publish(self, *, has_left: bool = False) -> None:
        pulse = self._pulse
        word = {"beats": pulse.beats, "idle_s": self._idle(), "place": pulse.place, "step": pulse.step, "has_left": has_left}
        word |= {"host": self._host, "pid": os.getpid()}
        self._store.set(f"pulse/{self._rank}", json.dumps(word))

    def _look(self) -> None:
        keys = [f"pulse/{rank}" for rank in range(self._world)]
        there = list(range(self._world)) if self._store.check(keys) else [r for r, key in enumerate(keys) if self._store.check([key])]
        self._words = {r: json.loads(text) for r, text in zip(there, self._store.multi_get([keys[r] for r in there]), strict=True)}
        now = time.monotonic()
        self._idle_s = {rank: self._others.idle_s(rank, self._words.get(rank), now) for rank in range(self._world)}

    def _tell(self) -> None:
        """Say where this rank is; the first to claim it gathers what all say and reports. Ends the process."""
        faulthandler.cancel_dump_traceback_later()
        store, rank = self._store, self._rank
        gathers = store.add("claims", 1) == 1
        own = self._testify()
        store.set(f"statement/{rank}", json.dumps(asdict(own)))
        store.set(f"recorder/{rank}", _flight_recorder())
        wait_s = 2 * self._interval_s + ANSWER_S
        if not gathers:
            if not self._await([f"reported/{EXIT_CODE}"], 2 * wait_s):
                self._report(
                    [own], {}, name=f"hang_rank_{rank}.json", note="the rank that gathers the report did not: this is one rank's own"
                )
            self._end()
            return
        self._look()
        self._await([f"recorder/{r}" for r in range(self._world) if not self._words.get(r, {}).get("has_left")], wait_s)
        told = {r: self._told(f"statement/{r}") for r in range(self._world)}
        recorders = {r: self._told(f"recorder/{r}") for r in range(self._world)}
        statements = [self._silent(r) if word is None else Statement(**word) for r, word in told.items()]
        self._report(statements, recorders, name=REPORT)
        store.set(f"reported/{EXIT_CODE}", "")
        self._end()

    def _testify(self) -> Statement:
        now, pulse = time.monotonic(), self._pulse
        frame = sys._current_frames().get(self._main_thread)
        stack = traceback.extract_stack(frame) if frame is not None else []
        collective, where = waits_in(stack)
        return Statement(
            self._rank,
            pulse.place,
            pulse.step,
            now - pulse.beat_at,
            phase_s=now - pulse.phase_at,
            host=self._host,
            pid=os.getpid(),
            collective=collective,
            where=where,
            stack=tuple(f"{frame.filename}:{frame.lineno} {frame.name}: {frame.line}" for frame in stack),
        )

    def _silent(self, rank: int) -> Statement:
        word = self._words.get(rank, {"place": "no phase it told of", "step": 0, "has_left": False, "host": "", "pid": 0})
        place, left = {key: word[key] for key in ("place", "step", "host", "pid")}, word["has_left"]
        return Statement(rank, **place, idle_s=0.0 if left else self._idle_s[rank], is_silent=not left, has_left=left)

    def _told(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _await(self, keys: list[str], wait_s: float) -> bool:
        give_up = time.monotonic() + wait_s
        while not self._store.check(keys):
            self._heard_at = time.monotonic()
            if self._heard_at > give_up:
                return False
            time.sleep(0.05)
        return True

    def _report(self, statements: list[Statement], recorders: Mapping[int, Any], *, name: str, note: str = "") -> None:
        """Print, and write into the run folder once it is a run's: a report alone in it would look like another run's to a restart."""
        named = [with_recorder(one, recorders.get(one.rank)) for one in statements]
        lines = report_lines(named, self._limit_s) + ([f"  {note}"] if note else [])
        if (self._folder / CONFIG).exists():
            rows = [{**asdict(one), "flight_recorder": latest_entries(recorders.get(one.rank))} for one in named]
            content = {
                "time": datetime.now(UTC).isoformat(),
                "watchdog_seconds": self._limit_s,
                "note": note,
                "summary": lines,
                "ranks": rows,
            }
            partial = self._folder / f".{name}.partial"
            try:
                partial.write_text(json.dumps(content, indent=1) + "\n")
                partial.replace(self._folder / name)
                lines.append(f"  stacks and flight recorders: {self._folder / name}")
            except OSError as error:  # a full disk must not keep the job from ending
                lines.append(f"  {self._folder / name} could not be written: {error.strerror}")
        first_with = {tuple(one.stack[-STACK_LINES:]): one.rank for one in reversed(named) if one.stack}
        for stack, rank in sorted(first_with.items(), key=lambda item: item[1])[:NAMED]:
            lines += [f"  stack of rank {rank}:", *(f"    {line}" for line in stack)]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _end(self) -> None:
        sys.stdout.flush()
        self._stopped.set()
        self._leave(EXIT_CODE)


@contextmanager
def watching(store: dist.Store, rank: int, world: int, *, limit_s: float, folder: str | Path) -> Iterator[None]:
    """The watchdog of this rank inside; ``limit_s`` 0: none."""
    if not limit_s:
        yield
        return
    dog = Watchdog(store, rank, world, limit_s=limit_s, folder=folder)
    PULSE.beat()
    dog.start()
    try:
        yield
    finally:
        dog.stop()


def _flight_recorder() -> str:
    """JSON of what torch kept of this process's last collectives: NCCL's and gloo's; TORCH_FR_BUFFER_SIZE says how many (0: none)."""
    dump = getattr(c10d, "_dump_fr_trace_json", None)  # not in every torch that we allow
    return "null" if dump is None else dump(includeCollectives=True, onlyActive=False).decode()
