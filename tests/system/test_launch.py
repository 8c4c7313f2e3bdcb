"""Every launch script, run: one node, two nodes on this machine, SLURM with stand-ins for its commands, the Kubernetes manifest's command.

And what the launcher starts again: a worker that is killed costs the step in flight and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.system.test_training import ENVIRONMENT, rows
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
# torchrun and python of this environment, and no GPU to count
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
BASE = {**{name: value for name, value in ENVIRONMENT.items() if name not in ("NPROC", "NNODES", "HEAD", "JOB_ID", "DOOR")}, "PATH": PATH}
LOCAL = {"GLOO_SOCKET_IFNAME": "lo"}


def start(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env={**BASE, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def outcome(*processes: subprocess.Popen) -> str:
    """What they printed, once all have ended well."""
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(text[-4000:] for text in said)
    return "\n".join(said)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """Overrides of a cold-start run of two steps."""
    sizes = ["trainer.global_batch_dialogues=8", "trainer.save_hf=false"]
    return [*save_tiny_task(tmp_path_factory.mktemp("task")), *sizes, "trainer.steps=2"]


def has_trained(folder: Path, said: str, *, ranks: int) -> None:
    assert f"preflight collective: all-reduce of {ranks} ranks over gloo" in said
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1, 2]
    assert (folder / "checkpoints" / "step_000002" / "state.json").exists()


def test_single_node_starts_as_many_ranks_as_it_is_told(task, tmp_path):
    said = outcome(start("launch/single_node.sh", *task, f"run_dir={tmp_path}/run", NPROC="2", DOOR="sft"))
    has_trained(tmp_path / "run", said, ranks=2)


def test_two_nodes_meet_and_train_together(task, tmp_path):
    variables = {"NNODES": "2", "HEAD": f"127.0.0.1:{free_port()}", "JOB_ID": "two-nodes", "NPROC": "1", "DOOR": "sft"}
    nodes = [start("launch/multi_node.sh", *task, f"run_dir={tmp_path}/run", NODE_ADDR="127.0.0.1", **variables) for _ in range(2)]
    has_trained(tmp_path / "run", outcome(*nodes), ranks=2)


STAND_INS = {
    # sbatch SCRIPT ARGUMENTS: reads the #SBATCH lines that say how many nodes, sets what SLURM sets, and runs a copy, as SLURM does
    "sbatch": """#!/usr/bin/env bash
set -euo pipefail
script=$1 && shift
export SLURM_JOB_ID=4711 SLURM_NNODES=$(sed -n 's/^#SBATCH --nodes=//p' "$script") SLURM_JOB_NODELIST='127.0.0.[1-2]' SLURM_SUBMIT_DIR=$PWD
cp "$script" "$SPOOL/slurm_script" && cd / && exec bash "$SPOOL/slurm_script" "$@"
""",
    "scontrol": """#!/usr/bin/env bash
[ "$*" = "show hostnames 127.0.0.[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
""",
    # srun OPTIONS COMMAND: once a node
    "srun": """#!/usr/bin/env bash
set -euo pipefail
while [[ "$1" == --* ]]; do shift; done
pids=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done
""",
}


def test_slurm_starts_one_launcher_a_node(task, tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{PATH}", "SPOOL": str(tmp_path), "PORT": str(free_port()), "NPROC": "1", "DOOR": "sft"}
    said = outcome(start("sbatch", "launch/slurm.sbatch", *task, f"run_dir={tmp_path}/run", NODE_ADDR="127.0.0.1", **variables))
    has_trained(tmp_path / "run", said, ranks=2)
    assert '"4711"' in (tmp_path / "run" / "launch.json").read_text(), "the job's number names the launch: a requeued job continues"


def test_the_pods_of_the_kubernetes_job_meet_and_train_together(task, tmp_path):
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry for entry in container["env"]}
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"]["value"])
    assert int(variables["NPROC"]["value"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # pods of an indexed Job are called JOB-INDEX.SUBDOMAIN, which a headless service of that name, over the Job's pods, makes known
    assert variables["HEAD"]["value"].split(":")[0] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert variables["JOB_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    # what this machine stands in for: the service's name, the fields of the pod, and a machine with one rank
    here = {"HEAD": f"127.0.0.1:{free_port()}", "JOB_ID": "8c1d", "NODE_ADDR": "127.0.0.1", "NPROC": "1"}
    set_by_manifest = {name: here.get(name) or entry["value"] for name, entry in variables.items()}
    command = [*container["command"], *task, f"run_dir={tmp_path}/run"]
    pods = [start(*command, DOOR="sft", **set_by_manifest) for _ in range(spec["completions"])]
    has_trained(tmp_path / "run", outcome(*pods), ranks=2)


@pytest.mark.parametrize(
    ("script", "environment", "words"),
    [
        ("single_node.sh", {"NPROC": "0"}, ["NPROC is '0'"]),
        ("single_node.sh", {"NPROC": "all"}, ["NPROC is 'all'"]),
        ("multi_node.sh", {}, ["NNODES is not set", "--help"]),
        ("multi_node.sh", {"NNODES": "2", "JOB_ID": "x"}, ["HEAD is not set"]),
        ("multi_node.sh", {"NNODES": "2", "HEAD": "node0:29500"}, ["JOB_ID is not set"]),
        ("multi_node.sh", {"NNODES": "2", "HEAD": "node0", "JOB_ID": "x", "NPROC": "1"}, ["HEAD is 'node0'", "HOST:PORT"]),
        ("multi_node.sh", {"NNODES": "two", "HEAD": "node0:1", "JOB_ID": "x", "NPROC": "1"}, ["NNODES is 'two'"]),
        ("slurm.sbatch", {}, ["SLURM_JOB_ID is not set", "sbatch"]),
    ],
)
def test_a_missing_or_bad_variable_is_named_with_exit_code_2(script, environment, words):
    result = subprocess.run([f"launch/{script}"], cwd=ROOT, env={**BASE, **environment}, capture_output=True, text=True, timeout=20)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node.sh", "slurm.sbatch"])
def test_help_says_which_variables_there_are(script):
    said = subprocess.run([f"launch/{script}", "--help"], cwd=ROOT, env=BASE, capture_output=True, text=True, timeout=20, check=True).stdout
    assert all(name in said for name in ("NPROC", "MAX_RESTARTS", "DOOR", "key=value")), said


# --- what the launcher starts again -----------------------------------------------------------------------------------


def kill_a_worker(launcher: subprocess.Popen, folder: Path, *, after: int) -> None:
    """SIGKILL for rank 1 once checkpoint ``after`` is there: the launcher notices, ends the other rank and starts both again."""
    deadline = time.monotonic() + 150
    while not (folder / "checkpoints" / f"step_{after:06d}" / "manifest.json").exists():
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0][-4000:]
        time.sleep(0.01)
    for worker in psutil.Process(launcher.pid).children():
        if worker.environ().get("RANK") == "1":
            worker.kill()
            return
    pytest.fail("no worker of rank 1")


def computed(folder: Path) -> list[dict]:
    """Metrics without what they took: seconds and rates."""
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows(folder / "metrics.jsonl")]


def test_a_worker_that_is_killed_is_started_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restart")
    task = save_tiny_task(folder)

    def killed_and_whole(name: str, *overrides: str, door: str, after: int) -> list[dict]:
        """Metrics of the uninterrupted run, which those of the killed one must equal."""
        ways = {"NPROC": "2", "MAX_RESTARTS": "1", "DOOR": door}
        outcome(start("launch/single_node.sh", *overrides, f"run_dir={folder}/{name}_whole", **ways))
        killed = start("launch/single_node.sh", *overrides, f"run_dir={folder}/{name}_killed", **ways)
        kill_a_worker(killed, folder / f"{name}_killed", after=after)
        said = outcome(killed)
        assert said.count("preflight versions") == 2, "the workers ran twice"
        whole = computed(folder / f"{name}_whole")
        assert computed(folder / f"{name}_killed") == whole
        return whole

    sft = ["trainer.steps=40", "trainer.checkpoint_every=10", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002"]
    losses = [row["train/loss"] for row in killed_and_whole("sft", *task, *sft, door="sft", after=10)]
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]

    trained = [o for o in task if not o.startswith("model.path=")] + [f"model.path={folder}/sft_killed/hf/shared", "optimizer.lr=0.001"]
    rl = ["trainer.steps=4", "trainer.checkpoint_every=1", "trainer.evaluation_problems=2", "trainer.save_hf=false"]
    verifier = ["reward.verifier_timeout_s=100"]  # a verdict must not depend on how busy the machine is
    metrics = killed_and_whole("rl", *trained, *rl, *verifier, "parallel.actor.tensor=2", door="train", after=2)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4] and any(row["train/grad_norm"] > 0 for row in metrics[2:])
