"""A stand-in for torchrun's agent that pays the imports once: it forks ranks which go through the real front doors.

Like the agent it hosts the store, sets the workers' environment, ends the other workers when one fails (SIGTERM, then SIGKILL) and reports
the first that failed. Unlike it, it writes every rank's output to a file and never starts workers again. ``supervised=False`` leaves the
others alone: they are then what ranks of another node are to a node that lost its agent, and must end by themselves.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import psutil
import tqdm

GRACE_S = 5.0  # between SIGTERM and SIGKILL
tqdm.tqdm.monitor_interval = 0  # it would be a thread, and forks want none
MARK = "MEGATRON_REMA_FAULT_CASE"  # in the environment of whatever the ranks start


@dataclass
class Ended:
    """How a job ended."""

    codes: list[int | None]  # exit code of each rank; minus the signal's number; None: ended by the launcher
    seconds: float  # of the whole job
    hung: list[int]  # ranks that were still there at the limit
    struck_s: float | None = None  # from the start until the fault struck
    outputs: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """What the launcher would exit with: 0, or the code of the first rank that failed."""
        return next((code for code in self.codes if code not in (0, None)), 1 if None in self.codes else 0)

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def detected_s(self) -> float | None:
        """From the fault to the end of the job."""
        return None if self.struck_s is None else self.seconds - self.struck_s


class Job:
    """``world`` ranks of one front door on this machine."""

    def __init__(
        self,
        door: ModuleType,
        overrides: Sequence[str],
        *,
        logs: Path,
        world: int = 2,
        arm: Callable[[int], None] | None = None,
        supervised: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:
        import torch.distributed as dist

        assert threading.active_count() == 1, f"forking with threads at work: {threading.enumerate()}"
        logs.mkdir(parents=True, exist_ok=True)
        self._supervised = supervised
        self._logs = [logs / f"rank_{rank}.txt" for rank in range(world)]
        self.struck = logs / "struck"  # written by whoever injects the fault, at that moment
        self.struck.unlink(missing_ok=True)
        self.began = time.monotonic()
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            MARK: str(logs),
            **(environment or {}),
        }
        self.pids: list[int] = []
        self._codes: dict[int, int | None] = {}
        self._told: float | None = None  # when the others were asked to end
        self._hung: list[int] = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                listener.close()
                _life({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, door, overrides, self._logs[rank], rank, arm)
            self.pids.append(pid)
        # after the fork: the store works in a thread
        self._store = dist.TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())

    def wait(self, limit_s: float, *, until: Callable[[], bool] | None = None) -> Ended | None:
        """The end of the job; with ``until``, None as soon as that holds."""
        codes, world = self._codes, len(self.pids)
        while len(codes) < world:
            if until is not None and until():
                return None
            for rank, pid in enumerate(self.pids):
                if rank not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        code = os.waitstatus_to_exitcode(status)
                        codes[rank] = None if self._told is not None and code in (-signal.SIGTERM, -signal.SIGKILL) else code
            now = time.monotonic()
            left = [rank for rank in range(world) if rank not in codes]
            if self._told is None and self._supervised and any(code != 0 for code in codes.values()):
                self._told = now
                self.signal(signal.SIGTERM, left)
            elif self._told is not None and now - self._told > GRACE_S:
                self.signal(signal.SIGKILL, left)
            if now - self.began > limit_s and left and not self._hung:
                self._hung, self._told = left, now - GRACE_S
            time.sleep(0.01)
        seconds = time.monotonic() - self.began
        self._store = None  # ends its thread
        struck_s = float(self.struck.read_text()) - self.began if self.struck.exists() else None
        outputs = [log.read_text(errors="replace") for log in self._logs]
        return Ended([codes[rank] for rank in range(world)], seconds, self._hung, struck_s, outputs)

    def signal(self, number: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)


def preload(model: Path) -> None:
    """Import once what every rank would import anew: megatron-core, transformers (lazily, as it is used), matplotlib."""
    import torch
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_rema.trainer.cold_start
    import megatron_rema.trainer.loop

    torch.set_num_threads(1)
    AutoTokenizer.from_pretrained(model)
    AutoModelForCausalLM.from_pretrained(model)
    Figure().savefig(os.devnull, format="png")
    assert backend_agg and megatron_rema.trainer.loop and megatron_rema.trainer.cold_start
    gc.collect()
    gc.freeze()  # a child that collects would copy every page


def leftovers(logs: Path, wait_s: float = 10.0) -> list[psutil.Process]:
    """Processes that the job's ranks started and that outlive it by ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while True:
        found = [process for process in psutil.process_iter() if _mark(process) == str(logs)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def _life(
    environment: dict[str, str], door: ModuleType, overrides: Sequence[str], log: Path, rank: int, arm: Callable[[int], None] | None
) -> None:
    """A forked rank, as `python -m megatron_rema.DOOR overrides` would live and end. Does not return."""
    code = 1
    try:
        os.environ.update(environment)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        name = door.__name__.rpartition(".")[2]
        sys.argv = [name, *overrides]
        if arm is not None:
            arm(rank)
        from megatron_rema.front_door import enter

        enter(name, door.run)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # as the interpreter does: waits for threads that are not daemons
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
