"""``-m hydra/launcher=slurm`` with stand-ins for SLURM's commands, which run what they are given on this machine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.system.test_launch import LOCAL, PATH
from tests.system.test_sweep import ENVIRONMENT, SIZES, run, start, states, wait_until
from tests.system.test_training import rows
from tests.tiny_task import save_tiny_task

pytestmark = pytest.mark.system
STAND_INS = {
    # sbatch SCRIPT: answers with a number and runs the script behind our back; the state is what sacct is asked for
    "sbatch": """#!/usr/bin/env bash
set -euo pipefail
nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$1")
id=$((4711 + $(ls "$SPOOL" | grep -c state || true)))
echo RUNNING > "$SPOOL/$id.state" && cp "$1" "$SPOOL/$id.script"
export SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=$nodes SLURM_NTASKS=$nodes SLURM_JOB_NODELIST='127.0.0.1'
(bash "$SPOOL/$id.script" && state=COMPLETED || state=FAILED; echo $state > "$SPOOL/$id.state") > "$SPOOL/$id.out" 2>&1 < /dev/null &
echo "Submitted batch job $id"
""",
    # srun OPTIONS COMMAND: once a node, into the files that the options name
    "srun": """#!/usr/bin/env bash
set -euo pipefail
while [[ "$1" == --* ]]; do
  case "$1" in --output | --error) shift 2 ;; *) shift ;; esac
done
pids=()
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done
""",
    "sacct": """#!/usr/bin/env bash
echo 'JobID|State|NodeList'
for file in "$SPOOL"/*.state; do echo "$(basename "$file" .state)|$(cat "$file")|here"; done
""",
    "scancel": '#!/usr/bin/env bash\necho CANCELLED > "$SPOOL/$1.state"\n',
}


@pytest.mark.timeout(900)  # of a busy machine
def test_jobs_are_handed_to_slurm_and_the_one_that_fails_is_named(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "spool").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin{os.pathsep}{PATH}", "SPOOL": f"{tmp_path}/spool", "NODE_ADDR": "127.0.0.1", **LOCAL}
    for name, value in variables.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    task = save_tiny_task(tmp_path / "task")
    good = next(override for override in task if override.startswith("model.path=")).removeprefix("model.path=")
    others = [override for override in task + SIZES if not override.startswith(("model.path=", "hydra."))]
    settings = ["nodes=2", "processes_per_node=1", "gpus_per_node=0", "poll_s=1", "max_restarts=0"]
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{setting}" for setting in settings), "+hydra.launcher.sbatch.partition=tiny"]
    folder = tmp_path / "sweep"
    command = [*others, *launcher, "trainer.steps=2", f"model.path={good},{tmp_path}/nowhere", f"run_dir={folder}"]
    result = run(*command)

    well, bad = states(folder)
    assert (result.returncode, states(folder)[well], states(folder)[bad]) == (1, "finished", "failed"), result.stdout + result.stderr
    assert [row["step"] for row in rows(folder / well / "metrics.jsonl")] == [1, 2]
    said = (folder / "logs" / f"{well}.log").read_text() + (folder / "logs" / f"{well}.node1.log").read_text()
    assert "--rdzv-id 4711" in said and "preflight collective: all-reduce of 2 ranks over gloo" in said
    assert '"4711"' in (folder / well / "launch.json").read_text(), "the job's number names the launch: a requeued job continues"
    script = (tmp_path / "spool" / "4711.script").read_text()
    options = ("nodes=2", "ntasks-per-node=1", "partition=tiny", f"job-name={well}", "time=1440")
    assert all(f"#SBATCH --{option}\n" in script for option in options), script

    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"job {bad}" in error and "SLURM job 4712 is FAILED: error: model.path of policy shared is" in error, error

    # the sweep was killed while SLURM went on: a job that is in the queue is waited for, one of which SLURM says nothing is left alone
    record = folder / "sweep.json"
    record.write_text(record.read_text().replace('"state": "failed"', '"state": "running",\n   "slurm_job": "999"'))
    lost = run(*command)
    assert lost.returncode == 2 and "SLURM job 999, of which sacct says nothing" in lost.stderr, lost.stderr
    assert len(list(Path(tmp_path, "spool").glob("*.state"))) == 2, "nothing was submitted"

    # and one that is in the queue is waited for; Ctrl-C cancels it
    record.write_text(record.read_text().replace('"slurm_job": "999"', '"slurm_job": "4712"'))
    (tmp_path / "spool" / "4712.state").write_text("RUNNING\n")
    found = start(*command)
    wait_until(lambda: states(folder)[bad] == "running" and "pid" not in record.read_text(), found, "the job in the queue", timeout_s=100)
    time.sleep(1)
    found.send_signal(signal.SIGTERM)
    out, err = found.communicate(timeout=100)
    assert found.returncode == 128 + signal.SIGTERM and "as SLURM job 4712, submitted before" in out, out + err
    assert (tmp_path / "spool" / "4712.state").read_text() == "CANCELLED\n" and states(folder)[bad] == "stopped"
