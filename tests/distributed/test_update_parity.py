"""A whole ReMA update (scores, clipped turn loss, KL, entropy, optimizer step) is the same at every layout and microbatch size.

The reference is one rank with one microbatch. fp32; metrics of order 1 agree to 2e-5: layouts differ in the order of sums, and two
optimizer steps amplify that a little.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rema.config import AlgorithmConfig
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.credit import generalized_advantages
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.trainer.scoring import label_logprobs, scalars
from megatron_rema.trainer.update import update_critic, update_policy
from megatron_rema.types import Role, Trace
from tests.distributed.test_parallel_parity import QWEN2_TIED


def traces(count: int = 12) -> list[Trace]:
    """Dialogue views of 1 to 4 turns, lengths from 6 to about 50, with rollout logprobs near those of a random model (-log 70 = -4.2)."""
    rng = random.Random(0)
    made = []
    for index in range(count):
        tokens, mask, turn_ids, logprobs = [], [], [], []
        for turn in range(1 + index % 4):
            context, own = rng.randint(2, 7), rng.randint(1, 6)
            tokens += [rng.randrange(70) for _ in range(context + own)]
            mask += [False] * context + [True] * own
            turn_ids += [-1] * context + [turn] * own
            logprobs += [0.0] * context + [-4.2 + 0.3 * rng.random() for _ in range(own)]
        advantages = tuple(rng.choice([-1.0, 0.5, 1.5]) for _ in range(1 + index % 4))
        made.append(
            Trace(
                str(index),
                Role.REASONING,
                tuple(tokens),
                tuple(mask),
                tuple(turn_ids),
                tuple(logprobs),
                (0.0,) * len(advantages),
                advantages,
            )
        )
    return made


def two_updates(tensor: int, pipeline: int, microbatch_tokens: int, algorithm: dict, **options) -> list[dict[str, float]]:
    """The reference lies at another layout than the policy wherever there is more than one rank (exact KL: than one stage)."""
    settings, step = AlgorithmConfig(**algorithm), traces()
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    other = build_groups(tensor=pipeline, pipeline=tensor) if settings.needs_ref_logprobs else build_groups(tensor=tensor, pipeline=1)
    model = build_policy(QWEN2_TIED, groups=groups, seed=1, **options)
    reference = build_policy(QWEN2_TIED, groups=other, seed=2, trainable=False, **options)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=2, eps=1e-3)
    columns = {"old_logprobs": label_logprobs(model, step, temperature=0.7, microbatch_tokens=microbatch_tokens)}
    if settings.needs_ref_logprobs:
        columns["ref_logprobs"] = label_logprobs(reference, step, temperature=0.7, microbatch_tokens=microbatch_tokens)
    exact = reference if settings.kl_estimator == "exact" else None
    shape = {"aggregation": settings.aggregation, "max_turns": 4, "microbatch_tokens": microbatch_tokens}
    batches = pack_for_rank(step, groups=groups, columns=columns, **shape)
    return [update_policy(model, optimizer, batches, algorithm=settings, temperature=0.7, reference=exact) for _ in range(2)]


VARIANTS = [
    {
        "ratio_level": "turn",
        "aggregation": "turn",
        "kl_coef": 0.1,
        "kl_estimator": "k3",
        "entropy_coef": 0.01,
        "clip_low": 0.01,
        "clip_high": 0.01,
    },
    {"ratio_level": "turn", "ratio_mean": "arithmetic", "aggregation": "episode", "kl_coef": 0.1, "kl_estimator": "k2"},
    {"ratio_level": "turn", "aggregation": "constant", "kl_coef": 0.1, "kl_estimator": "exact", "entropy_coef": 0.01},
    {"ratio_level": "trace", "aggregation": "constant"},
    {"ratio_level": "token", "aggregation": "token"},
]


@pytest.mark.parametrize("algorithm", VARIANTS, ids=lambda v: f"{v['ratio_level']}-{v['aggregation']}")
def test_update_metrics_do_not_change_with_layout_or_microbatches(run_ranks, algorithm):
    expected = run_ranks(1, two_updates, 1, 1, 1024, algorithm)[0]
    assert expected[0]["train/grad_norm"] > 1e-3 and expected[1]["train/loss"] != expected[0]["train/loss"]
    assert expected[1][f"train/{algorithm['ratio_level']}_ratio_mean"] != 1.0, "the second update must see a moved policy"
    for world, tensor, pipeline, microbatch_tokens in [
        (1, 1, 1, 64),
        (2, 2, 1, 128),
        (2, 1, 2, 64),
        (2, 1, 1, 128),
        (4, 2, 2, 64),
        (4, 2, 1, 64),
    ]:
        for rank_metrics in run_ranks(world, two_updates, tensor, pipeline, microbatch_tokens, algorithm):
            for ours, theirs in zip(rank_metrics, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5), (world, tensor, pipeline, microbatch_tokens)


def two_updates_in_chunks(*args) -> list[dict[str, float]]:
    return two_updates(*args, logits_chunk_tokens=20)


@pytest.mark.parametrize("algorithm", [VARIANTS[0], VARIANTS[2]], ids=["k3", "exact"])
def test_update_metrics_do_not_change_with_logits_in_chunks(run_ranks, algorithm):
    expected = run_ranks(1, two_updates, 1, 1, 1024, algorithm)[0]
    for world, tensor, pipeline in [(1, 1, 1), (4, 2, 2)]:
        for rank_metrics in run_ranks(world, two_updates_in_chunks, tensor, pipeline, 64, algorithm):
            for ours, theirs in zip(rank_metrics, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5), (world, tensor, pipeline)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = result if isinstance(result, (list, tuple)) else [result]
        self.numbers = max([self.numbers, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


POSITIONS = 248  # of the update's only microbatch


def largest_tensor(logits_chunk_tokens: int) -> int:
    """In scores and an update with an exact KL, the weights' own tensors apart."""
    groups = build_groups(tensor=1, pipeline=1)
    wide = replace(QWEN2_TIED, vocab_size=4096)
    model = build_policy(wide, groups=groups, seed=1, logits_chunk_tokens=logits_chunk_tokens)
    reference = build_policy(wide, groups=groups, seed=2, trainable=False, logits_chunk_tokens=logits_chunk_tokens)
    optimizer = build_optimizer(model, lr=1e-3, total_steps=1)
    settings = AlgorithmConfig(kl_coef=0.1, kl_estimator="exact")
    with Largest() as found:
        columns = {"old_logprobs": label_logprobs(model, traces(), temperature=1.0, microbatch_tokens=256)}
        batches = pack_for_rank(traces(), groups=groups, columns=columns, aggregation="turn", max_turns=4, microbatch_tokens=256)
        update_policy(model, optimizer, batches, algorithm=settings, temperature=1.0, reference=reference)
    assert all(len(batch.tokens) == POSITIONS for batch in batches)
    return found.numbers


def test_whole_logits_never_exist_in_chunks(run_ranks):
    """248 positions of 4,096 logits are a million numbers; a chunk's are 65,536, and all weights together about 160,000."""
    assert run_ranks(1, largest_tensor, 0)[0] >= POSITIONS * 4096
    assert run_ranks(1, largest_tensor, 16)[0] < POSITIONS * 4096 / 4


def test_scores_are_on_every_rank_trace_by_trace(run_ranks):
    (alone,) = run_ranks(1, _scores, 1, 1)
    for scores in run_ranks(4, _scores, 2, 2):
        for ours, theirs in zip(scores, alone, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def _scores(tensor: int, pipeline: int) -> list[list[float]]:
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(QWEN2_TIED, groups=groups, seed=1, trainable=False)
    return [logprobs.tolist() for logprobs in label_logprobs(model, traces(), temperature=1.0, microbatch_tokens=64)]


def two_critic_updates(tensor: int, pipeline: int, microbatch_tokens: int) -> tuple[list[dict[str, float]], list[list[float]]]:
    """The actor's layout plays no part in a critic's step: values leave it trace by trace, advantages and returns come back as columns."""
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(replace(QWEN2_TIED, num_scalars=1, tied=False), groups=groups, seed=1)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=2, eps=1e-3)
    step = [replace(trace, turn_rewards=tuple(range(len(trace.turn_rewards)))) for trace in traces()]
    columns = {"values": [values[:, 0] for values in scalars(model, step, microbatch_tokens=microbatch_tokens)]}
    columns |= generalized_advantages(step, columns, AlgorithmConfig(advantage="gae", gae_lambda=0.9, turn_lambda=0.8))
    shape = {"aggregation": "token", "max_turns": 4, "microbatch_tokens": microbatch_tokens}
    batches = pack_for_rank(step, groups=groups, columns=columns, **shape)
    metrics = [update_critic(model, optimizer, batches, value_clip=0.2) for _ in range(2)]
    return metrics, [advantages.tolist() for advantages in columns["advantages"]]


def test_critic_updates_and_advantages_do_not_change_with_layout_or_microbatches(run_ranks):
    expected, advantages = run_ranks(1, two_critic_updates, 1, 1, 1024)[0]
    assert expected[0]["critic/grad_norm"] > 1e-3
    for world, tensor, pipeline, microbatch_tokens in [(1, 1, 1, 64), (2, 2, 1, 128), (2, 1, 2, 64), (2, 1, 1, 128), (4, 2, 2, 64)]:
        for metrics, ours in run_ranks(world, two_critic_updates, tensor, pipeline, microbatch_tokens):
            for row, theirs in zip(metrics, expected, strict=True):
                assert row == pytest.approx(theirs, rel=2e-5, abs=2e-5), (world, tensor, pipeline, microbatch_tokens)
            for mine, reference in zip(ours, advantages, strict=True):
                assert mine == pytest.approx(reference, abs=2e-5)
