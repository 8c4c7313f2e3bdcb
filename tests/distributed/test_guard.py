"""The way back of integrity.mode=guard: weights and optimizer are bitwise those of the clean step, and the counts of the run go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rema.config import IntegrityConfig
from megatron_rema.trainer.guard import FOLDER, Guard
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.state import Position
from tests.distributed.test_checkpoints import Learner, equal, learner

SETTINGS = IntegrityConfig(mode="guard", keep_clean_checkpoints=2)


def trains(one: Learner, steps: int = 1) -> list[tuple[float, float]]:
    with one.optimizer.resident():
        return one.train(steps)


def weights_of(one: Learner) -> dict[str, np.ndarray]:
    with one.optimizer.resident():
        return one.weights()


def goes_back(folder: str, layout: tuple[int, int], options: dict) -> tuple:
    one = learner(*layout, **options)
    guard = Guard(SETTINGS, RunFolder(folder, writes=True), step=0)
    position = Position(baselines={"reasoning": [1.0, 2.0]})
    for _ in range(3):
        trains(one)
        position.step += 1
        guard.keep(position, {"agent": one})
    assert guard.steps() == [2, 3], "the newest two"
    trains(one)
    position.step, position.prompts_taken, position.baselines = 4, 40, {"reasoning": [9.0, 9.0]}
    guard.roll_back(2, position, {"agent": one})
    assert guard.steps() == [2], "what came after is of the course that was left"
    assert position == Position(step=4, prompts_taken=40, baselines={"reasoning": [1.0, 2.0]})
    return weights_of(one), trains(one, 2)


def goes_straight(layout: tuple[int, int], options: dict) -> tuple:
    one = learner(*layout, **options)
    trains(one, 2)
    return weights_of(one), trains(one, 2)


@pytest.mark.parametrize(
    ("world", "layout", "options"),
    [
        pytest.param(1, (1, 1), {}, id="TP1"),
        pytest.param(4, (2, 2), {}, id="TP2PP2"),
        pytest.param(1, (1, 1), {"offload": True}, id="offload"),
    ],
)
def test_after_a_roll_back_training_goes_on_as_from_the_clean_step(run_ranks, tmp_path, world, layout, options):
    expected = run_ranks(world, goes_straight, layout, options)
    found = run_ranks(world, goes_back, str(tmp_path), layout, options)
    for (weights, rows), (expected_weights, expected_rows) in zip(found, expected, strict=True):
        assert equal(weights, expected_weights) and rows == expected_rows


def forgets(folder: str) -> list[int]:
    one, run = learner(), RunFolder(folder, writes=True)
    guard = Guard(SETTINGS, run, step=0)
    for step in (1, 2):
        guard.keep(Position(step=step), {"agent": one})
    return Guard(SETTINGS, run, step=1).steps()


def test_a_resumed_run_forgets_the_clean_steps_that_it_does_again(run_ranks, tmp_path):
    assert run_ranks(1, forgets, str(tmp_path)) == [[1]]
    assert (Path(tmp_path) / FOLDER / "latest").read_text() == "step_000001"
