"""A job on two hosts lives through their faults: tensor parallel inside a host, pipeline parallel across.

Each fault befalls the same running job in the middle of a step. The job goes on, or says within a stated time who is missing and goes on
once both hosts are there; in the end its metrics are those of the uninterrupted run, bit by bit.

By default 4 steps of the tiny task, one rank a host and one host that is killed; MEGATRON_REMA_TWO_HOSTS=all: two ranks a host, 20 steps of
the quickstart's task and every fault (docs/operations.md has the table); any other word: the faults in whose names it is, in 4 steps.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from megatron_rema.tasks.arith import write_task
from tests.system.test_launch import computed, outcome, start
from tests.system.test_training import run
from tests.system.two_hosts import NAMES, Job, network
from tests.tiny_task import save_tiny_task

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
ASKED = os.environ.get("MEGATRON_REMA_TWO_HOSTS", "alone")
EVERY = ASKED == "all"
STEPS, RANKS = (20, 2) if EVERY else (4, 1)  # ranks of a host
WATCHDOG_S = int(os.environ.get("MEGATRON_REMA_WATCHDOG_S", "20"))
NAMED_WITHIN_S = 1.1 * WATCHDOG_S + 2 * WATCHDOG_S / 20 + 5 + 20  # limit, its tenth, the wait for the silent, a busy machine
GOES_ON_WITHIN_S = 240  # starting four ranks takes most of it where the machine is busy

SETTINGS = [
    "engine=transformers",
    f"parallel.actor.tensor={RANKS}",
    "parallel.actor.pipeline=2",
    f"trainer.steps={STEPS}",
    f"trainer.checkpoint_every={2 if EVERY else 1}",
    "trainer.evaluation_problems=2",
    "trainer.save_hf=false",
    f"trainer.watchdog_seconds={WATCHDOG_S}",
    "optimizer.lr=0.001",
    "reward.verifier_timeout_s=100",  # a verdict must not depend on how busy the machine is
    "algorithm.entropy_coef=0.01",  # gradients to compare in a step whose answers are all wrong, or all right, too
]


@dataclass(frozen=True)
class Fault:
    """``happens`` to the job; a sign of it is ``named`` in what the surviving hosts print (None: nobody need notice); ``passes``: what has
    to be done for the job to go on."""

    name: str
    after_step: int
    happens: Callable[[Job], None]
    named: Callable[[Job, str], bool] | None
    passes: Callable[[Job], None]


def dies(name: str) -> Callable[[Job], None]:
    return lambda job: job.hosts.kill_all(name)


def stops_rank_0(job: Job) -> None:
    for pid in (pid for name in NAMES for pid in job.hosts.processes(name)):
        worker = psutil.Process(pid)
        if worker.environ().get("RANK") == "0" and "megatron_rema.train" in worker.cmdline():
            worker.suspend()
            return
    pytest.fail("no worker of rank 0")


def loses_power(job: Job) -> None:
    """Nothing tells the other host: no connection is closed."""
    job.hosts.link("down")
    job.hosts.kill_all("b")


def comes_back(job: Job) -> None:
    job.hosts.link("up")
    job.start_what_failed()


def requeued(job: Job) -> None:
    job.requeue()


def rank_that_failed(job: Job, said: str) -> bool:
    """torchrun names the worker whose connection broke."""
    return re.search(r"failed \(exitcode: \d+\) local_rank: \d+", said) is not None


def meeting_place_that_failed(job: Job, said: str) -> bool:
    return "The connection to the C10d store has failed" in said and job.has_ended("b")


def silent_ranks(job: Job, said: str) -> bool:
    return re.search(r"^HANG: .*ranks? (\d-)?\d did not answer", said, re.M) is not None


def pause(job: Job) -> None:
    job.hosts.link("down")
    time.sleep(WATCHDOG_S / 3)
    job.hosts.link("up")


def slow(job: Job) -> None:
    if shutil.which("tc") is None:
        pytest.skip("a slow link needs `tc` (iproute2), which is not here")
    try:
        job.hosts.shape("netem", "delay", "20ms", "rate", "4mbit")
    except subprocess.CalledProcessError:  # a kernel without netem: bandwidth alone
        job.hosts.shape("tbf", "rate", "4mbit", "burst", "16kb", "latency", "400ms")
    steps = job.steps_said()
    job.wait_for(lambda: job.steps_said() >= steps + 2, "two steps over the slow link", 200)
    job.hosts.shape()


def nothing(job: Job) -> None:
    return


FAULTS = [
    Fault("a host's processes are killed, it alone is started again", 2, dies("b"), rank_that_failed, comes_back),
    Fault("a host's processes are killed, both hosts are started again", 3, dies("b"), rank_that_failed, requeued),
    Fault("the link is slow for two steps", 4, slow, None, nothing),
    Fault("the link is cut for a third of the watchdog's limit", 7, pause, None, nothing),
    Fault("the link is cut until the watchdog names it", 9, lambda job: job.hosts.link("down"), silent_ranks, comes_back),
    Fault("a host loses power", 12, loses_power, silent_ranks, comes_back),
    Fault("rank 0 is stopped", 14, stops_rank_0, silent_ranks, nothing),
    Fault("the host where the nodes meet is killed", 15, dies("a"), meeting_place_that_failed, comes_back),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """4 steps: the tiny task. 20 steps: the quickstart's arith, with a model that knows the dialogue."""
    folder = tmp_path_factory.mktemp("task")
    return [*(arith(folder) if EVERY else save_tiny_task(folder)), *SETTINGS]


def arith(folder: Path) -> list[str]:
    data = folder / "arith"
    write_task(data, num_train=400, num_heldout=20, num_ood=20, num_dialogues=4000, num_pairs=10, num_heldout_pairs=10)
    files = {"train_file": "train", "evaluation_files.heldout": "heldout", "evaluation_files.ood": "ood", "cold_start_file": "cold_start"}
    task = ["task=arith", *(f"task.{key}={data}/{name}.jsonl" for key, name in files.items())]
    cold_start = ["experiment=quickstart_cold_start", "trainer.steps=300", "trainer.checkpoint_every=0", f"model.path={data}/model"]
    run("sft", 1, *cold_start, *task, f"run_dir={folder}/sft")
    shape = ["rollout=arith", "rollout.prompts_per_step=8", "rollout.episodes_per_prompt=4", "trainer.microbatch_tokens=2048"]
    return [*task, f"model.path={folder}/sft/hf/shared", *shape, "trainer.evaluation_samples=1"]


def live_through(fault: Fault, job: Job, rng: random.Random) -> str:
    """The row of the table."""
    job.wait_for(lambda: len(job.rows()) >= fault.after_step, f"step {fault.after_step}", GOES_ON_WITHIN_S)
    time.sleep(rng.uniform(0, job.rows()[-1]["time_s"]))
    done, began_again = len(job.rows()), job.said().count("preflight collective")
    assert done < STEPS, f"{fault.name}: the run ended before"
    already = {name: len(job.said_by(name)) for name in NAMES}
    began = time.monotonic()
    fault.happens(job)
    if fault.named is None:
        named_s = 0.0
    else:
        alive = [name for name in NAMES if not job.has_ended(name)]

        def is_named() -> bool:
            return any(fault.named(job, job.said_by(name)[already[name] :]) for name in alive)

        job.wait_for(is_named, f"{fault.name}: nobody named it", NAMED_WITHIN_S, gives_up=True)
        named_s = time.monotonic() - began
    passed = time.monotonic()
    fault.passes(job)
    steps = job.steps_said()

    def goes_on() -> bool:
        if fault.named is not None:
            job.start_what_failed()  # a launcher that gives up is started again, as a scheduler would
        back = fault.named is None or job.said().count("preflight collective") > began_again
        return back and job.steps_said() > steps

    starts = len(job.starts)
    job.wait_for(goes_on, f"{fault.name}: the job goes on", GOES_ON_WITHIN_S, gives_up=True)
    lost = "nothing"
    if fault.named is not None:
        resumed = re.findall(r"^resumed at step (\d+)", job.said(), re.M)
        lost = f"{done - (int(resumed[-1]) if resumed else 0)} step(s) that were done, and the one in flight"
    return (
        f"{fault.name}, {done} steps done | named after {named_s:.1f} s | next step {time.monotonic() - passed:.1f} s after it passed | "
        f"lost: {lost} | launchers that gave up meanwhile: {[name for name, _ in job.starts[starts:]]}"
    )


def test_a_job_on_two_hosts_lives_through_their_faults_and_ends_as_if_there_had_been_none(task, tmp_path):
    with network() as hosts:
        outcome(start("launch/single_node.sh", *task, f"run_dir={tmp_path}/whole", NPROC=str(2 * RANKS)))
        whole = computed(tmp_path / "whole")
        assert [row["step"] for row in whole] == list(range(1, STEPS + 1))
        assert all(row["train/grad_norm"] > 0 for row in whole), "without gradients the comparison below would be empty"

        job = Job(hosts, tmp_path / "run", tmp_path, [*task, f"run_dir={tmp_path}/run"], ranks=RANKS)
        for name in NAMES:
            job.start(name)
        rng = random.Random("two hosts")
        for fault in FAULTS if EVERY else [replace(fault, after_step=2) for fault in FAULTS if ASKED in fault.name]:
            print(live_through(fault, job, rng), flush=True)
        job.wait_for(lambda: all(job.has_ended(name) for name in NAMES), "the job ends", GOES_ON_WITHIN_S)
        assert [job.launchers[name].returncode for name in NAMES] == [0, 0], job.said()[-4000:]
        assert f"preflight collective: all-reduce of {2 * RANKS} ranks" in job.said()
        assert computed(tmp_path / "run") == whole
