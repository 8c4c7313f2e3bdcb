"""A job's launcher as a child process, and its end: nothing that it started is left running.

torchrun puts every rank into a session of its own, so no process group holds them all: descendants are remembered while they can be seen.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1


def torchrun(door: str, arguments: Sequence[str], *rendezvous: str) -> list[str]:
    """The command line of one launcher."""
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", f"megatron_rema.{door}", *arguments]


class Child:
    """A launcher with its output in ``log``. It ends when we do, however we end."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str], inherited: Sequence[int] = ()) -> None:
        """``inherited``: descriptors that the launcher keeps open (its ranks do not)."""
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as out:
            self.log_begin = out.tell()
            out.write(f"$ {shlex.join(command)}\n".encode())
            out.flush()
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the sweep, which ends its children in order
                pass_fds=inherited,
                preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
            )
        self._began = self._looked = time.monotonic()
        self._family: set[psutil.Process] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def poll(self) -> int | None:
        """Exit code, once the launcher and everything that it started have ended."""
        if self.process.poll() is None:
            if time.monotonic() - self._looked > 1.0:
                self.remember()
            return None
        kill(self._family)
        return self.process.returncode

    def remember(self) -> None:
        self._looked = time.monotonic()
        try:
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return  # poll sees its exit code

    def kill(self) -> None:
        self.remember()
        self.process.kill()
        self.process.wait()
        kill(self._family)


def end(children: Sequence[Child], *, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
    """SIGTERM to all, SIGKILL for what is left after ``grace_s`` or when ``hurry()`` says so."""
    for child in children:
        child.remember()
        child.process.terminate()
    deadline = time.monotonic() + grace_s
    while any(child.poll() is None for child in children) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()


def kill(processes: set[psutil.Process]) -> None:
    alive = [process for process in processes if process.is_running()]  # also tells a process from a later one of the same number
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=10)


def _end_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: SIGTERM when its parent dies, be it by kill -9. The library is loaded before the fork."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask
