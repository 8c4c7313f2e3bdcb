"""Jobs handed to SLURM through submitit: each an allocation of its own with one torchrun on every node, as launch/slurm.sbatch does.

The sweep waits for them. If it is killed they go on, and the same command finds them again by the numbers noted in sweep.json.
submitit passes what a node runs as a pickle in the sweep's own folder, which nobody else may write to.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rema.config import ConfigError
from megatron_rema.sweep.jobs import Job
from megatron_rema.sweep.processes import Child, torchrun
from megatron_rema.sweep.record import FINISHED, mark_finished
from megatron_rema.sweep.watch import Watch, last_error

if TYPE_CHECKING:
    from submitit import SlurmJob

ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "REQUEUED", "REQUEUE_FD", "REQUEUE_HOLD", "RESIZING", "SUSPENDED", "COMPLETING", "PREEMPTED")
UNKNOWN = "UNKNOWN"
_CANCEL_WAIT_S = 90.0
_SHARED_FILES_WAIT_S = 30.0  # for a file of another node to be seen


@dataclass(frozen=True)
class Nodes:
    """What one job is given."""

    count: int
    processes: int  # ranks on each
    max_restarts: int


@dataclass(frozen=True)
class Attempt:
    """What each node of a job runs: submitit calls it there."""

    job: Job
    arguments: tuple[str, ...]
    nodes: Nodes

    def __call__(self) -> None:
        """Raises RuntimeError with the last error line when the launcher fails."""
        from submitit import JobEnvironment

        here = JobEnvironment()
        head = f"{here.hostnames[0]}:{20000 + int(here.raw_job_id) % 10000}"  # two jobs on one node do not meet
        rendezvous = ["--nnodes", str(self.nodes.count), "--nproc-per-node", str(self.nodes.processes)]
        rendezvous += ["--max-restarts", str(self.nodes.max_restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", head]
        # the number of a job stays when it is requeued: its workers then continue by themselves (trainer/restart.py)
        rendezvous += ["--rdzv-id", here.job_id]
        if address := os.environ.get("NODE_ADDR"):
            rendezvous += ["--local-addr", address]
        log = self.job.log if here.node == 0 else self.job.log.with_suffix(f".node{here.node}.log")
        child = Child(torchrun(self.job.door, self.arguments, *rendezvous), log=log, environment=os.environ)
        while (exit_code := child.poll()) is None:
            time.sleep(0.2)
        if exit_code:
            raise RuntimeError(f"exit code {exit_code}; {log}: {last_error(log, child.log_begin)}")
        if here.node == 0:
            mark_finished(self.job, seconds=round(child.seconds, 3))

    def checkpoint(self) -> Any:
        """submitit asks before it requeues a job that is preempted or out of time: the same once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SlurmQueue:
    """``hydra/launcher=slurm``: conf/hydra/launcher/slurm.yaml says what the settings mean."""

    def __init__(
        self,
        *,
        slots: int | None,
        nodes: int,
        processes_per_node: int,
        gpus_per_node: int | None,
        cpus_per_node: int | None,
        minutes: int,
        requeues: int,
        max_restarts: int,
        setup: Sequence[str],
        sbatch: Mapping[str, Any],
        poll_s: float,
    ) -> None:
        for name, value, least in (
            ("slots", slots, 1),
            ("nodes", nodes, 1),
            ("processes_per_node", processes_per_node, 1),
            ("gpus_per_node", gpus_per_node, 0),
            ("cpus_per_node", cpus_per_node, 1),
            ("minutes", minutes, 1),
            ("requeues", requeues, 0),
            ("max_restarts", max_restarts, 0),
            ("poll_s", poll_s, 0.1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < least):
                raise ConfigError(f"hydra.launcher.{name} is {value!r}; it must be a number, at least {least}.")
        try:
            import submitit  # noqa: F401
        except ImportError as error:
            raise ConfigError('hydra/launcher=slurm needs submitit: pip install "megatron-rema[slurm]".') from error
        for command in ("sbatch", "srun", "sacct", "scancel"):
            if shutil.which(command) is None:
                raise ConfigError(
                    f"hydra/launcher=slurm needs {command}, which is not on PATH: start the sweep on a node that submits jobs."
                )
        self.world_size = nodes * processes_per_node
        self.nodes = Nodes(nodes, processes_per_node, max_restarts)
        self._slots, self._requeues, self._poll_s = slots, requeues, poll_s
        gpus = processes_per_node if gpus_per_node is None else gpus_per_node
        parameters = {"nodes": nodes, "ntasks_per_node": 1, "time": minutes, "cpus_per_task": cpus_per_node, "gpus_per_node": gpus or None}
        self._parameters = {key: value for key, value in parameters.items() if value is not None}
        self._parameters |= {"setup": list(setup), "additional_parameters": dict(sbatch)}

    def describe(self) -> str:
        at_once = "all" if self._slots is None else str(self._slots)
        return f"{at_once} in SLURM's queue at once, {self.nodes.count} node(s) of {self.nodes.processes} process(es) each"

    def run(self, jobs: Sequence[Job], watch: Watch, *, lock: int) -> None:
        """Every job once. Jobs that an earlier start of the sweep has left in SLURM's queue are waited for, not submitted again."""
        from submitit.core.utils import FailedJobError

        running: dict[str, tuple[Job, SlurmJob, float]] = {}
        waiting: deque[Job] = deque()
        for job in jobs:
            number = watch.record.facts[job.name].get("slurm_job")
            if number is None or not (submitted := self._still_there(job, number)):
                waiting.append(job)
            else:
                running[job.name] = (job, submitted, time.monotonic())
                watch.started(job, f"as SLURM job {number}, submitted before", slurm_job=number)
        try:
            while (waiting or running) and not watch.is_stopping:
                while waiting and (self._slots is None or len(running) < self._slots):
                    job = waiting.popleft()
                    try:
                        submitted = self._submit(job)
                    except FailedJobError as error:
                        said = " ".join(str(error).split()) or "no word of it"
                        watch.ended(job, seconds=0.0, exit_code=1, error=f"sbatch did not take it: {said[:500]}")
                        continue
                    running[job.name] = (job, submitted, time.monotonic())
                    watch.started(job, f"as SLURM job {submitted.job_id}", slurm_job=submitted.job_id)
                for job, submitted, began in list(running.values()):
                    if (outcome := self._outcome(job, submitted)) is not None:
                        del running[job.name]
                        watch.ended(job, seconds=time.monotonic() - began, exit_code=outcome[0], error=outcome[1])
                        watch.record.change(job, slurm_job=None)
                watch.tick([job for job, *_ in running.values()])
                _sleep(self._poll_s, watch)
        finally:
            self._cancel(list(running.values()), watch)

    def _submit(self, job: Job) -> SlurmJob:
        from submitit import SlurmExecutor

        job.log.parent.mkdir(exist_ok=True)
        executor = SlurmExecutor(job.log.parent / "slurm", max_num_timeout=self._requeues)
        executor.update_parameters(**self._parameters, job_name=job.name)
        return executor.submit(Attempt(job, tuple(job.arguments), self.nodes))

    def _still_there(self, job: Job, number: str) -> SlurmJob | None:
        """Raises ConfigError where SLURM does not know: two runs in one folder would spoil it."""
        submitted = _slurm_job(job, number)
        state = state_of(submitted)
        if state == UNKNOWN and not (job.folder / FINISHED).exists():
            raise ConfigError(
                f"job {job.name} was submitted as SLURM job {number}, of which sacct says nothing; two runs in one folder would spoil it: "
                f"see that it has ended, remove its slurm_job from {job.folder.parent}/sweep.json, and start the sweep again."
            )
        return submitted if state in ALIVE else None

    def _outcome(self, job: Job, submitted: SlurmJob) -> tuple[int, str] | None:
        """(exit code, error) of a job that is over."""
        state = state_of(submitted)
        if (job.folder / FINISHED).exists():
            return 0, ""
        if state in (*ALIVE, UNKNOWN):
            return None
        if state == "COMPLETED":  # on another node, whose files may take a moment
            deadline = time.monotonic() + _SHARED_FILES_WAIT_S
            while time.monotonic() < deadline:
                if (job.folder / FINISHED).exists():
                    return 0, ""
                time.sleep(0.5)
        others = sorted(job.log.parent.glob(f"{job.name}.node*.log"))  # rank 0, which speaks for all, may be on any node
        return 1, f"SLURM job {submitted.job_id} is {state}: {last_error(job.log, 0, *others)}"

    def _cancel(self, running: Sequence[tuple[Job, SlurmJob, float]], watch: Watch) -> None:
        for _, submitted, _ in running:
            submitted.cancel(check=False)
        deadline = time.monotonic() + _CANCEL_WAIT_S
        left = list(running)
        while left and time.monotonic() < deadline and not watch.is_hurried:
            left = [entry for entry in left if state_of(entry[1]) in ALIVE]
            time.sleep(0.5)
        for job, submitted, _ in running:
            watch.stopped(job)
            still = any(submitted is entry[1] for entry in left)
            watch.record.change(job, slurm_job=submitted.job_id if still else None)


def state_of(submitted: SlurmJob) -> str:
    """As sacct says it, asked now: ``CANCELLED by 0`` -> ``CANCELLED``."""
    state = submitted.watcher.get_state(submitted.job_id, mode="force")
    return (state.split() or [UNKNOWN])[0].rstrip("+").upper()


def _slurm_job(job: Job, number: str) -> SlurmJob:
    from submitit import SlurmJob

    return SlurmJob(folder=Path(job.log.parent / "slurm"), job_id=number)


def _sleep(seconds: float, watch: Watch) -> None:
    """Until then, or until somebody wants us to stop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not watch.is_stopping:
        time.sleep(0.1)
