"""Whole runs under torchrun with real vLLM: cold start, RL, kill and resume, and the variants that share the one trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_rema.types import Episode, Role
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(door: str, ranks: int, *overrides: str) -> list[str]:
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        if ranks > 1
        else [sys.executable, "-m"]
    )
    return [*launcher, f"megatron_rema.{door}", *overrides]


def run(door: str, ranks: int, *overrides: str) -> str:
    result = subprocess.run(command(door, ranks, *overrides), env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """The tiny task, its model cold-started (2 data-parallel ranks) until it answers some problems right and some wrong."""
    folder = tmp_path_factory.mktemp("task")
    overrides = save_tiny_task(folder)
    run("sft", 2, *overrides, f"run_dir={folder}/sft", "trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002")
    losses = [row["train/loss"] for row in rows(folder / "sft" / "metrics.jsonl")]
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]
    return [o for o in overrides if not o.startswith("model.path=")] + [f"model.path={folder}/sft/hf/shared", "optimizer.lr=0.001"]


def test_a_killed_run_resumes_and_its_next_steps_are_those_of_the_uninterrupted_run(task, tmp_path):
    settings = [
        *task,
        "parallel.actor.tensor=2",
        "trainer.steps=4",
        "trainer.checkpoint_every=1",
        "trainer.evaluation_problems=2",
        "trainer.save_hf=false",
    ]
    run("train", 2, *settings, f"run_dir={tmp_path}/whole")
    whole = rows(tmp_path / "whole" / "metrics.jsonl")

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("train", 2, *settings, f"run_dir={killed}"), env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "step_000002" / "state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before its second checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(killed / "metrics.jsonl")) < 4, "killed too late: nothing was left to resume"
    run("train", 2, *settings, f"run_dir={killed}", "resume=true")
    resumed = rows(killed / "metrics.jsonl")

    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == [1, 2, 3, 4]
    assert any(row["train/grad_norm"] > 0 for row in whole[2:]), "no step had a gradient: the comparison below would be empty"
    for name in ("train/loss", "train/grad_norm", "train/entropy_nats", "reward/mean", "rollout/sampled_tokens", "weight_version"):
        for ours, theirs in zip(resumed, whole, strict=True):
            # the same tokens are sampled and trained on; fp32 sums over another order of requests may differ in the last digits
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), (name, ours["step"])
    ids = [e["episode_id"] for e in rows(killed / "episodes" / "step_000004.jsonl")]
    assert ids == [e["episode_id"] for e in rows(tmp_path / "whole" / "episodes" / "step_000004.jsonl")]


def test_a_run_leaves_whole_episodes_evaluations_plots_and_a_report(task, tmp_path):
    folder = tmp_path / "run"
    out = run("train", 2, *task, f"run_dir={folder}", "parallel.actor.pipeline=2", "trainer.steps=2", "trainer.minibatches_per_step=2")
    metrics = rows(folder / "metrics.jsonl")
    assert [row["weight_version"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["sync/logprob_gap_max"] < 1e-3, "engine and trainer disagree on what was sampled"  # fp32: about 1e-5 was measured
    episodes = [Episode.from_json(row) for row in rows(folder / "episodes" / "step_000002.jsonl")]
    assert len(episodes) == 16
    for episode in episodes:
        assert {turn.role for turn in episode.turns} <= set(Role) and episode.status.is_running is False
        for turn in episode.turns:
            assert len(turn.completion.token_ids) == len(turn.completion.logprobs) > 0
            assert turn.completion.weight_version == 1  # sampled after the first update
        assert episode.advantages.keys() == episode.turn_rewards.keys() == {turn.role for turn in episode.turns}
    assert [row["step"] for row in rows(folder / "evaluations.jsonl")] == [0, 2]
    assert (folder / "report.html").stat().st_size > 10_000 and list((folder / "plots").glob("*.png"))
    assert (folder / "hf" / "shared" / "model.safetensors").exists() and str(folder) in out


def test_separate_agents_alternate_with_a_reference_each(task, tmp_path):
    folder = tmp_path / "run"
    settings = ["agents=separate", "agents.schedule=alternating", "agents.alternate_every=1", "algorithm.kl_coef=0.01", "trainer.steps=2"]
    run("train", 2, *task, f"run_dir={folder}", "parallel.actor.tensor=2", *settings)
    first, second = rows(folder / "metrics.jsonl")
    assert "train/meta_thinker/loss" in first and "train/reasoner/loss" not in first
    assert "train/reasoner/loss" in second and "train/meta_thinker/loss" not in second
    assert first["train/meta_thinker/kl_ref_nats"] == pytest.approx(0.0, abs=1e-6)  # nothing was updated before
    assert sorted(path.name for path in (folder / "hf").iterdir()) == ["meta_thinker", "reasoner"]


def test_a_single_agent_trains_in_one_process_until_its_tokens_are_spent(task, tmp_path):
    folder = tmp_path / "run"
    settings = ["agents=single", "algorithm=grpo_token", "trainer.steps=50", "trainer.token_budget=150"]
    decay = ["optimizer.lr=0.001", "optimizer.min_lr=0", "optimizer.schedule=linear"]
    run("train", 1, *task, f"run_dir={folder}", *settings, *decay)
    metrics = rows(folder / "metrics.jsonl")
    totals = [row["rollout/sampled_tokens_total"] for row in metrics]
    assert totals[-2] < 150 <= totals[-1], "over after the step that reached the budget"
    assert np.diff([0, *totals]).tolist() == [row["rollout/sampled_tokens"] for row in metrics]
    # linear from 0.001 to 0 over tokens: 0.001 (1 - tokens / 150); the step that passes the budget learns nothing
    assert [row["train/lr"] for row in metrics] == pytest.approx([max(0.0, 0.001 * (1 - total / 150)) for total in totals])
    assert all(row["behaviour/turns_per_episode"] == 1.0 for row in metrics)
    episodes = [Episode.from_json(e) for e in rows(folder / "episodes" / "step_000001.jsonl")]
    assert {turn.role for e in episodes for turn in e.turns} == {Role.REASONING}
