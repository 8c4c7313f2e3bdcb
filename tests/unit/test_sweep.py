"""What a sweep is made of, before anything runs: names, grids, the folder's record, slots, error lines, and every file of conf/sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.megatron_rema_launchers import grid
from megatron_rema.config import ConfigError, RunConfig, as_mapping, load
from megatron_rema.front_door import config_dir
from megatron_rema.sweep.jobs import Job, State, make_jobs, names_of, quoted
from megatron_rema.sweep.local import LocalQueue, visible_devices
from megatron_rema.sweep.processes import Child, end
from megatron_rema.sweep.record import Record, held, is_finished, mark_finished
from megatron_rema.sweep.watch import last_error
from megatron_rema.trainer.run_folder import RunFolder

LOCAL = dict(slots=None, processes_per_job=1, devices=None, threads=None, max_restarts=0, grace_s=5)


def composed(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return load(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return composed()


def jobs_in(folder: Path, base: RunConfig, **changes: list) -> list[Job]:
    """One job for each value of the one key changed."""
    ((key, values),) = changes.items()
    chosen = [([f"{key}={value}"], replace(base, run_dir=str(folder), **{key: value})) for value in values]
    return make_jobs("train", chosen, world_size=1)[1]


# --- names and overrides ----------------------------------------------------------------------------------------------


def test_a_job_is_named_by_the_values_that_are_not_the_same_in_all():
    jobs = [["task=arith", f"seed={seed}", f"optimizer.lr={lr}"] for seed in (0, 1) for lr in ("0.1", "0.2")]
    assert names_of(jobs) == ["seed-0__lr-0.1", "seed-0__lr-0.2", "seed-1__lr-0.1", "seed-1__lr-0.2"]
    assert names_of([["a.lr=1", "b.lr=2"], ["a.lr=2", "b.lr=3"]]) == ["a.lr-1__b.lr-2", "a.lr-2__b.lr-3"], "two keys of one short name"
    assert names_of([["seed=0"]]) == ["job"]
    assert names_of([["+x='a/b c'"], ["+x=[1,2]"], ["+x=''"]]) == ["x-a-b-c", "x-1-2", "x-none"]
    assert names_of([["x=a/b"], ["x=a-b"]]) == ["000_x-a-b", "001_x-a-b"], "no two folders are one"


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1, max_size=30))
def test_hydra_reads_a_quoted_path_back_as_it_is(text):
    (override,) = OverridesParser.create().parse_overrides([f"run_dir={quoted(text)}"])
    value = override.value()
    assert getattr(value, "text", value) == text


def test_the_command_line_has_the_last_word_over_the_file_and_deletions_stay():
    jobs = grid({"seed": "0,1", "optimizer.lr": 0.1}, ["sweep=any", "~task.evaluation_files.ood", "+seed=5", "algorithm=a,b"])
    assert jobs == [("+seed=5", "optimizer.lr=0.1", "~task.evaluation_files.ood", f"algorithm={name}") for name in "ab"]
    with pytest.raises(ConfigError, match=r"interval\(0,1\) is an interval"):
        grid({}, ["optimizer.lr=interval(0,1)"])


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_sweep_sets_each_jobs_run_folder_and_checks_its_settings(tmp_path, base):
    folder, jobs = make_jobs(
        "sft",
        [([f"seed={s}", f"run_dir={tmp_path}", "resume=true"], replace(base, seed=s, run_dir=str(tmp_path))) for s in (0, 1)],
        world_size=1,
    )
    assert (folder, [job.folder for job in jobs]) == (tmp_path, [tmp_path / "seed-0", tmp_path / "seed-1"])
    assert jobs[1].arguments == ["seed=1", f"run_dir={tmp_path}/seed-1"]
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "metrics.jsonl").write_text("")
    assert jobs[1].arguments[-1] == "resume=true", "what is there is continued"
    with pytest.raises(ConfigError, match=r"job seed-1: parallel.actor.tensor \(2\)"):
        wide = replace(base.parallel, actor=replace(base.parallel.actor, tensor=2))
        rows = [(["seed=0"], base), (["seed=1"], replace(base, parallel=wide))]
        make_jobs("train", rows, world_size=1)
    with pytest.raises(ConfigError, match=r"run_dir differs between the jobs of the sweep \(a, b\)"):
        make_jobs("train", [(["seed=0"], replace(base, run_dir="a")), (["seed=1"], replace(base, run_dir="b"))], world_size=1)
    with pytest.raises(ConfigError, match="resume_from is x in a sweep"):
        make_jobs("train", [(["seed=0"], replace(base, resume=True, resume_from="x"))], world_size=1)
    with pytest.raises(ConfigError, match="score_file is x in a sweep"):
        make_jobs("evaluate", [(["seed=0"], replace(base, score_file="x"))], world_size=1)


def test_the_same_sweep_finds_its_record_and_another_is_refused_by_what_differs(tmp_path, base):
    jobs = jobs_in(tmp_path, base, seed=[0, 1])
    record = Record(tmp_path, jobs)
    record.load()  # an empty folder
    record.change(jobs[0], state=State.FAILED, error="why", exit_code=3)
    again = Record(tmp_path, jobs_in(tmp_path, base, seed=[0, 1]))
    again.load()
    assert (again.state(jobs[0]), again.facts[jobs[0].name]["error"], again.state(jobs[1])) == (State.FAILED, "why", State.WAITING)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert [job["settings"] for job in kept["jobs"]] == [{"run_dir": f"{tmp_path}/seed-{s}", "seed": s} for s in (0, 1)], (
        "what is common stands once"
    )

    other = replace(base, optimizer=replace(base.optimizer, lr=0.5))
    with pytest.raises(ConfigError, match=r"begun with optimizer.lr=1e-06 \(job seed-0\), and optimizer.lr is 0.5 now"):
        Record(tmp_path, jobs_in(tmp_path, other, seed=[0, 1])).load()
    with pytest.raises(ConfigError, match="has no job 'seed-2'"):
        Record(tmp_path, jobs_in(tmp_path, base, seed=[0, 1, 2])).load()
    with pytest.raises(ConfigError, match="begun with door='train'"):
        Record(tmp_path, [replace(job, door="sft") for job in jobs]).load()
    (tmp_path / "sweep.json").write_text('{"jobs": [{}]}')
    with pytest.raises(ConfigError, match=r"sweep.json is damaged \(KeyError"):
        Record(tmp_path, jobs).load()


def test_a_folder_of_something_else_is_left_alone(tmp_path, base):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no sweep's folder \(it holds metrics.jsonl and no sweep.json\)"):
        Record(tmp_path, jobs_in(tmp_path, base, seed=[0, 1])).load()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_job_is_finished_by_its_marker_and_its_settings_together(tmp_path, base):
    (job,) = jobs_in(tmp_path, base, seed=[4])
    folder = RunFolder(job.folder, writes=True)
    assert not is_finished(job)
    folder.write_config(as_mapping(replace(base, seed=4, run_dir=str(job.folder), resume=True)))  # resume is not compared
    assert not is_finished(job)
    mark_finished(job, seconds=1.0)
    assert is_finished(job)
    folder.write_config(as_mapping(replace(base, seed=5, run_dir=str(job.folder))))
    with pytest.raises(ConfigError, match="was written with seed=5, and seed is 4 in this sweep"):
        is_finished(job)


def test_a_folder_is_one_sweeps_at_a_time(tmp_path):
    with held(tmp_path, wait_s=0):
        words = f"in use by another sweep or by its jobs .begun by process {os.getpid()}"
        with pytest.raises(ConfigError, match=words), held(tmp_path, wait_s=0.3):
            pass
    with held(tmp_path, wait_s=0):
        pass


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep=turn_ratio"], ["sweep=turn_ratio names a sweep", "-m"]),
        (["-m", "seed=0,1", "optimizer.lr=1,-1"], ["optimizer.lr is -1"]),
        (["-m", "agents=shared,three"], ["agents/three", "separate"]),
        (["-m", "seed=0,1", "explain=true"], ["explain is true in a sweep", "-m"]),
        (["-m", "sweep=start", "seed=0,1"], ["model.path is not set"]),
        (["-m", "seed=0,1", "hydra/launcher=slurm"], ["hydra/launcher=slurm needs sbatch"]),
    ],
)
def test_a_bad_sweep_ends_with_one_message_before_anything_begins(arguments, words, tmp_path):
    command = [sys.executable, "-m", "megatron_rema.train", *arguments, f"run_dir={tmp_path}/sweep"]
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent)}  # without SLURM
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words) and not (tmp_path / "sweep").exists(), result.stderr


def test_a_sweep_under_torchrun_is_refused():
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "megatron_rema.train", "-m", "seed=0,1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert result.returncode == 2 and result.stderr.startswith("error: -m under torchrun"), result.stderr


# --- slots ------------------------------------------------------------------------------------------------------------


def test_devices_are_dealt_to_slots_in_order(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,GPU-a")
    assert visible_devices() == ("4", "5", "6", "7", "GPU-a")
    queue = LocalQueue(**{**LOCAL, "processes_per_job": 2})
    assert [slot.devices for slot in queue.slots] == [("4", "5"), ("6", "7")] and queue.world_size == 2
    assert [slot.devices for slot in LocalQueue(**{**LOCAL, "devices": [0, 1, 2], "slots": 2}).slots] == [("0",), ("1",)]
    assert [slot.devices for slot in LocalQueue(**{**LOCAL, "devices": [], "slots": 2}).slots] == [(), ()]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert LocalQueue(**{**LOCAL, "devices": [], "slots": 2}).threads == max(1, cores // 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slots": 3, "devices": [0, 1]}, r"slots \(3\) \* hydra.launcher.processes_per_job \(1\) must not exceed the 2 GPU"),
        ({"processes_per_job": 4, "devices": [0, 1]}, r"processes_per_job \(4\) must not exceed the 2 GPU"),
        ({"slots": 0}, "slots is 0; it must be a number, at least 1"),
        ({"processes_per_job": "two"}, "processes_per_job is 'two'"),
        ({"grace_s": -1}, "grace_s is -1"),
    ],
)
def test_slots_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        LocalQueue(**{**LOCAL, **changes})


# --- children ---------------------------------------------------------------------------------------------------------

FAMILY = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); {}"
)


def grandchild(child: Child) -> psutil.Process:
    deadline = time.monotonic() + 200
    while not (found := psutil.Process(child.process.pid).children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_child_ends_with_all_that_it_started(tmp_path, stubborn):
    last = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
        if stubborn
        else "time.sleep(600)"
    )
    log = tmp_path / "logs" / "a.log"
    child = Child([sys.executable, "-c", FAMILY.format(last)], log=log, environment=os.environ)
    started = grandchild(child)
    while stubborn and "\ndeaf" not in log.read_text():
        time.sleep(0.02)
    end([child], grace_s=0.5 if stubborn else 200)
    assert child.poll() == (-signal.SIGKILL if stubborn else -signal.SIGTERM) and not started.is_running()


def test_what_a_child_leaves_behind_is_ended_too(tmp_path):
    go = tmp_path / "go"
    code = FAMILY.format("from pathlib import Path; [time.sleep(0.05) for _ in iter(Path(sys.argv[1]).exists, True)]")
    child = Child([sys.executable, "-c", code, str(go)], log=tmp_path / "logs" / "a.log", environment=os.environ)
    started = grandchild(child)
    child.remember()  # poll does it once a second
    go.touch()
    assert child.process.wait(timeout=100) == 0 and started.is_running()
    assert child.poll() == 0 and not started.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux for it")
def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from megatron_rema.sweep.processes import Child; "
        "child = Child([sys.executable, '-c', 'import time; time.sleep(600)'], log=Path(sys.argv[1]), environment=os.environ); "
        "print(child.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path}/logs/a.log"], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 200
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["step 1", "error: model.path is x; no such folder", "E1128 torch/distributed/elastic failed", "==="],
            "error: model.path is x; no such folder",
        ),
        (["Traceback:", "  raise ValueError", "ValueError: loss is NaN", "ChildFailedError: exitcode 1"], "ValueError: loss is NaN"),
        (["torch.OutOfMemoryError: CUDA out of memory.", "[rank0]: bye"], "torch.OutOfMemoryError: CUDA out of memory."),
        (["step 1", "the end"], "the end"),
        ([], "no output"),
    ],
)
def test_the_last_error_line_is_the_runs_own(tmp_path, lines, said):
    log = tmp_path / "a.log"
    log.write_text("error: of an earlier attempt\n")
    begin = log.stat().st_size
    log.write_text(log.read_text() + "".join(f"{line}\n" for line in lines))
    assert last_error(log, begin) == said


def test_a_runs_own_message_comes_before_what_another_nodes_launcher_says(tmp_path):
    first, second = tmp_path / "log", tmp_path / "log.node1"
    first.write_text("starting\nraise RendezvousConnectionError(\n")
    second.write_text("error: model.path is nowhere\nTraceback: more\n")
    assert last_error(first, 0, second) == "error: model.path is nowhere"
    assert last_error(first, 0) == "raise RendezvousConnectionError("


# --- conf/sweep -------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "sweeps.md"
SWEEPS = sorted((config_dir() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_job_of_every_sweep_composes_and_obeys_the_rules(file):
    params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
    asked = ["model.path=base,started"] if params.get("model.path") == "'???'" else []
    launched = grid(params, [f"sweep={file.stem}", "task.train_file=train.jsonl", *asked])
    assert len(launched) >= 4 and not any(override.startswith("sweep=") for overrides in launched for override in overrides)
    folder, jobs = make_jobs("train", [(overrides, composed(*overrides)) for overrides in launched], world_size=8)
    assert folder == Path("runs", file.stem) and len({job.name for job in jobs}) == len(jobs) and file.stem in PAGE.read_text()
