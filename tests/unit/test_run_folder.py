"""The run folder survives a kill: a resumed run keeps whole rows of done steps and nothing else."""

from __future__ import annotations

import os
import stat

from megatron_rema.trainer.run_folder import RunFolder


def test_a_resume_cuts_later_steps_and_a_torn_last_line(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=True)
    for step in (1, 2, 3):
        folder.metrics({"step": step})
        folder.episodes(step, [{"episode_id": str(step)}])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    folder.cut_after(2)
    assert [row["step"] for row in folder.read("metrics.jsonl")] == [1, 2]
    assert sorted(p.name for p in (folder.path / "episodes").iterdir()) == ["step_000001.jsonl", "step_000002.jsonl"]


def test_ranks_that_do_not_write_leave_no_trace(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=False)
    folder.metrics({"step": 1})
    folder.episodes(1, [{}])
    folder.write_config({})
    assert not (tmp_path / "run").exists()


def test_the_configuration_is_written_as_readable_yaml(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=True)
    folder.write_config({"seed": 1, "task": {"finish_marker": "[FINISH]"}})
    assert "seed: 1" in (folder.path / "config.yaml").read_text()


def test_a_new_run_folder_is_for_its_owner_only_unless_asked_otherwise(tmp_path):
    before = os.umask(0o022)
    try:
        RunFolder(tmp_path / "runs" / "one", writes=True)
        RunFolder(tmp_path / "runs" / "two", writes=True, private=False)
        (tmp_path / "three").mkdir(mode=0o750)
        RunFolder(tmp_path / "three", writes=True)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "runs" / "one", tmp_path / "runs" / "two", tmp_path / "three")]
    assert modes == [0o700, 0o755, 0o750], "made: private, or by the umask; found: as it was"
