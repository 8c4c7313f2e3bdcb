"""A rank that is stopped (SIGSTOP) in a phase of a real job: one report names it and where the others wait, every other rank ends with
the watchdog's exit code, and torchrun starts the job again.

One job is stopped twice: at first rank 1, after the restart rank 0, whose place no other process takes. By default in two phases;
MEGATRON_REMA_HANGS=all: in every phase of a run.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_rema.trainer.hang import EXIT_CODE
from tests.system.test_launch import BASE, ROOT
from tests.system.test_training import rows
from tests.tiny_task import save_tiny_task

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
# above the longest that a step of this tiny run, or the start of its engines, takes without a word on a busy machine
LIMIT_S = int(os.environ.get("MEGATRON_REMA_WATCHDOG_S", "15"))
REPORTED_WITHIN_S = 1.1 * LIMIT_S + 2 * LIMIT_S / 20 + 5 + 15  # the limit, its tenth, the wait for the silent rank, and a busy machine
EVERY = os.environ.get("MEGATRON_REMA_HANGS") == "all"

# (phase, step) of rank 1 and then of rank 0
DEFAULT = [(("generate", 2), ("update", 3))]
ALL = [
    (("preflight", 0), ("build models", 0)),
    (("restore", 0), ("start engines", 0)),
    (("evaluate / generate", 0), ("evaluate / verify", 0)),
    (("verify", 1), ("generate", 1)),
    (("score", 2), ("verify", 2)),
    (("sync", 1), ("score", 2)),
    (("checkpoint", 1), ("sync", 2)),
    (("update", 2), ("checkpoint", 3)),
    (("export", 3), ("report", 0)),  # what resumes after its last step is in no step
    (("evaluate / verify", 0), ("export", 3)),
    (("report", 3), ("start engines", 0)),
    *DEFAULT,
]

# No fault hook in the product: Python imports this module by itself when it starts. STOP: "PHASE@STEP" of each start, RANK@PHASE@STEP.
SITECUSTOMIZE = """
import os, signal, time
from contextlib import contextmanager

rank, place, step = os.environ["STOP"].split(";")[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))].split("@")
if os.environ.get("RANK") == rank:
    from megatron_rema.parallel.pulse import Pulse
    begin = Pulse.phase

    @contextmanager
    def phase(self, name):
        with begin(self, name):
            if (self.place, self.step) == (place, int(step)):
                time.sleep(1.5)  # its phase is known to others after a second
                os.kill(os.getpid(), signal.SIGSTOP)
            yield

    Pulse.phase = phase
"""


class Job:
    """A launcher, what it has printed, and its workers."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str]) -> None:
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def reports(self) -> list[str]:
        return re.findall(r"^HANG: .*(?:\n  .*)*", self.said(), re.M)

    def workers(self) -> dict[int, psutil.Process]:
        found = {}
        for worker in psutil.Process(self.process.pid).children():
            try:
                found[int(worker.environ()["RANK"])] = worker
            except (KeyError, psutil.Error):
                continue
        return found

    def wait_for(self, is_true, what: str, within_s: float) -> float:
        begin = time.monotonic()
        while not is_true():
            assert self.process.poll() is None, f"the job ended before {what}: {self.said()[-4000:]}"
            assert time.monotonic() - begin < within_s, f"{what}: not within {within_s:g} s: {self.said()[-4000:]}"
            time.sleep(0.05)
        return time.monotonic() - begin

    def end(self) -> None:
        for worker in self.workers().values() if self.process.poll() is None else ():
            worker.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    return save_tiny_task(tmp_path_factory.mktemp("task"))


def is_stopped(worker: psutil.Process | None) -> bool:
    try:
        return worker is not None and worker.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("first", "second"), ALL if EVERY else DEFAULT)
def test_the_rank_that_is_stopped_is_named_with_its_phase_and_the_job_ends(task, tmp_path, first, second):
    stops = [(1, *first), (0, *second)]
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {
        **BASE,
        "NPROC": "2",
        "MAX_RESTARTS": "1",
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "STOP": ";".join(f"{rank}@{place}@{step}" for rank, place, step in stops),
    }
    run = tmp_path / "run"
    settings = [
        "engine=transformers",
        "parallel.actor.tensor=2",
        "trainer.steps=3",
        "trainer.checkpoint_every=1",
        "trainer.evaluation_problems=2",
    ]
    job = Job(tmp_path, ["launch/single_node.sh", *task, *settings, f"trainer.watchdog_seconds={LIMIT_S}", f"run_dir={run}"], environment)
    try:
        for number, (rank, place, step) in enumerate(stops, 1):
            job.wait_for(lambda rank=rank: is_stopped(job.workers().get(rank)), f"rank {rank} stops in {place}", 240)
            seconds = job.wait_for(lambda number=number: len(job.reports()) == number, "the report", REPORTED_WITHIN_S)
            ended = time.monotonic()
            stopped = job.workers().get(rank)
            time.sleep(1)
            if is_stopped(stopped):  # torchrun waits 30 s for a stopped worker before it kills it: a test need not
                stopped.send_signal(signal.SIGCONT)
            report = job.reports()[number - 1]
            print(f"rank {rank} in {place}: reported after {seconds:.1f} s\n{report}")
            at = f"{place} (step {step})" if step else place
            assert f"rank {rank} did not answer" in report and f"): SILENT, last seen in {at}, " in report, report
            assert f"\n  rank {1 - rank} (" in report and f"stack of rank {1 - rank}:" in report, report
            if (run / "config.yaml").exists():
                written = json.loads((run / "hang.json").read_text())
                told = {row["rank"]: row for row in written["ranks"]}
                assert told[rank]["is_silent"] and not told[1 - rank]["is_silent"]
                assert told[1 - rank]["collective"] or place in ("preflight", "start engines", "restore"), told[1 - rank]
        job.process.wait(timeout=60)
        print(f"torchrun ended {time.monotonic() - ended:.1f} s after the last report")
        said = job.said()
        assert job.process.returncode != 0 and f"exitcode  : {EXIT_CODE}" in said, said[-4000:]
        assert len(job.reports()) == 2, "one report a hang, not one a rank"
        if first[1] > 1:
            steps = [row["step"] for row in rows(run / "metrics.jsonl")]
            expected = list(range(1, second[1] or first[1] + 1))
            assert "\nresumed at step" in said and steps[: len(expected)] == expected
    finally:
        job.end()
