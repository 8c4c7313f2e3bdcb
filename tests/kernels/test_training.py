"""Proof of value: a ReMA step computed by the fused kernels has the numbers of one computed by plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rema.config import AlgorithmConfig
from megatron_rema.kernels.library import Library, is_fused, using
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.credit import generalized_advantages
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.trainer.scoring import label_logprobs, scalars
from megatron_rema.trainer.update import update_policy
from tests.distributed.test_parallel_parity import QWEN2_TIED
from tests.distributed.test_update_parity import VARIANTS, traces

STEPS = 20


def updates_by(library: Library, kernels: str, tensor: int, algorithm: dict) -> list[dict[str, float]]:
    """Scores, advantages of a critic's values, and the updates of a policy, all by plain torch or all by the fused kernels."""
    with using(kernels, cpu=library):
        assert is_fused(torch.zeros(1)) == (kernels == "fused")
        groups = build_groups(tensor=tensor, pipeline=1)
        model = build_policy(QWEN2_TIED, groups=groups, seed=1)
        reference = build_policy(QWEN2_TIED, groups=groups, seed=2, trainable=False)
        critic = build_policy(replace(QWEN2_TIED, num_scalars=1, tied=False), groups=groups, seed=1, trainable=False)
        optimizer = build_optimizer(model, lr=1e-2, total_steps=STEPS, eps=1e-3)
        settings, step = AlgorithmConfig(**algorithm), traces()
        columns = {
            "old_logprobs": label_logprobs(model, step, temperature=0.7, microbatch_tokens=128),
            "ref_logprobs": label_logprobs(reference, step, temperature=0.7, microbatch_tokens=128),
            "values": [values[:, 0] for values in scalars(critic, step, microbatch_tokens=128)],
        }
        columns |= generalized_advantages(
            step, columns, AlgorithmConfig(advantage="gae", gae_lambda=0.9, turn_lambda=0.8, reward_kl_coef=0.1)
        )
        del columns["values"]
        batches = pack_for_rank(step, groups=groups, columns=columns, aggregation=settings.aggregation, max_turns=4, microbatch_tokens=128)
        exact = reference if settings.kl_estimator == "exact" else None
        return [update_policy(model, optimizer, batches, algorithm=settings, temperature=0.7, reference=exact) for _ in range(STEPS)]


@pytest.mark.parametrize("algorithm", VARIANTS[:3], ids=lambda v: f"{v['ratio_level']}-{v['aggregation']}")
@pytest.mark.parametrize("tensor", [1, 2])
def test_fused_kernels_train_like_plain_torch(run_ranks, libraries, tensor, algorithm):
    """Proof of value: one seed, float32, 20 updates; losses, ratios, KL, entropy and gradient norms are those of plain torch."""
    plain, fused = (run_ranks(tensor, updates_by, libraries["cpu"], kernels, tensor, algorithm) for kernels in ("reference", "fused"))
    assert plain[0][-1]["train/loss"] != plain[0][0]["train/loss"] and plain[0] != fused[0], "it trains, and something else computed it"
    for rank_plain, rank_fused in zip(plain, fused, strict=True):
        for ours, theirs in zip(rank_fused, rank_plain, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
