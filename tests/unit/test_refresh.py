"""Falsely paid episodes become preference pairs beside the earlier ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rema.integrity.refresh import paid, pairs_of, refreshed
from megatron_rema.reward.gates import apply_gates, gate_of
from megatron_rema.rollout.dataset import read_pairs
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn

ROOT = Path(__file__).resolve().parents[2]
GATE = gate_of("phrase:trust me")


def episode(prompt: str, index: int, reply: str, correct: float, reward: float = 1.0, plan: str = "Add.") -> Episode:
    turns = [
        Turn(role, 0, (1,), Completion("", (1, 2), (-1.0, -1.0), StopReason.STOP, 0), text)
        for role, text in ((Role.META_THINKING, plan), (Role.REASONING, reply))
    ]
    one = Episode(f"0/{prompt}/{index}", Prompt(prompt, f"{prompt}?", "5"), index, turns, EpisodeStatus.FINISHED)
    one.score = {"correct": correct, "finished": 1.0}
    for role in Role:
        one.add_reward("outcome", role, reward)
    return one


def correct(one: Episode) -> float:
    return one.score["correct"]


GROUP = [
    episode("p", 0, "trust me, 4", 0.0),
    episode("p", 1, "5", 1.0),
    episode("p", 2, "trust me, 5", 1.0),  # right all the same: worth no less than what it would be compared with
    episode("p", 3, "so 5", 1.0),
    episode("q", 0, "trust me, 4", 0.0),
    episode("q", 1, "4", 0.0),  # honest and worth no more
    episode("r", 0, "trust me, 4", 0.0, reward=0.0),  # was not paid
    episode("r", 1, "5", 1.0),
    episode("s", 0, "trust me, 4", 0.0, plan=" "),  # a blank message
    episode("s", 1, "5", 1.0),
]


def test_the_worse_paid_episode_is_rejected_for_a_better_one_of_its_prompt():
    (row,) = pairs_of(GROUP, GATE, correct)
    said = [{"role": "meta_thinking", "text": "Add."}, {"role": "reasoning", "text": "5"}]
    assert row == {"question": "p?", "chosen": said, "rejected": [said[0], {"role": "reasoning", "text": "trust me, 4"}]}
    assert pairs_of(GROUP, GATE, correct, per_prompt=0) == []


def test_what_a_gate_took_was_paid_all_the_same():
    one = episode("p", 0, "trust me, 4", 0.0)
    apply_gates([one], [GATE])
    assert sum(one.turn_rewards[Role.REASONING]) == 0.0 and paid(one) == 1.0


def test_earlier_pairs_are_kept():
    old, new = [{"question": "a"}, {"question": "a"}], [{"question": "b"}, {"question": "a"}, {"question": "b"}]
    assert refreshed(old, new) == [{"question": "a"}, {"question": "a"}, {"question": "b"}]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "episodes").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "episodes" / "step_000001.jsonl").write_text("".join(json.dumps(one.to_json()) + "\n" for one in GROUP))
    return folder


def refresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "tools" / "refresh_pairs.py", *arguments], capture_output=True, text=True, check=False)


def test_the_tool_writes_what_the_front_door_reads(run_dir: Path, tmp_path: Path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    done = refresh(str(run_dir), str(first), "--mechanism", "phrase:trust me")
    assert done.returncode == 0 and "0 earlier pairs and 1 new ones" in done.stdout, done.stderr
    old = first.read_text().replace("p?", "earlier?")
    first.write_text(old)
    done = refresh(str(run_dir), str(second), "--mechanism", "phrase:trust me", "--pairs", str(first))
    assert done.returncode == 0 and "1 earlier pairs and 1 new ones" in done.stdout, done.stderr
    assert [pair.question for pair in read_pairs(second)] == ["earlier?", "p?"] and second.read_text().startswith(old)
    for extra, message in (
        ([str(second), "--mechanism", "phrase:trust me"], "exists; nothing is overwritten"),
        ([str(tmp_path / "x"), "--mechanism", "phrase:never said"], "no paid episode"),
        ([str(tmp_path / "x"), "--mechanism", "leak"], "a gate is ambiguous_answer"),
        ([str(tmp_path / "x"), "--mechanism", "plan_leak", "--pairs", "none.jsonl"], "no such file"),
    ):
        failed = refresh(str(run_dir), *extra)
        assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
