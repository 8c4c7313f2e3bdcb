"""A reward model's training steps do not move with the layout, and what was trained comes back from its exported folder bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import load_hf, save_hf
from megatron_rema.config import RewardModelConfig
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.cast import Critic
from megatron_rema.trainer.preference import Pair, _update, episode_scores, pairwise_accuracy, scoring_view
from tests.distributed.test_update_parity import traces
from tests.tiny_models import save_tiny_model

SETTINGS = RewardModelConfig(heads=3, bootstrap=True, margin=True, centering=0.01)


def pairs(count: int = 10) -> list[Pair]:
    rng = random.Random(3)
    views = [replace(trace, token_ids=tuple(rng.randrange(70) for _ in trace.token_ids)) for trace in traces(2 * count)]
    return [Pair(i, scoring_view(views[2 * i]), scoring_view(views[2 * i + 1]), margin=0.1 * (i % 3)) for i in range(count)]


def trains_and_exports(source: Path, out_dir: Path, tensor: int, pipeline: int, microbatch_tokens: int) -> tuple:
    """Metrics of three steps, accuracy, and the scores of a few dialogues before the export and after a reload of the folder."""
    arch = Architecture.from_pretrained(source).with_scalar_head(SETTINGS.heads)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, seed=4)
    load_hf(model.modules, arch, source, groups, fresh_head=True)
    learner = Critic(model, build_optimizer(model, lr=1e-2, total_steps=3, eps=1e-3))
    metrics = [_update(learner, pairs(), settings=SETTINGS, seed=0, microbatch_tokens=microbatch_tokens) for _ in range(3)]
    scores = episode_scores(model, traces(), microbatch_tokens=microbatch_tokens)
    accuracy = pairwise_accuracy(model, pairs(), microbatch_tokens=microbatch_tokens)

    save_hf(model.modules, arch, source, out_dir, groups)
    found = Architecture.from_pretrained(out_dir)
    assert found.num_scalars == SETTINGS.heads
    # trainable too: its weights then lie at the same places of megatron's buffers, and matrix products round alike on a CPU
    other = build_policy(found, groups=groups, seed=99)
    load_hf(other.modules, found, out_dir, groups)
    for ours, theirs in zip(model.modules[0].parameters(), other.modules[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return metrics, accuracy, scores, episode_scores(other, traces(), microbatch_tokens=microbatch_tokens)


def test_steps_do_not_move_with_the_layout_and_an_exported_model_scores_bitwise_as_the_trained_one(run_ranks: Callable, tmp_path: Path):
    source = save_tiny_model(tmp_path / "source", "qwen2_tied")
    expected = None
    for tensor, pipeline, world, tokens in [
        (1, 1, 1, 1024),
        (1, 1, 1, 128),
        (2, 1, 2, 128),
        (1, 2, 2, 256),
        (1, 1, 2, 128),
        (2, 2, 4, 128),
    ]:
        out_dir = tmp_path / f"{tensor}_{pipeline}_{world}_{tokens}"
        for metrics, accuracy, scores, reloaded in run_ranks(world, trains_and_exports, source, out_dir, tensor, pipeline, tokens):
            assert reloaded == scores, "a reloaded reward model must give the very same numbers"
            expected = expected or (metrics, accuracy, scores)
            for ours, theirs in zip(metrics, expected[0], strict=True):
                assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5), (tensor, pipeline, world, tokens)
            assert accuracy == expected[1]
            for mine, reference in zip(scores, expected[2], strict=True):
                assert mine == pytest.approx(reference, abs=5e-5)
    first, last = expected[0][0], expected[0][-1]
    assert last["train/loss"] < first["train/loss"] and first["train/centering_loss"] > 0
