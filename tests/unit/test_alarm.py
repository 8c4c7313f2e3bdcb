"""What a step's metrics make the trainer say aloud."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rema.trainer.alarms import UNCLIPPED_STEPS, Alarms
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder


def alarms(folder: Path, *, updates: int) -> Alarms:
    config = SimpleNamespace(  # what an alarm looks at
        trainer=SimpleNamespace(minibatches_per_step=updates),
        engine=SimpleNamespace(logprob_gap_alarm=0.05),
        algorithm=SimpleNamespace(ratio_level="turn"),
    )
    return Alarms(config, RunFolder(folder, writes=True), Reporter(speaks=False))


def alerts(folder: Path) -> list[dict]:
    file = folder / "alerts.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(one: Alarms, clipped: list[float], *, after: int = 0) -> None:
    for step, value in enumerate(clipped, start=after + 1):
        one.look(step, {"train/meta_thinker/turn_ratio_clipped_frac": 0.0, "train/reasoner/turn_ratio_clipped_frac": value})


def test_a_clip_that_never_acts_is_said_once_when_it_could_have(tmp_path):
    one = alarms(tmp_path, updates=2)
    run(one, [0.0] * (UNCLIPPED_STEPS - 1) + [0.1])
    assert alerts(tmp_path) == [], "the last step clipped one policy's ratios"
    run(one, [0.0] * (2 * UNCLIPPED_STEPS), after=UNCLIPPED_STEPS)
    assert alerts(tmp_path) == [{"step": 2 * UNCLIPPED_STEPS, "alert": "clip_never_acts", "steps": UNCLIPPED_STEPS}]


def test_with_one_update_a_rollout_no_ratio_can_be_clipped_and_nothing_is_said(tmp_path):
    run(alarms(tmp_path, updates=1), [0.0] * (2 * UNCLIPPED_STEPS))
    assert alerts(tmp_path) == []


@pytest.mark.parametrize(("gap", "expected"), [(0.05, 0), (0.06, 1), (float("nan"), 1)])
def test_a_gap_between_engine_and_trainer_is_said(gap, expected, tmp_path):
    alarms(tmp_path, updates=1).look(1, {"sync/logprob_gap_max": gap})
    assert [row["alert"] for row in alerts(tmp_path)] == ["logprob_gap"] * expected
