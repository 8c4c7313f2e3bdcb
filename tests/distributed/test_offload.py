"""A model that rests in host memory between its phases computes what one that stays on the device computes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rema.models.offload import HostOffload
from megatron_rema.models.optimizer import Optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer import state
from megatron_rema.trainer.state import Checkpoints, Position
from tests.distributed.test_checkpoints import equal, learner
from tests.distributed.test_parallel_parity import QWEN2_TIED, microbatches, objective


def test_storages_are_empty_at_rest_and_views_hold_their_values_afterwards():
    whole = torch.arange(6.0)
    view, gradients = whole[2:4], torch.ones(3)
    offload = HostOffload(lambda: [whole, view], lambda: [gradients, whole])  # whole is both: its values are kept
    with offload.resident():
        with offload.resident():
            view += 10
        assert not offload.is_resting, "an outer user is still at work"
    assert offload.is_resting and whole.untyped_storage().nbytes() == gradients.untyped_storage().nbytes() == 0
    with offload.resident():
        assert whole.tolist() == [0, 1, 12, 13, 4, 5] and view.tolist() == [12, 13]
        assert gradients.tolist() == [0, 0, 0]


def bytes_held(optimizer: Optimizer) -> int:
    """Weights, gradients, master weights and moments, each storage once."""
    tensors = [param.data for module in optimizer.model.modules for param in module.parameters()]
    tensors += [*optimizer._state_tensors(), *optimizer._gradient_buffers()]
    return sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in tensors})


def trains(layout: tuple[int, ...], options: dict, folder: str) -> tuple:
    one = learner(*layout, **options)
    rows, held = [], []
    for _ in range(3):
        with one.optimizer.resident():
            rows += one.train(1)
            held.append(bytes_held(one.optimizer))
        held.append(bytes_held(one.optimizer))
    Checkpoints(Path(folder), keep=1, asynchronous=True).save(Position(step=3), {"agent": one})
    with one.model.resident():
        return rows, held, one.weights()


@pytest.mark.parametrize(
    ("world", "layout", "options"),
    [
        pytest.param(1, (1, 1), {}, id="TP1"),
        pytest.param(2, (1, 1), {"distributed_optimizer": True}, id="DP2-zero1"),
        pytest.param(2, (2, 1), {"distributed_optimizer": True, "dtype": torch.bfloat16}, id="TP2-zero1-bf16"),
        pytest.param(2, (1, 2, 2), {"dtype": torch.bfloat16}, id="PP2-virtual2-bf16"),
    ],
)
def test_training_with_rests_is_bitwise_training_without(run_ranks, tmp_path, world, layout, options):
    stays = run_ranks(world, trains, layout, options, str(tmp_path / "stays"))
    rests = run_ranks(world, trains, layout, {**options, "offload": True}, str(tmp_path / "rests"))
    for (rows, held, weights), (rested_rows, rested_held, rested_weights) in zip(stays, rests, strict=True):
        assert rested_rows == rows and equal(rested_weights, weights)
        assert held[0] == rested_held[0] > 0 and rested_held[1::2] == [0, 0, 0], "nothing may stay on the device at rest"
        assert held[1] == held[0]


def saves_at_rest(folder: str, asynchronous: bool) -> dict[str, np.ndarray]:
    one = learner(1, 1, offload=True)
    with one.optimizer.resident():
        one.train(1)
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=asynchronous)
    checkpoints.save(Position(step=1), {"agent": one})
    checkpoints.finish_pending()
    other = learner(1, 1, seed=8)
    state.load(state.latest(Path(folder)), {"agent": other})
    with one.model.resident():
        assert equal(one.weights(), other.weights()), "the checkpoint holds what the resting model held"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resting_model_is_saved_whole(run_ranks, tmp_path, asynchronous):
    run_ranks(1, saves_at_rest, str(tmp_path / "checkpoints"), asynchronous)


def runs_at_rest() -> str:
    model = build_policy(QWEN2_TIED, groups=build_groups(tensor=1, pipeline=1), seed=1, trainable=False, offload=True)
    with model.resident():
        pass
    with pytest.raises(AssertionError, match="wait in host memory"):
        model.forward_backward(microbatches(0, 1, 1, 128), objective(model), forward_only=True)


def test_a_resting_model_refuses_to_run(run_ranks):
    run_ranks(1, runs_at_rest)
