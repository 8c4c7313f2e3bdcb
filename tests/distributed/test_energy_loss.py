"""The energy loss of the last MLP block is one number whatever the layout, and reading it changes nothing of the update.

fp32; 0.79 before and 0.81 after one step, over about 100 tokens: layouts differ in the order of sums only, 1e-8 seen.
"""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from megatron_rema.config import AlgorithmConfig
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel import pipeline
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.experience import pack, pack_for_rank
from megatron_rema.trainer.update import update_policy
from tests.distributed.test_parallel_parity import QWEN2_TIED
from tests.distributed.test_update_parity import traces

ENERGY = "integrity/energy_loss_raw"


def updates(tensor: int, pipeline_size: int, with_energy: bool = True, microbatch_tokens: int = 128, **options) -> list[dict[str, float]]:
    """Two optimizer steps: the second sees weights that moved."""
    groups = build_groups(tensor=tensor, pipeline=pipeline_size)
    model = build_policy(QWEN2_TIED, groups=groups, seed=1, **options)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=2, eps=1e-3)
    batches = pack_for_rank(traces(), groups=groups, aggregation="turn", max_turns=4, microbatch_tokens=microbatch_tokens)
    shape = {"algorithm": AlgorithmConfig(), "temperature": 0.7}
    rows = [update_policy(model, optimizer, batches, **shape, with_energy=with_energy) for _ in range(2)]
    assert not model.modules[-1].decoder.layers[-1].mlp._forward_hooks, "nothing stays behind"
    return rows


def with_recomputation(*layout) -> list[dict[str, float]]:
    return updates(*layout, recompute=True)


def with_sequence_parallelism(*layout) -> list[dict[str, float]]:
    return updates(*layout, sequence_parallel=True, recompute=True)


def with_virtual_stages(*layout) -> list[dict[str, float]]:
    return updates(*layout, virtual=2)


def by_hand() -> float:
    """Trace by trace, token by token, before any update."""
    model = build_policy(QWEN2_TIED, groups=build_groups(tensor=1, pipeline=1), seed=1)
    kept = []
    model.module.decoder.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: kept.append((inputs[0], output[0])))
    losses = []
    for trace in traces():
        with torch.no_grad():
            pipeline.run(model.module, pack([trace], len(trace.token_ids) - 1))
        taken_in, given_out = kept.pop()
        own = [position for position, mine in enumerate(trace.loss_mask[1:]) if mine]
        losses += [float(taken_in[i].abs().mean() - given_out[i].abs().mean()) for i in own]
    return fmean(losses)


def test_energy_loss_is_the_same_at_every_layout_and_costs_the_update_no_bit(run_ranks):
    (expected,) = run_ranks(1, updates, 1, 1)
    assert expected[0][ENERGY] == pytest.approx(run_ranks(1, by_hand)[0], rel=1e-5)
    assert abs(expected[1][ENERGY] - expected[0][ENERGY]) > 1e-3, "it moves with the weights"
    (without,) = run_ranks(1, updates, 1, 1, False)
    assert without == [{name: value for name, value in row.items() if name != ENERGY} for row in expected]
    for run, world, layout in [
        (with_recomputation, 1, (1, 1)),
        (updates, 2, (2, 1)),
        (updates, 2, (2, 1)),
        (updates, 2, (1, 2)),
        (with_virtual_stages, 2, (1, 2)),
        (updates, 2, (1, 1)),
        (with_sequence_parallelism, 4, (2, 2)),
    ]:
        for rows in run_ranks(world, run, *layout):
            for ours, theirs in zip(rows, expected, strict=True):
                assert ours[ENERGY] == pytest.approx(theirs[ENERGY], rel=1e-6), (run.__name__, world, layout)
