"""kill -9 at random moments of a run: what the resumed run does next is bitwise what the uninterrupted run did.

The run is PPO with actor and critic at layouts of their own, its checkpoints written while it trains on. One run is killed by default;
MEGATRON_REMA_KILLS=20 kills twenty.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.system.test_training import ENVIRONMENT, command, rows, run
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
KILLS = int(os.environ.get("MEGATRON_REMA_KILLS", "1"))
STEPS = 5
SETTINGS = [
    f"trainer.steps={STEPS}",
    "trainer.checkpoint_every=1",
    "trainer.evaluate_every=2",
    "trainer.evaluation_problems=4",
    "trainer.keep_checkpoints=2",
    "trainer.asynchronous_checkpoints=true",
    "algorithm=ppo",
    "parallel.actor.tensor=2",
    "parallel.critic={tensor:1,pipeline:2,distributed_optimizer:true}",
    "critic.lr=0.002",
    "critic.warmup_steps=1",
    "trainer.save_hf=false",
    "optimizer.lr=0.001",
    "reward.verifier_timeout_s=100",  # a verdict must not depend on how busy the machine is
]


def results(folder: Path) -> dict[str, list[dict]]:
    """Everything that a run computes, without what it takes: seconds and rates."""

    def computed(row: dict) -> dict:
        return {name: value for name, value in row.items() if not name.endswith("_s")}

    found = {name: [computed(row) for row in rows(folder / f"{name}.jsonl")] for name in ("metrics", "evaluations")}
    found |= {file.stem: rows(file) for file in sorted((folder / "episodes").glob("*.jsonl"))}
    manifest = json.loads((folder / "checkpoints" / f"step_{STEPS:06d}" / "manifest.json").read_text())
    found["weights"] = [{name: row["sha256"]} for name, row in sorted(manifest["files"].items()) if name.endswith(".distcp")]
    return found


class Whole:
    """The uninterrupted run, and when it did what."""

    def __init__(self, folder: Path) -> None:
        save = save_tiny_task(folder)
        cold_start = ["trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002"]
        run("sft", 1, *save, f"run_dir={folder}/sft", *cold_start)
        self.settings = [o for o in save if not o.startswith("model.path=")] + [f"model.path={folder}/sft/hf/shared", *SETTINGS]
        began = time.monotonic()
        run("train", 2, *self.settings, f"run_dir={folder}/whole")
        self.results = results(folder / "whole")
        in_steps = [row["time_s"] for row in rows(folder / "whole" / "metrics.jsonl")]
        started = time.monotonic() - began - sum(in_steps)
        self.durations = [started, *in_steps]  # until the first step begins, of step 1, ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    return Whole(tmp_path_factory.mktemp("kill"))


def test_the_uninterrupted_run_learns_something(whole):
    metrics = whole.results["metrics"]
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(row["train/grad_norm"] > 0 for row in metrics[2:]), "without gradients the comparisons below would be empty"
    assert 0 < sum(row["reward/mean"] for row in metrics) < STEPS and len(whole.results["weights"]) > 0


@pytest.mark.parametrize("index", range(KILLS))
def test_what_follows_a_kill_and_a_resume_is_bitwise_the_uninterrupted_run(whole, tmp_path, index):
    # after a random step's metrics were written (0: any time before the first), a random time later, up to half a step beyond the next
    rng = random.Random(f"kill {index}")
    after = rng.randrange(STEPS) if index else STEPS // 2
    delay = rng.uniform(0, whole.durations[after] * (1.5 if after else 1))
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command("train", 2, *whole.settings, f"run_dir={folder}"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while len(rows_so_far(folder)) < after:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before it could be killed"
        time.sleep(0.01)
    time.sleep(delay)
    ended = process.poll() is not None
    kill_everything(process)
    done = len(rows_so_far(folder))
    kept = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    print(f"kill {index}: {delay:.2f} s after step {after}; {done} rows, checkpoints {kept}{', had ended' if ended else ''}")

    run("train", 2, *whole.settings, f"run_dir={folder}", "resume=true")
    found = results(folder)
    assert found.keys() == whole.results.keys()
    for name, expected in whole.results.items():
        assert found[name] == expected, f"{name} differs after a kill with {done} steps done and checkpoints {kept}"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", f"step_{STEPS - 1:06d}", f"step_{STEPS:06d}"]


def rows_so_far(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def kill_everything(process: subprocess.Popen) -> None:
    """SIGKILL for the launcher, the ranks and all their children at once."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
    process.wait()
