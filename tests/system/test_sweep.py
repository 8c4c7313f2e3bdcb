"""``-m`` for real: six jobs, each its own torchrun, killed in the middle, stopped, continued, compared.

The jobs are cold starts of a few steps; MEGATRON_REMA_SWEEP=train makes them RL runs with vLLM (several minutes).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.test_training import ENVIRONMENT, rows
from tests.system.test_training import run as run_alone
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
DOOR = os.environ.get("MEGATRON_REMA_SWEEP", "sft")
STEPS, EVERY = {"sft": (40, 4), "train": (6, 2)}[DOOR]
LIMIT_S = {"sft": 900, "train": 2400}[DOOR]  # for a machine that does much else; alone it takes a tenth
GRID = ["seed=0,1", "optimizer.lr=1e-3,2e-3,3e-3"]
NAMES = [f"seed-{seed}__lr-{lr}" for seed in (0, 1) for lr in ("0.001", "0.002", "0.003")]
SIZES = [
    f"trainer.steps={STEPS}",
    f"trainer.checkpoint_every={EVERY}",
    "trainer.global_batch_dialogues=8",
    "trainer.evaluation_problems=4",
    "trainer.save_hf=false",
    "trainer.preflight.min_free_memory_gib=0.1",
    "reward.verifier_timeout_s=100",
    "hydra.launcher.slots=2",
]


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test that fails in the middle must not leave its sweep running; what that had started ends with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(*overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """The sweep, as it is started from a shell, in a session of its own."""
    command = [sys.executable, *options, "-m", f"megatron_rema.{DOOR}", "-m", *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen(command, env=ENVIRONMENT, text=True, start_new_session=True, **pipes))
    return STARTED[-1]


def run(*overrides: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    process = start(*overrides, options=options)
    out, err = process.communicate(timeout=LIMIT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def states(folder: Path) -> dict[str, str]:
    file = folder / "sweep.json"
    return {job["name"]: job["state"] for job in json.loads(file.read_text())["jobs"]} if file.exists() else {}


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, what: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"it ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def half_done(folder: Path) -> list[str]:
    """Jobs with a checkpoint that are not at their end."""
    found = []
    for name, state in states(folder).items():
        done = len(rows_so_far(folder / name))
        if state == "running" and EVERY < done < STEPS and (folder / name / "checkpoints" / f"step_{EVERY:06d}" / "manifest.json").exists():
            found.append(name)
    return found


def rows_so_far(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def tries(folder: Path, name: str) -> list[str]:
    """The command lines at the heads of a job's attempts."""
    return [line for line in (folder / "logs" / f"{name}.log").read_text(errors="replace").splitlines() if line.startswith("$ ")]


def task_of(folder: Path) -> list[str]:
    """The tiny task; for RL its model is taught until it answers some problems right."""
    task = save_tiny_task(folder)
    if DOOR == "sft":
        return task
    run_alone("sft", 2, *task, f"run_dir={folder}/sft", "trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002")
    return [o for o in task if not o.startswith("model.path=")] + [f"model.path={folder}/sft/hf/shared"]


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_sweep_of_six_jobs_is_killed_in_the_middle_continues_and_ends_with_its_table_and_figure(tmp_path):
    folder = tmp_path / "sweep"
    command = [*task_of(tmp_path / "task"), *SIZES, *GRID, f"run_dir={folder}"]

    # kill -9 of the sweep alone, once two jobs have ended and another has checkpoints: what it had started ends by itself
    killed = start(*command)
    wait_until(
        lambda: sum(state == "finished" for state in states(folder).values()) >= 1 and bool(half_done(folder)),
        killed,
        "a finished and a half-done job",
        timeout_s=LIMIT_S,
    )
    children = family(killed)
    assert len([child for child in children if "torch.distributed.run" in child.cmdline()]) == 2, "as many torchruns as slots"
    killed.kill()
    killed.wait()
    half, finished = half_done(folder), [name for name, state in states(folder).items() if state == "finished"]
    before = {name: rows_so_far(folder / name) for name in finished}
    assert half, "it was killed too late"

    # the same command at once: it waits for the old jobs to end, and goes on to its own end, without torch in the sweep's own process
    whole = run(*command, options=("-X", "importtime"))
    imported = [line.split("|")[-1].strip() for line in whole.stderr.splitlines() if line.startswith("import time:")]
    assert whole.returncode == 0, whole.stdout + "".join(line for line in whole.stderr.splitlines(True) if "import time:" not in line)
    assert "megatron_rema.sweep.sweep" in imported and not {"torch", "vllm", "transformers", "megatron.core"} & set(imported)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), "the killed sweep's jobs live on"
    assert states(folder) == dict.fromkeys(NAMES, "finished")
    for name in NAMES:
        assert [row["step"] for row in rows(folder / name / "metrics.jsonl")] == list(range(1, STEPS + 1)), name
    for name in finished:
        assert rows_so_far(folder / name) == before[name] and len(tries(folder, name)) == 1, "a finished job ran again"
    for name in half:
        assert f"{name}: continues at step" in whole.stdout and "resume=true" in tries(folder, name)[-1]
    assert tries(folder, NAMES[-1])[0].count("resume=true") == 0

    # the table of all six, the table over seeds, the figure
    table = (folder / "comparison.md").read_text()
    assert all(f"| {name} |" in table for name in NAMES) and all(f"| {lr} |" in table for lr in ("0.001", "0.002", "0.003"))
    assert (folder / "comparison.csv").read_text().count("\n") == 7 and "Over seeds" in table and "Over seeds" in whole.stdout
    assert (folder / "comparison.png").stat().st_size > 10_000 and (folder / "comparison.svg").read_text().count("2 seeds") >= 1


@pytest.mark.timeout(900)
def test_a_sweep_that_is_stopped_leaves_nothing_running_and_a_job_that_fails_does_not_stop_the_next(tmp_path):
    task = [override for override in save_tiny_task(tmp_path / "task") if not override.startswith("model.path=")]
    folder = tmp_path / "sweep"
    wrong = f"model.path={tmp_path}/nowhere,{tmp_path}/neither"  # found out by the job, before it imports torch
    command = [*task, *SIZES, "hydra.launcher.slots=1", wrong, f"run_dir={folder}"]
    stopped = start(*command)
    wait_until(lambda: any("torch.distributed.run" in child.cmdline() for child in family(stopped)), stopped, "its job", timeout_s=100)
    children = family(stopped)
    stopped.send_signal(signal.SIGINT)  # as Ctrl-C sends it
    out, err = stopped.communicate(timeout=100)
    assert stopped.returncode == 128 + signal.SIGINT and "the same command continues it" in out, out + err
    assert list(states(folder).values()) == ["stopped", "waiting"] and not any(child.is_running() for child in children)

    result = run(*command)
    assert result.returncode == 1 and set(states(folder).values()) == {"failed"}, result.stdout + result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for line, name, path in zip(said, states(folder), ("nowhere", "neither"), strict=True):
        for words in (
            f"job {name} ",
            str(folder / "logs" / f"{name}.log"),
            f"error: model.path of policy shared is {tmp_path}/{path}; no such",
        ):
            assert words in line, (words, line)
