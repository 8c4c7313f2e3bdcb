"""An update whose numbers are not finite changes nothing and names the token where that began, at every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_rema.config import AlgorithmConfig
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.learning import update
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.state import Position
from megatron_rema.types import Role, Trace
from tests.distributed.test_parallel_parity import QWEN2
from tests.distributed.test_update_parity import traces

POISON = 69  # a token whose embedding is NaN
PLACE = 3  # where trace 5 reads it


def step_traces() -> list[Trace]:
    """`traces`, without that token but in trace 5."""
    made = []
    for number, trace in enumerate(traces()):
        ids = [token % POISON for token in trace.token_ids]
        if number == 5:
            ids[PLACE] = POISON
        made.append(replace(trace, token_ids=tuple(ids)))
    return made


def one_update(folder: Path, tensor: int, pipeline: int, poisoned: bool):
    """(metrics, whether any weight changed) of an update of the trainer's, with alerts written to ``folder``."""
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(QWEN2, groups=groups, seed=1)
    optimizer = build_optimizer(model, lr=1e-2, total_steps=1)
    if poisoned:
        for module in model.modules:
            for name, param in module.named_parameters():
                if name.endswith("word_embeddings.weight"):
                    first = groups.tensor_rank * param.shape[0]
                    if first <= POISON < first + param.shape[0]:
                        param.data[POISON - first] = torch.nan
    before = [param.detach().clone() for module in model.modules for param in module.parameters()]
    study = SimpleNamespace(
        config=SimpleNamespace(
            algorithm=AlgorithmConfig(),
            rollout=SimpleNamespace(max_rounds=4, temperature=0.7),
            trainer=SimpleNamespace(microbatch_tokens=128, token_budget=0),
            critic=SimpleNamespace(warmup_steps=0),
        ),
        position=Position(),
        folder=RunFolder(folder, writes=dist.get_rank() == 0),
        reporter=Reporter(speaks=False),
        monitor=None,
    )
    policy = SimpleNamespace(name="shared", model=model, optimizer=optimizer, reference=None, critic=None)
    metrics = update(study, policy, step_traces(), {})
    now = [param.detach() for module in model.modules for param in module.parameters()]
    return metrics["train/skipped_updates"], all(a.nan_to_num(7.0).equal(b.nan_to_num(7.0)) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize(("tensor", "pipeline", "world"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 2)], ids=["one", "tp2", "pp2", "dp2"])
def test_a_nan_is_named_by_episode_role_turn_and_token(run_ranks, tmp_path, tensor, pipeline, world):
    for skipped, unchanged in run_ranks(world, one_update, tmp_path, tensor, pipeline, True):
        assert skipped == 1.0 and unchanged
    (row,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    poisoned = step_traces()[5]
    token = next(i for i in range(PLACE + 1, len(poisoned.token_ids)) if poisoned.loss_mask[i])  # the first trained one behind it
    assert (row["step"], row["alert"], row["model"], row["traces"]) == (1, "update_skipped", "policy shared", 1)
    assert row["places"] == [
        {
            "quantity": "logprobs",
            "episode_id": "5",
            "role": str(Role.REASONING),
            "turn": poisoned.turn_ids[token],
            "token": token,
            "token_id": poisoned.token_ids[token],
            "value": "nan",
            "tokens": sum(poisoned.loss_mask[token:]),  # attention hands it on to every later one, and to no other trace of the batch
        }
    ]


def test_a_healthy_update_says_nothing(run_ranks, tmp_path):
    ((skipped, unchanged),) = run_ranks(1, one_update, tmp_path, 1, 1, False)
    assert skipped == 0.0 and not unchanged
    assert not (tmp_path / "alerts.jsonl").exists()
