"""Logits of the Megatron policy on packed input against transformers on each sequence alone, at every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import load_hf
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.types import Batch
from tests.tiny_models import TINY_MODELS, save_tiny_model

LENGTHS = (101, 1, 36, 6)  # the last one plays the padding: T = 144 is a multiple of 8 * TP
# float32 sums of at most 128 terms in another order, over two layers: 2e-6 to 5e-6 seen on logits up to 5; a wrong layout gives 0.1 or more
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=TINY_MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], np.ndarray]:
    """The folder, the packed tokens [T] and what transformers makes of them [T, V]."""
    path = save_tiny_model(tmp_path_factory.mktemp("hf") / request.param, request.param)
    tokens = torch.randint(0, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return path, tokens.tolist(), _reference(path, tokens)


@torch.no_grad()
def _reference(path: Path, tokens: torch.Tensor) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return torch.cat([model(sequence[None]).logits[0] for sequence in tokens.split(LENGTHS)]).numpy()


def packed(tokens: list[int]) -> Batch:
    num_tokens = len(tokens)
    return Batch(
        tokens=torch.tensor(tokens),
        labels=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in LENGTHS]),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        max_seqlen=max(LENGTHS),
        loss_mask=torch.zeros(num_tokens, dtype=torch.bool),
        turn_ids=torch.full((num_tokens,), -1),
        trace_ids=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        cu_turns=torch.tensor([0, num_tokens]),
    )


def _logits(path: Path, tokens: list[int], tensor: int, pipeline: int, sequence_parallel: bool) -> np.ndarray | None:
    """[T, padded vocabulary] on ranks of the last stage, None elsewhere."""
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    policy = build_policy(arch, groups=groups, dtype=torch.float32, trainable=False, seed=1, sequence_parallel=sequence_parallel)
    load_hf(policy.module, arch, path, groups)
    results = policy.forward_backward([packed(tokens)], lambda x, _: (x.sum(), {"logits": x.detach().clone()}), forward_only=True)
    if not results:
        return None
    local = results[0]["logits"].contiguous()
    shards = [torch.empty_like(local) for _ in range(tensor)]
    dist.all_gather(shards, local, group=groups.tp)
    return torch.cat(shards, dim=1).numpy()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence_parallel"), [(1, 1, False), (2, 1, False), (1, 2, False), (2, 2, False), (2, 2, True)]
)
def test_logits_equal_transformers(run_ranks: Callable, checkpoint: tuple, tensor: int, pipeline: int, sequence_parallel: bool):
    path, tokens, theirs = checkpoint
    returned = run_ranks(tensor * pipeline, _logits, path, tokens, tensor, pipeline, sequence_parallel)
    last_stage = [logits for logits in returned if logits is not None]
    assert len(last_stage) == tensor
    for ours in last_stage:
        assert np.abs(ours[:, :101] - theirs).max() < TOLERANCE
        assert not ours[:, 101:].any()  # padding rows of the output layer are zero


def test_llama3_rope_scaling_shows_in_these_logits(tmp_path: Path):
    """Guards the test above: without scaling the reference moves by far more than the tolerance."""
    path = save_tiny_model(tmp_path / "hf", "llama3")
    tokens = torch.randint(0, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    scaled = _reference(path, tokens)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (path / "config.json").write_text(json.dumps(config))
    assert np.abs(_reference(path, tokens) - scaled).max() > 100 * TOLERANCE
