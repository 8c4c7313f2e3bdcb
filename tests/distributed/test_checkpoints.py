"""Checkpoints are exact, whole or absent, checked before they are used, and never the last one deleted."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rema.architecture import Architecture
from megatron_rema.models.optimizer import Optimizer, build_optimizer
from megatron_rema.models.policy import ParallelModel, build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer import manifest, state
from megatron_rema.trainer.faults import TooManySkips
from megatron_rema.trainer.inputs import Source
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.state import Checkpoints, Position
from tests.distributed.test_parallel_parity import QWEN2_TIED, REWARD_MODEL, gather, microbatches, objective


@dataclass
class Learner:
    model: ParallelModel
    optimizer: Optimizer

    def train(self, steps: int = 1) -> list[tuple[float, float]]:
        """(loss on this rank's microbatches, gradient norm) of each step."""
        groups = self.model.groups
        rows = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            batches = microbatches(groups.data_rank, groups.data_size, 2, 64)
            outputs = self.model.forward_backward(batches, objective(self.model))
            rows.append((sum(float(row["loss"]) for row in outputs), self.optimizer.step().grad_norm))
        return rows

    def weights(self) -> dict[str, np.ndarray]:
        return gather(self.model, lambda param: param.data.float().clone())  # numpy would pin the storage

    def adam(self) -> dict[str, np.ndarray]:
        """Adam's moments as whole tensors, of the plain fp32 optimizer."""
        states = {param: state for part in self.optimizer.megatron.chained_optimizers for param, state in part.optimizer.state.items()}
        first = gather(self.model, lambda param: states[param]["exp_avg"])
        second = gather(self.model, lambda param: states[param]["exp_avg_sq"])
        return {**{f"{name}/first": value for name, value in first.items()}, **{f"{name}/second": value for name, value in second.items()}}


def learner(tensor: int = 1, pipeline: int = 1, virtual: int = 1, *, seed: int = 7, arch: Architecture = QWEN2_TIED, **options) -> Learner:
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, seed=seed, virtual=virtual, **options)
    return Learner(model, build_optimizer(model, lr=1e-2, warmup_steps=3, schedule="cosine", total_steps=10, weight_decay=0.1))


POSITION = Position(step=2, prompts_taken=5, par_references={"reasoning": [0.1, 1 / 3]}, kl_coefs={"agent": 0.1 + 0.2})


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


# --- exact ------------------------------------------------------------------------------------------------------------


def saves_and_goes_on(folder: str, layout: tuple[int, ...], options: dict, asynchronous: bool) -> tuple:
    one = learner(*layout, **options)
    one.train(2)
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=asynchronous)
    checkpoints.save(POSITION, {"agent": one})
    after = one.train(2)  # changes every tensor while an asynchronous save may still be writing
    checkpoints.finish_pending()
    return after, one.weights()


def resumes(folder: str, layout: tuple[int, ...], options: dict) -> tuple:
    other = learner(*layout, seed=8, **options)
    position = state.load(state.latest(Path(folder)), {"agent": other})
    assert position == POSITION, "to the bit"
    return other.train(2), other.weights()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize(
    ("world", "layout", "options"),
    [
        pytest.param(1, (1, 1), {}, id="TP1"),
        pytest.param(1, (1, 1), {"dtype": torch.bfloat16}, id="bf16"),
        pytest.param(2, (1, 1), {"distributed_optimizer": True}, id="DP2-zero1"),
        pytest.param(2, (2, 1), {"distributed_optimizer": True, "dtype": torch.bfloat16}, id="TP2-zero1-bf16"),
        pytest.param(4, (2, 2), {"sequence_parallel": True}, id="TP2PP2"),
        pytest.param(2, (1, 2, 2), {}, id="PP2-virtual2"),
    ],
)
def test_steps_after_a_resume_are_bitwise_those_of_the_uninterrupted_run(run_ranks, tmp_path, world, layout, options, asynchronous):
    expected = run_ranks(world, saves_and_goes_on, str(tmp_path), layout, options, asynchronous)
    found = run_ranks(world, resumes, str(tmp_path), layout, options)
    for (rows, weights), (expected_rows, expected_weights) in zip(found, expected, strict=True):
        assert rows == expected_rows and all(norm > 0 for _, norm in rows)
        assert equal(weights, expected_weights)


def trained_once(folder: str) -> tuple:
    one = learner()
    one.train(2)
    state.Checkpoints(Path(folder), keep=1).save(Position(step=2), {"agent": one})
    return one.weights(), one.adam()


def loads_and_saves(source: str, target: str, layout: tuple[int, ...]) -> tuple:
    other = learner(*layout, seed=8)
    position = state.load(state.latest(Path(source)), {"agent": other})
    state.Checkpoints(Path(target), keep=1).save(position, {"agent": other})
    return other.weights(), other.adam(), other.optimizer.lr


def test_weights_and_adam_moments_are_bitwise_the_same_from_tp1_to_other_layouts_and_back(run_ranks, tmp_path):
    start, cut, interleaved, back = (str(tmp_path / name) for name in ("start", "cut", "interleaved", "back"))
    ((weights, moments),) = run_ranks(1, trained_once, start)
    assert any(np.abs(value).max() > 0 for value in moments.values())
    for world, source, target, layout in (
        (4, start, cut, (2, 2)),
        (2, cut, interleaved, (1, 2, 2)),
        (1, interleaved, back, (1, 1)),
    ):
        for found_weights, found_moments, lr in run_ranks(world, loads_and_saves, source, target, layout):
            assert equal(found_weights, weights) and equal(found_moments, moments)
            assert lr == pytest.approx(1e-2 * 2 / 3)  # second of three warm-up steps


def loads_before_its_first_step(folder: str, options: dict) -> None:
    one = learner(**options)
    expected = one.weights()
    state.Checkpoints(Path(folder), keep=1).save(Position(), {"agent": one})
    rows = one.train(2)
    other = learner(seed=8, **options)
    state.load(Path(folder) / "step_000000", {"agent": other})
    assert equal(other.weights(), expected) and other.train(2) == rows


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"distributed_optimizer": True}], ids=["plain", "bf16", "zero1"])
def test_a_model_that_was_not_updated_yet_resumes_too(run_ranks, tmp_path, options):
    run_ranks(2, loads_before_its_first_step, str(tmp_path), options)


def two_learners(folder: str) -> None:
    policy, critic = learner(2, 1, seed=1), learner(1, 2, seed=2, arch=REWARD_MODEL)
    expected = policy.weights(), critic.weights()
    state.Checkpoints(Path(folder), keep=1).save(Position(step=1), {"agent": policy, "agent_critic": critic})
    policy.train()
    critic.train()
    assert not equal(policy.weights(), expected[0]) and not equal(critic.weights(), expected[1])
    state.load(Path(folder) / "step_000001", {"agent": policy, "agent_critic": critic})
    assert equal(policy.weights(), expected[0]) and equal(critic.weights(), expected[1])
    with pytest.raises(ValueError, match=r"holds agent, agent_critic; this run trains agent: resume with"):
        state.load(Path(folder) / "step_000001", {"agent": policy})


def test_a_policy_and_its_critic_at_another_layout_share_a_checkpoint(run_ranks, tmp_path):
    run_ranks(2, two_learners, str(tmp_path))


# --- checked ----------------------------------------------------------------------------------------------------------

KINDS = {  # every kind of file in a checkpoint -> the one that is damaged
    "state.json": "state.json",
    "manifest.json": "manifest.json",
    "weights": "agent/__0_0.distcp",
    "second-rank": "agent/__1_0.distcp",
    "index": "agent/.metadata",
    "common": "agent/common.pt",
    "format": "agent/metadata.json",
}


def three_checkpoints(folder: str) -> None:
    one = learner(2)  # tensor parallel: both ranks write (of replicas, one does)
    checkpoints = Checkpoints(Path(folder), keep=3)
    for step in (1, 2, 3):
        one.train()
        checkpoints.save(Position(step=step), {"agent": one})


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def checkpoints(run_ranks, kept, tmp_path) -> Path:
    """Whole checkpoints of steps 1, 2 and 3, written by two ranks."""
    if not (kept / "latest").exists():
        run_ranks(2, three_checkpoints, str(kept))
    return Path(shutil.copytree(kept, tmp_path / "checkpoints"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(len(content))
    content[place] ^= 1 << 3
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def lengthen(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\n")


DAMAGES = {"flipped": flip, "truncated": truncate, "emptied": lambda f: f.write_bytes(b""), "too-long": lengthen, "missing": Path.unlink}


def test_the_damage_below_is_done_to_every_kind_of_file(checkpoints):
    newest = checkpoints / "step_000003"
    files = {str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file()}
    assert {name.replace("_1.distcp", "_0.distcp") for name in files} == set(KINDS.values())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_by_name_and_the_checkpoint_before_is_offered(checkpoints, kind, damage):
    newest, file = checkpoints / "step_000003", checkpoints / "step_000003" / KINDS[kind]
    if kind == "manifest.json" and damage == "too-long":
        file.write_bytes(file.read_bytes() + b"{}")  # white space after JSON is no damage
    else:
        DAMAGES[damage](file)
    assert state.latest(checkpoints) == newest  # never skipped in silence
    with pytest.raises(ValueError) as refused:
        state.load(newest, {})
    assert f"checkpoint file {file} " in str(refused.value)
    assert f"continue from there with resume=true resume_from={checkpoints / 'step_000002'}" in str(refused.value)
    assert "Nothing was restored" in str(refused.value)


def test_a_damaged_checkpoint_is_not_offered(checkpoints):
    for step in (2, 3):
        flip(checkpoints / f"step_00000{step}" / "agent" / "__0_0.distcp")
    assert state.previous(checkpoints / "step_000003") == checkpoints / "step_000001"
    truncate(checkpoints / "step_000001" / "state.json")
    with pytest.raises(ValueError, match="no whole checkpoint before it is in"):
        state.load(checkpoints / "step_000003", {})


def refuses_on_every_rank(path: str) -> str:
    one = learner(2, seed=3)
    before = one.weights()
    with pytest.raises(ValueError) as refused:
        state.load(Path(path), {"agent": one})
    assert equal(one.weights(), before)
    return str(refused.value)


def test_every_rank_refuses_with_the_same_words_and_keeps_its_weights(run_ranks, checkpoints):
    flip(checkpoints / "step_000003" / "agent" / "__1_0.distcp")
    first, second = run_ranks(2, refuses_on_every_rank, str(checkpoints / "step_000003"))
    assert first == second and "__1_0.distcp is corrupted" in first


def test_the_manifest_holds_what_sha256sum_says(checkpoints):
    stored = json.loads((checkpoints / "step_000002" / "manifest.json").read_text())
    for name, row in stored["files"].items():
        assert manifest.seal(checkpoints / "step_000002" / name) == (row["size"], row["sha256"])


# --- kept -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pointer", [None, b"", b"step_0000", b"\0\0\0\0", b"step_000009", b"\xff\xfe", b".."])
def test_a_torn_pointer_falls_back_to_the_newest_whole_checkpoint(checkpoints, pointer):
    (checkpoints / "latest").unlink() if pointer is None else (checkpoints / "latest").write_bytes(pointer)
    assert state.latest(checkpoints) == checkpoints / "step_000003"
    truncate(checkpoints / "step_000003" / "agent" / "__0_0.distcp")
    assert state.latest(checkpoints) == checkpoints / "step_000002"


def test_there_is_no_latest_checkpoint_before_the_first(tmp_path):
    assert state.latest(tmp_path) is None


def saves_step_four(folder: str, keep: int) -> list[str]:
    one = learner()
    (Path(folder) / ".partial_step_000002" / "agent").mkdir(parents=True)
    (Path(folder) / ".partial_removed_step_000001").mkdir()
    state.Checkpoints(Path(folder), keep=keep).save(Position(step=4), {"agent": one})
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [
        (1, (), (4,)),
        (2, (), (3, 4)),
        (9, (), (1, 2, 3, 4)),
        (2, (3,), (2, 3, 4)),  # the damaged one does not count
        (1, (1, 2, 3), (4,)),
    ],
)
def test_a_save_keeps_the_newest_whole_ones_and_clears_what_killed_saves_left(run_ranks, checkpoints, keep, damaged, left):
    for step in damaged:
        truncate(checkpoints / f"step_00000{step}" / "state.json")
    (names,) = run_ranks(1, saves_step_four, str(checkpoints), keep)
    assert names == ["latest", *(f"step_00000{step}" for step in left)]
    assert (checkpoints / "latest").read_text() == "step_000004" and manifest.fault(checkpoints / "step_000004") is None


def goes_back(run_dir: str) -> tuple[Position, Position]:
    one, folder = learner(2), RunFolder(run_dir, writes=dist.get_rank() == 0)
    chosen = state.restore(SimpleNamespace(resume=True, resume_from=f"{run_dir}/checkpoints/step_000002"), {"agent": one}, folder)
    return chosen, state.restore(SimpleNamespace(resume=True, resume_from=None), {"agent": one}, folder)


def test_a_run_that_resumes_from_the_offered_checkpoint_continues_there_from_then_on(run_ranks, checkpoints):
    flip(checkpoints / "step_000003" / "agent" / "__1_0.distcp")
    (checkpoints / "step_000001.bak").mkdir()  # a folder of the user's own does no harm
    folder = RunFolder(checkpoints.parent, writes=True)
    for step in (1, 2, 3):
        folder.metrics({"step": step})
    for chosen, latest in run_ranks(2, goes_back, str(checkpoints.parent)):
        assert chosen == latest == Position(step=2)
    assert [row["step"] for row in folder.read("metrics.jsonl")] == [1, 2]
    assert (checkpoints / "set_aside_step_000003").is_dir() and not (checkpoints / "step_000003").exists()


def test_going_back_sets_later_checkpoints_aside(checkpoints):
    state.set_aside_after(checkpoints, 1)
    names = {path.name for path in checkpoints.iterdir()}
    assert names == {"latest", "step_000001", "set_aside_step_000002", "set_aside_step_000003"}
    assert state.latest(checkpoints) == checkpoints / "step_000001"


def goes_on_with(run_dir: str, file: str, rows: list[list[str]]) -> str:
    """Resumes with the rows that this rank read; the message that refuses them, or the content that the position counts in."""
    one, folder = learner(2), RunFolder(run_dir, writes=dist.get_rank() == 0)
    source = Source.of("task.train_file", file, rows[dist.get_rank()])
    try:
        return state.restore(SimpleNamespace(resume=True, resume_from=None), {"agent": one}, folder, source).data
    except ValueError as refused:
        return str(refused)


def saves_with_data(folder: str, content: str) -> None:
    state.Checkpoints(Path(folder) / "checkpoints", keep=1).save(Position(step=1, data=content), {"agent": learner(2)})


def test_a_run_goes_on_only_among_the_examples_that_it_began_with_and_that_all_ranks_read(run_ranks, tmp_path):
    whole, cut = ["one", "two", "three"], ["one", "two"]
    content = Source.of("task.train_file", "train.jsonl", whole).content
    run_ranks(2, saves_with_data, str(tmp_path), content)
    row = tmp_path / "metrics.jsonl"
    row.write_text('{"step": 1}\n{"step": 2}\n')
    for rows, words in (
        ([cut, cut], ("task.train_file train.jsonl holds 2 rows", "drew from 3 rows", "give the file that the run began with")),
        ([whole, cut], ("holds 2 rows", "on rank 1 and 3 rows", "on rank 0", "all ranks must read the same")),
    ):
        first, second = run_ranks(2, goes_on_with, str(tmp_path), "train.jsonl", rows)
        assert first == second and all(word in first for word in words), first
        assert row.read_text().count("\n") == 2, "nothing was cut"
    assert run_ranks(2, goes_on_with, str(tmp_path), "train.jsonl", [whole, whole]) == [content, content]
    assert row.read_text().count("\n") == 1


# --- whole or absent --------------------------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def killed_in_save(folder: str, victim: int, moment: int, asynchronous: bool) -> int:
    """Step 4 from step 3, at TP2; ``victim`` kills itself just before its ``moment``-th change of the file system.

    Returns how many changes this rank made.
    """
    one = learner(2)
    position = state.load(Path(folder) / "step_000003", {"agent": one})
    one.train()
    count = 0

    def strike(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            count += 1
            if count == moment and dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(strike)  # for the rest of this process
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=asynchronous)
    checkpoints.save(Position(step=position.step + 1), {"agent": one})
    checkpoints.finish_pending()
    return count


def loads_the_latest(folder: str) -> tuple[int, list, list[str]]:
    one = learner(seed=9)
    position = state.load(state.latest(Path(folder)), {"agent": one})
    weights = one.weights()
    state.Checkpoints(Path(folder), keep=1).save(Position(step=5), {"agent": one})
    return position.step, weights, sorted(path.name for path in Path(folder).iterdir())


def weights_of(folder: str, step: int) -> dict[str, np.ndarray]:
    one = learner(seed=9)
    state.load(Path(folder) / f"step_00000{step}", {"agent": one})
    return one.weights()


@pytest.mark.parametrize(
    ("victim", "asynchronous", "every"),
    [
        pytest.param(0, False, 1, id="first"),
        pytest.param(1, False, 1, id="second"),
        pytest.param(0, True, 4, id="asynchronous"),  # one change in four, to save time
    ],
)
def test_a_rank_killed_at_any_change_of_the_disk_leaves_a_whole_checkpoint(run_ranks, checkpoints, tmp_path, victim, asynchronous, every):
    whole_run = shutil.copytree(checkpoints, tmp_path / "whole")
    changes = run_ranks(2, killed_in_save, str(whole_run), victim, 0, asynchronous)[victim]
    assert [path.name for path in sorted(whole_run.glob("step_*"))] == ["step_000004"] and changes >= (2 if victim else 20)
    expected = {
        3: run_ranks(1, weights_of, str(checkpoints), 3)[0],
        4: run_ranks(1, weights_of, str(whole_run), 4)[0],
    }
    assert not equal(expected[3], expected[4])
    found = []
    for moment in range(1, changes + 1, every):
        folder = shutil.copytree(checkpoints, tmp_path / f"killed_{moment}")
        with pytest.raises(pytest.fail.Exception, match=r"died with exit codes|failed:"):
            run_ranks(2, killed_in_save, str(folder), victim, moment, asynchronous)
        ((step, weights, names),) = run_ranks(1, loads_the_latest, str(folder))
        assert equal(weights, expected[step]), f"killed before change {moment} of {changes}"
        assert names == ["latest", "step_000005"]
        found.append(step)
    assert found[0] == 3 and found == sorted(found)
    if victim == 0:
        assert found[-1] == 4  # killed while it deleted the old ones


# --- asynchronous -----------------------------------------------------------------------------------------------------


def slow_disk(folder: str) -> tuple[list[bool], float]:
    """A save whose files take half a second, polled: what was there at each poll, and how long the caller was held."""
    one = learner(2)
    inner, state.manifest.seal = state.manifest.seal, lambda file: (time.sleep(0.5 * dist.get_rank()), inner(file))[1]
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=True)
    began = time.perf_counter()
    checkpoints.save(Position(step=1), {"agent": one})
    held = time.perf_counter() - began
    there = []
    for _ in itertools.count():
        done = checkpoints.finish_pending(wait=False)
        there.append((Path(folder) / "step_000001").exists())
        if done:
            break
        one.train()
    assert checkpoints.finish_pending() is None
    return there, held


def test_training_goes_on_while_an_asynchronous_save_is_written(run_ranks, tmp_path):
    first, second = run_ranks(2, slow_disk, str(tmp_path))
    assert first[0] == second[0], "ranks must agree on when the checkpoint came to be"
    assert len(first[0]) > 2 and first[0] == [False] * (len(first[0]) - 1) + [True]
    assert first[1] < 0.5 and state.latest(tmp_path).name == "step_000001"


def stops_itself(folder: str) -> None:
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=True)
    with pytest.raises(TooManySkips), checkpoints.finished():
        checkpoints.save(Position(step=1), {"agent": learner(2)})
        raise TooManySkips("on every rank")


def test_a_run_that_stops_itself_finishes_the_checkpoint_that_is_being_written(run_ranks, tmp_path):
    run_ranks(2, stops_itself, str(tmp_path))
    assert state.latest(tmp_path).name == "step_000001" and manifest.fault(tmp_path / "step_000001") is None


def full_disk(folder: str, asynchronous: bool) -> str:
    one = learner(2)
    if dist.get_rank() == 1:

        def refuse(file: Path) -> manifest.Seal:
            raise OSError(28, "No space left on device", str(file))

        state.manifest.seal = refuse
    checkpoints = Checkpoints(Path(folder), keep=1, asynchronous=asynchronous)
    with pytest.raises(RuntimeError) as failed:
        checkpoints.save(Position(step=1), {"agent": one})
        checkpoints.finish_pending()
    return str(failed.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_stops_every_rank_and_leaves_no_checkpoint(run_ranks, tmp_path, asynchronous):
    first, second = run_ranks(2, full_disk, str(tmp_path), asynchronous)
    assert first == second and "step_000001 could not be written: rank 1: OSError(28, 'No space left on device')" in first
    assert state.latest(tmp_path) is None and not list(tmp_path.glob("step_*"))
