"""MATH problems through rollout and training: a random Qwen2.5-shaped model, tokenizers and chat templates in the format of real ones."""

from __future__ import annotations

import math

import pyarrow.compute as compute
import pyarrow.parquet as parquet
import pytest

from megatron_rema.rollout.traces import traces_of
from megatron_rema.types import Episode, EpisodeStatus, Role
from tests.family_tokenizers import FAMILIES, family_tokenizer, save_family
from tests.real_data import math_file
from tests.system.test_training import rows, run
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.system


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llama3"])
def test_math_prompts_run_through_rollout_and_training(family, tmp_path):
    table = parquet.read_table(math_file("math_train_lv3to5_8k.parquet")).rename_columns({"ground_truth_answer": "answer"})
    table = table.filter(compute.not_equal(table["answer"], ""))  # two of 8,523 rows have no answer, and are refused by name
    problems = tmp_path / "problems.parquet"
    parquet.write_table(table, problems)
    model, folder = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    save_family(family, model)
    save_tiny_model(model, "qwen2_tied" if family != "qwen3" else "qwen3", vocab_size=len(family_tokenizer(family)))
    run(
        "train",
        2,
        "experiment=rema_math",
        "parallel.actor.tensor=2",
        f"model.path={model}",
        "model.dtype=float32",
        f"run_dir={folder}",
        f"task.train_file={problems}",
        f"task.evaluation_files.math500={math_file('math500_test.parquet')}",
        "trainer.steps=2",
        "trainer.minibatches_per_step=2",
        "trainer.evaluation_problems=2",
        "trainer.evaluation_samples=1",
        "trainer.save_hf=false",
        "rollout.prompts_per_step=4",
        "rollout.episodes_per_prompt=2",
        "rollout.max_rounds=2",
        "rollout.max_turn_tokens=24",
        "engine.logprob_gap_alarm=0.001",
        "algorithm.entropy_coef=0.01",  # babble is never right: without an entropy term nothing would be learnt
    )
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in metrics)
    assert max(row["sync/logprob_gap_max"] for row in metrics) < 1e-3, "engine and trainer agree on every sampled token, special ones too"

    tokenizer = family_tokenizer(family)
    episodes = [Episode.from_json(row) for step in (1, 2) for row in rows(folder / "episodes" / f"step_{step:06d}.jsonl")]
    assert len(episodes) == 16 and any(e.status is not EpisodeStatus.CONTEXT_OVERFLOW for e in episodes)
    for episode in episodes:
        question = FAMILIES[family].as_read(episode.prompt.question)
        assert question.strip() in tokenizer.decode(episode.turns[0].context_token_ids), "the problem is read whole"
        for trace in traces_of(episode):
            labelled = [token for token, own in zip(trace.token_ids, trace.loss_mask, strict=True) if own]
            sampled = [token for turn in episode.turns_of(trace.role) for token in turn.completion.token_ids]
            assert labelled == sampled, "exactly what was sampled is trained on"
        assert {turn.role for turn in episode.turns} <= set(Role)
