"""One run of the gym: the real trainer on a tiny policy, in a process forked from a parent that has paid the imports.

The engine is the transformers one: it stands in for vLLM behind the same protocol, because it starts at once and a run here is a minute.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gym import current, task
from benchmarks.gym.measure import measured
from benchmarks.gym.worlds import Setting, World

AUDIT_EVERY, STEPS = 10, 80
# what may be done about a hack, by name: the ordinary settings of a run
MITIGATIONS: dict[str, tuple[str, ...]] = {
    "guard": ("integrity=guard",),
    "par": ("reward.shaping=par",),
    "length": ("reward.length_debias=0.1",),
    "kl": ("algorithm.kl_target_nats=0.05", "algorithm.kl_horizon=64"),
    "chi2": ("algorithm.chi2_coef=0.1",),
}
COLD_START_STEPS = 600
COMMON = (
    "task=arith",
    "engine=transformers",
    "rollout=single_turn",
    "task.finish_marker=null",
    "~task.evaluation_files.heldout",
    "~task.evaluation_files.ood",
    "rollout.max_context_tokens=128",
    "rollout.max_episode_tokens=64",
    "engine.max_num_seqs=64",
    "trainer.preflight.enabled=false",
    "trainer.microbatch_tokens=4096",
)
LEARNING_RATE = 5.0e-4


@dataclass(frozen=True)
class Run:
    """``mitigation``: one of MITIGATIONS, or none."""

    world: World
    arm: str
    seed: int
    steps: int = STEPS
    mitigation: str = ""

    @property
    def title(self) -> str:
        """The arm, as results call it."""
        return f"{self.arm}+{self.mitigation}" if self.mitigation else self.arm

    @property
    def name(self) -> str:
        return f"{self.world.id}/{self.title}_seed{self.seed}"


def overrides_of(run: Run, folder: Path, start: Path) -> list[str]:
    world, pays_outcome = run.world, Setting.of(run.world, run.arm, run.seed).pays_outcome_only
    reward = [f"+reward.weights.outcome={1.0 if pays_outcome else world.outcome}"]
    if not pays_outcome:
        reward.append("reward.function=benchmarks.gym.current:proxy")
    return [
        *COMMON,
        *_who(world),
        *reward,
        f"model.path={start}",
        f"run_dir={folder / 'run'}",
        f"task.train_file={folder / 'train.jsonl'}",
        f"seed={run.seed}",
        f"rollout.max_turn_tokens={world.max_turn_tokens}",
        "rollout.prompts_per_step=8",
        "rollout.episodes_per_prompt=8",
        f"optimizer.lr={LEARNING_RATE}",
        f"trainer.steps={run.steps}",
        "trainer.checkpoint_every=0",
        "trainer.save_hf=false",
        "algorithm.kl_coef=0.02",  # without any the policy drifts out of its language where rewards are mostly luck
        "integrity=monitor",
        "integrity.oracle=benchmarks.gym.current:gold",
        f"integrity.audit_every={AUDIT_EVERY}",
        *([] if world.two_agents else ["integrity.renewal=benchmarks.gym.current:renewed"]),
        *world.overrides,
        *MITIGATIONS.get(run.mitigation, ()),
    ]


def train(run: Run, folder: Path, start: Path) -> dict[str, Any]:
    """Train in this process; returns the row that is kept. ``folder`` is made anew."""
    from megatron_rema.trainer import loop
    from megatron_rema.trainer.inputs import read_for_training

    shutil.rmtree(folder, ignore_errors=True)
    setting = Setting.of(run.world, run.arm, run.seed)
    task.write_jsonl(folder / "train.jsonl", setting.write_problems())
    current.use(setting)
    loop.VerifierPool, loop.write_report = verifier_here, lambda path: path  # nobody reads a page about a run of the gym
    config = configured(overrides_of(run, folder, start))
    begin = time.perf_counter()
    loop.train(config, read_for_training(config))
    wall = time.perf_counter() - begin
    return {
        "world": run.world.id,
        "arm": run.title,
        "seed": run.seed,
        "direction": setting.direction,
        "steps": run.steps,
        "wall_s": round(wall, 1),
        "oracle_calls": current.oracle_calls,
        **measured(folder / "run", setting),
    }


def verifier_here(processes: int, timeout_s: float) -> Any:
    """A pool that asks math_verify in this process: it has no time-out, and what is said here needs none. Its own processes would import
    math_verify anew for every run. The lenient reading is a metric that nothing here uses."""
    from megatron_rema.reward.answers import verify
    from megatron_rema.reward.math_verifier import VerifierPool

    class VerifierHere(VerifierPool):
        def _ask(self, answer: str, gold: str) -> tuple[Any, str]:
            return verify(answer, gold), "verified"

    return VerifierHere(processes, timeout_s, lenient=False)


def cold_start(world: World, arm: str, folder: Path, steps: int = COLD_START_STEPS) -> Path:
    """The checkpoint that every seed of these arms starts from; trained in this process where it is not there yet."""
    from megatron_rema.trainer import cold_start as trainer
    from megatron_rema.trainer.inputs import read_for_cold_start

    target = start_of(world, arm, folder)
    if target.exists():
        return target
    here = target.parents[2]
    shutil.rmtree(here, ignore_errors=True)
    task.save_model(here / "model", (*world.directions, *world.words))
    task.write_jsonl(here / "dialogues.jsonl", world.write_cold_start(arm))
    config = configured(
        [
            *COMMON,
            *_who(world),
            f"model.path={here / 'model'}",
            "model.init=random",
            f"run_dir={here / 'run'}",
            f"task.cold_start_file={here / 'dialogues.jsonl'}",
            f"task.train_file={here / 'dialogues.jsonl'}",
            f"trainer.steps={steps}",
            "trainer.global_batch_dialogues=128",
            "optimizer.lr=3e-3",
            "optimizer.schedule=cosine",
            "optimizer.min_lr=1e-4",
            "optimizer.warmup_steps=20",
        ]
    )
    trainer.train(config, read_for_cold_start(config))
    return target


def start_of(world: World, arm: str, folder: Path) -> Path:
    return folder / world.cold_start_of(arm) / "run" / "hf" / ("shared" if world.two_agents else "reasoner")


def _who(world: World) -> list[str]:
    if world.two_agents:
        return ["agents=shared", "rollout.max_rounds=1"]
    return ["agents=single", "rollout.max_rounds=1"]


def configured(overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir

    from megatron_rema.config import check, load
    from megatron_rema.front_door import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = load(compose("config", overrides=list(overrides)))
    check(config, 1)
    return config


# --- processes --------------------------------------------------------------------------------------------------------


def preload(model: Path) -> None:
    """Import once what every run would import anew. Threads must not be at work when a process forks."""
    import math_verify
    import torch
    import tqdm
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_rema.trainer.cold_start
    import megatron_rema.trainer.loop

    tqdm.tqdm.monitor_interval = 0  # it would be a thread
    torch.set_num_threads(1)
    AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    Figure().savefig(os.devnull, format="png")
    assert math_verify and backend_agg and AutoModelForCausalLM and megatron_rema.trainer.loop and megatron_rema.trainer.cold_start
    gc.collect()
    gc.freeze()  # a child that collects would copy every page


Job = tuple[str, Callable[[], Any]]


def forked(jobs: Sequence[Job], workers: int, logs: Path) -> Iterator[tuple[str, Any, str]]:
    """(name, value, error) of each job as it ends, ``workers`` at once; each in a process of its own, its output in ``logs``. The value
    travels as JSON. An error is the job's traceback, and the other jobs go on."""
    waiting, running = list(reversed(jobs)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name, work = waiting.pop()
            file = logs / name.replace("/", "_")
            file.parent.mkdir(parents=True, exist_ok=True)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _life(work, file)
            running[pid] = (name, file)
        pid, status = os.waitpid(-1, 0)
        if pid not in running:  # a process of somebody else's
            continue
        name, file = running.pop(pid)
        done = file.with_suffix(".json")
        if os.waitstatus_to_exitcode(status) == 0:
            yield name, json.loads(done.read_text()), ""
            done.unlink()
        else:
            yield name, None, f"see {file.with_suffix('.log')}"


def _life(work: Callable[[], Any], file: Path) -> None:
    """Of a child: does not return."""
    code = 1
    try:
        out = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        value = work()
        file.with_suffix(".json").write_text(json.dumps(value))
        code = 0
    except BaseException:  # whatever it was, the parent reads the exit code and names the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
