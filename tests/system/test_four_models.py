"""PPO with four models, each at its own layout, in one torchrun job: a reward model is trained first, then it scores the RL run."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from tests.system.test_training import rows, run
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
STEPS = 20


def test_ppo_of_actor_critic_reward_model_and_reference_at_four_layouts_improves(tmp_path):
    task = save_tiny_task(tmp_path / "task")
    start = ["trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002"]
    run("sft", 2, *task, f"run_dir={tmp_path}/sft", *start)
    task = [o for o in task if not o.startswith("model.path=")] + [f"model.path={tmp_path}/sft/hf/shared"]

    heads = ["reward_model.heads=3", "reward_model.bootstrap=true", "trainer.steps=160", "trainer.global_batch_dialogues=32"]
    out = run("train_reward_model", 2, *task, f"run_dir={tmp_path}/rm", "parallel.actor.tensor=2", *heads, "optimizer.lr=0.002")
    preference = json.loads((tmp_path / "rm" / "preference.json").read_text())
    # a coin gets 0.5 with a standard error of 0.048; rounding, which differs from processor to processor, moves a run by about 0.1
    assert preference["heldout_pairs"] == 108 and preference["pairwise_accuracy"] > 0.6
    assert f"{preference['pairwise_accuracy']:.4f}" in out

    layouts = [
        "parallel=tp2_pp2",
        "parallel.actor.offload=true",
        "parallel.critic={tensor:1,pipeline:2,distributed_optimizer:true,offload:true}",
        "parallel.reward_model={tensor:2,pipeline:1,offload:true}",
        "parallel.reference={tensor:1,pipeline:1,offload:true}",
    ]
    objective = [
        "algorithm=ppo",
        "algorithm.kl_coef=0.01",
        "algorithm.reward_kl_coef=0.01",
        f"reward.model_path={tmp_path}/rm/hf/reward_model",
        "reward.model_weight=0.1",
        "critic.lr=0.002",
        "critic.warmup_steps=2",
        "optimizer.lr=0.0003",
    ]
    size = ["rollout.prompts_per_step=24", "rollout.episodes_per_prompt=6", f"trainer.steps={STEPS}", "trainer.checkpoint_every=0"]
    out = run("train", 4, *task, f"run_dir={tmp_path}/ppo", *layouts, *objective, *size)
    for words in (
        "actor tensor 2 x pipeline 2 x data 1",
        "critic tensor 1 x pipeline 2 x data 2",
        "reward_model tensor 2 x pipeline 1 x data 2",
        "reference tensor 1 x pipeline 1 x data 4",
    ):
        assert words in out

    metrics = rows(tmp_path / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert ["train/loss" in row for row in metrics[:3]] == [False, False, True], "the critic warms up alone for two steps"
    assert metrics[2]["train/kl_ref_nats"] == pytest.approx(0.0, abs=1e-5) and metrics[-1]["train/kl_ref_nats"] > 1e-4
    assert all(row["reward/model/head_spread_mean"] > 0 and row["critic/grad_norm"] > 0 for row in metrics)
    first, last = (fmean(row["reward/correct_frac"] for row in part) for part in (metrics[:5], metrics[-5:]))
    # 720 dialogues on either side: the standard error of the difference is at most 0.026
    assert last - first > 0.08, f"the fraction of right answers went from {first:.3f} to {last:.3f}"
    mean_when = [[row[f"reward/model/mean_when_{kind}"] for row in metrics] for kind in ("correct", "wrong")]
    assert fmean(mean_when[0]) > fmean(mean_when[1]), "the reward model tells right dialogues from wrong ones"
