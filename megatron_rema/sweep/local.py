"""Jobs on this machine: a queue over slots, each with devices of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rema.config import ConfigError
from megatron_rema.sweep.jobs import Job
from megatron_rema.sweep.processes import Child, end, torchrun
from megatron_rema.sweep.watch import Watch, last_error

_POLL_S = 0.1


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time."""

    number: int
    devices: tuple[str, ...]  # GPUs, as CUDA_VISIBLE_DEVICES names them

    @property
    def where(self) -> str:
        return f"in slot {self.number}" + (f" on GPU {','.join(self.devices)}" if self.devices else "")


class LocalQueue:
    """``hydra/launcher=torchrun``: conf/hydra/launcher/torchrun.yaml says what the settings mean."""

    def __init__(
        self,
        *,
        slots: int | None,
        processes_per_job: int,
        devices: Sequence[int | str] | None,
        threads: int | None,
        max_restarts: int,
        grace_s: float,
    ) -> None:
        """Raises ConfigError where there is no room for a job."""
        for name, value, least in (
            ("slots", slots, 1),
            ("processes_per_job", processes_per_job, 1),
            ("threads", threads, 1),
            ("max_restarts", max_restarts, 0),
            ("grace_s", grace_s, 0),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < least):
                raise ConfigError(f"hydra.launcher.{name} is {value!r}; it must be a number, at least {least}.")
        self.world_size = processes_per_job
        self.slots = _slots(slots, processes_per_job, visible_devices() if devices is None else tuple(map(str, devices)))
        self._hides_gpus = devices is not None and not devices
        cores = len(os.sched_getaffinity(0))
        self.threads = int(threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores // (len(self.slots) * processes_per_job)))
        self._rendezvous = ["--standalone", "--nproc-per-node", str(processes_per_job), "--max-restarts", str(max_restarts)]
        self._grace_s = grace_s

    def describe(self) -> str:
        devices = " + ".join(",".join(slot.devices) for slot in self.slots if slot.devices)
        return (
            f"{len(self.slots)} at a time, {self.world_size} process(es) each, "
            + (f"GPUs {devices}" if devices else "on CPU")
            + f", {self.threads} thread(s) a process"
        )

    def run(self, jobs: Sequence[Job], watch: Watch, *, lock: int) -> None:
        """Every job once, in order; one that fails does not stop the others. Returns when all have ended, or are made to."""
        waiting, free = deque(jobs), deque(self.slots)
        running: dict[Slot, tuple[Job, Child]] = {}
        try:
            while (waiting or running) and not watch.is_stopping:
                while waiting and free:
                    job, slot = waiting.popleft(), free.popleft()
                    running[slot] = (job, self._start(job, slot, lock))
                    watch.started(job, slot.where, pid=running[slot][1].process.pid)
                for slot, (job, child) in list(running.items()):
                    if (exit_code := child.poll()) is not None:
                        del running[slot]
                        free.append(slot)
                        error = last_error(job.log, child.log_begin) if exit_code else ""
                        watch.ended(job, seconds=child.seconds, exit_code=exit_code, error=error)
                watch.tick([job for job, _ in running.values()])
                time.sleep(_POLL_S)
        finally:
            end([child for _, child in running.values()], grace_s=self._grace_s, hurry=lambda: watch.is_hurried)
            for job, _ in running.values():
                watch.stopped(job)

    def _start(self, job: Job, slot: Slot, lock: int) -> Child:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if slot.devices or self._hides_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
        return Child(torchrun(job.door, job.arguments, *self._rendezvous), log=job.log, environment=environment, inherited=[lock])


def visible_devices() -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES, else what the driver lists, in its order."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip().isdecimal()) if listed.returncode == 0 else ()


def _slots(count: int | None, processes: int, devices: tuple[str, ...]) -> list[Slot]:
    """Neighbouring devices belong to the same job."""
    if not devices:
        return [Slot(number, ()) for number in range(count or 1)]
    fits = len(devices) // processes
    count = fits if count is None else count
    if count > fits or count < 1:
        raise ConfigError(
            f"hydra.launcher.slots ({max(count, 1)}) * hydra.launcher.processes_per_job ({processes}) must not exceed "
            f"the {len(devices)} GPU(s) {','.join(devices)}: lower one, name more devices in hydra.launcher.devices, or [] for CPU."
        )
    return [Slot(number, devices[number * processes : (number + 1) * processes]) for number in range(count)]
