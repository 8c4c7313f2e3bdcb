"""What a checkpoint holds and how a run resumes from it.

checkpoints/step_NNNNNN/POLICY/   megatron-core distributed checkpoint of weights, optimizer and schedule: loads at any TP x PP x DP
checkpoints/step_NNNNNN/state.json   step, data position, weight version
checkpoints/latest                name of the newest whole checkpoint

Every random draw of a run is a function of (seed, step, what is drawn), so the position is the state of the random numbers.
A checkpoint is written under another name and renamed when whole: a killed save leaves nothing that could be loaded.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rema.config import RunConfig
from megatron_rema.trainer.cast import Policy
from megatron_rema.trainer.run_folder import RunFolder


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # steps done
    prompts_taken: int = 0  # problems drawn from the stream
    weight_version: int = 0  # weight syncs done


def save(folder: Path, position: Position, policies: Mapping[str, Policy], *, keep: int) -> Path:
    """Write checkpoint ``position.step`` and drop all but the newest ``keep``. A collective."""
    # A synchronous save never leaves this process: without this, megatron-core spawns a manager process per rank for its results.
    filesystem_async._results_queue = queue.SimpleQueue()
    target = folder / f"step_{position.step:06d}"
    partial = folder / f".partial_{target.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        for name in policies:
            (partial / name).mkdir(parents=True)
    dist.barrier()
    for name, policy in policies.items():
        dist_checkpointing.save(_sharded(policy, is_loading=False), str(partial / name))
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / "state.json").write_text(json.dumps({**asdict(position), "architectures": _architectures(policies)}))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        latest = folder / "latest.partial"
        latest.write_text(target.name)
        latest.rename(folder / "latest")
        for old in sorted(folder.glob("step_*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.exists() else None


def load(path: Path, policies: Mapping[str, Policy]) -> Position:
    """Restore every policy in place. A collective. Raises ValueError when the checkpoint is of another run's shape."""
    stored = json.loads((path / "state.json").read_text())
    kept, ours = stored.pop("architectures"), _architectures(policies)
    if kept.keys() != ours.keys():
        raise ValueError(f"checkpoint {path} holds policies {sorted(kept)}, agents.policies are {sorted(ours)}; resume with those agents.")
    for name, architecture in ours.items():
        differing = [key for key, value in architecture.items() if kept[name].get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"checkpoint {path}, policy {name}: {key} is {kept[name].get(key)}, model.path has {architecture[key]}; a checkpoint "
                "continues with its own architecture only: set model.path to the model it was trained from, or choose another run_dir."
            )
    for name, policy in policies.items():
        restored = dist_checkpointing.load(_sharded(policy, is_loading=True), str(path / name))
        policy.model.module.load_state_dict(restored["model"])
        policy.optimizer.load_state_dict(restored["optimizer"])
    return Position(**stored)


def restore(config: RunConfig, policies: Mapping[str, Policy], folder: RunFolder) -> Position:
    """The latest checkpoint of a resumed run, or the start. Rows that later steps had written are cut. A collective."""
    path = latest(folder.checkpoints) if config.resume else None
    position = Position() if path is None else load(path, policies)
    folder.cut_after(-1 if path is None else position.step)
    return position


def _architectures(policies: Mapping[str, Policy]) -> dict[str, dict]:
    return {name: json.loads(json.dumps(asdict(policy.model.arch))) for name, policy in policies.items()}


def _sharded(policy: Policy, *, is_loading: bool) -> dict:
    model = policy.model
    with model.groups.megatron_globals():
        weights = model.module.sharded_state_dict()
        return {"model": weights, "optimizer": policy.optimizer.sharded_state_dict(weights, is_loading=is_loading)}
