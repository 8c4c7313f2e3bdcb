"""What a checkpoint holds, how it comes to be whole, and how a run resumes from it.

checkpoints/step_NNNNNN/NAME/           one model's weights, optimizer and schedule (megatron-core), for any TP x PP x DP
checkpoints/step_NNNNNN/state.json      step, data position, weight version, architectures
checkpoints/step_NNNNNN/manifest.json   size and SHA-256 of every file
checkpoints/latest                      name of the newest whole checkpoint

Every random draw of a run is a function of (seed, step, what is drawn), so the position is the state of the random numbers.

A checkpoint is written as ``.partial_step_NNNNNN``, forced to the disk and renamed when whole: a save that is killed at any point leaves
nothing that could be loaded, and an old checkpoint is renamed before it is deleted. Every file is checked against the manifest before
anything is restored. Files are written by the ranks themselves, never by forked processes: nothing goes on writing when a rank is killed.
An asynchronous save copies the state to host memory and writes the copy in a thread; the thread never talks to other ranks.
"""

from __future__ import annotations

import json
import queue
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import nn

from megatron_rema.bridge import no_pickle
from megatron_rema.bridge.training_checkpoint import read_state
from megatron_rema.config import RunConfig
from megatron_rema.models.optimizer import Optimizer
from megatron_rema.models.policy import ParallelModel
from megatron_rema.parallel import platform
from megatron_rema.parallel.exchange import gather
from megatron_rema.reading import is_dir
from megatron_rema.trainer import manifest
from megatron_rema.trainer.faults import RunFault, TooManySkips, reason
from megatron_rema.trainer.inputs import Source
from megatron_rema.trainer.manifest import Seal
from megatron_rema.trainer.run_folder import RunFolder


class Trained(Protocol):
    """Whatever learns: a policy, a critic, a reward model."""

    @property
    def model(self) -> ParallelModel: ...

    @property
    def optimizer(self) -> Optimizer: ...


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # steps done
    prompts_taken: int = 0  # problems drawn from the stream
    sampled_tokens: int = 0  # by the policies, in training rollouts
    weight_version: int = 0  # weight syncs done
    data: str = ""  # what the problems were drawn from (Source.content)
    baselines: dict[str, list[float]] = field(default_factory=dict)  # role -> [sum, weight] of its running mean (algorithm.advantage=ema)
    par_references: dict[str, list[float]] = field(default_factory=dict)  # role -> rewards of the first step (reward.shaping=par)
    kl_coefs: dict[str, float] = field(default_factory=dict)  # policy -> where its controller stands (algorithm.kl_target_nats)


_ADDED = {"par_references", "kl_coefs"}  # what older checkpoints do not hold: of runs that had no need of it


@dataclass
class _Pending:
    """A checkpoint whose files are being written."""

    target: Path
    state: str  # of state.json
    requests: list[AsyncRequest]  # one a trained model: what is left to do together when every rank has written
    written: Future[dict[str, Seal]]  # by this rank


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        self._pending: _Pending | None = None

    def save(self, position: Position, trained: Mapping[str, Trained]) -> Path:
        """Write checkpoint ``position.step``; asynchronous: begin to, and the caller may train on at once. A collective.

        An asynchronous save becomes a checkpoint in `finish_pending`, which the next save calls first. Returns where it will be.
        """
        self.finish_pending()
        target = self.folder / name_of(position.step)
        partial = _partial(target)
        if dist.get_rank() == 0:
            _sweep(self.folder)
            for name in trained:
                (partial / name).mkdir(parents=True)
        dist.barrier()
        with ExitStack() as on_device:
            for one in trained.values():
                on_device.enter_context(one.optimizer.resident())
            requests = [_request(one, partial / name) for name, one in trained.items()]
            requests = [_staged(request, as_copies=self.asynchronous) for request in requests]
            state = json.dumps({**asdict(position), "architectures": _architectures(trained)}, indent=1)
            writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            written = writer.submit(_write, requests, partial)
            writer.shutdown(wait=False)
            self._pending = _Pending(target, state, requests, written)
            if not self.asynchronous:
                self.finish_pending()
        return target

    def finish_pending(self, *, wait: bool = True) -> Path | None:
        """Make a whole checkpoint of what was written. A collective. Call it between steps and, before the run ends, once with ``wait``.

        Without ``wait`` nothing happens while any rank is still writing. Returns the new checkpoint, if one came to be.
        """
        if self._pending is None:
            return None
        if not wait and not _everywhere(self._pending.written.done()):
            return None
        pending, self._pending = self._pending, None
        failure = pending.written.exception()
        outcomes = gather(reason(failure) if failure else pending.written.result())
        failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if failures:
            raise RunFault(
                f"checkpoint {pending.target} could not be written: {'; '.join(failures)}. Earlier checkpoints are whole: remove the "
                "cause, then continue from the latest with resume=true."
            )
        for request in pending.requests:
            for finish in request.finalize_fns:
                finish()
        if dist.get_rank() == 0:
            partial = _partial(pending.target)
            (partial / "state.json").write_text(pending.state)
            manifest.write(partial, {name: Seal(*seal) for seals in outcomes for name, seal in seals.items()})
            _remove(pending.target)  # left by steps that a resumed run does again
            partial.rename(pending.target)
            manifest.sync_folder(self.folder)
            _point(self.folder, pending.target)
            self._retire(pending.target)
        dist.barrier()
        return pending.target

    @contextmanager
    def finished(self) -> Iterator[None]:
        """At the end of a run, and where all its ranks stop together (TooManySkips), what is being written becomes a checkpoint."""
        try:
            yield
        except TooManySkips:
            self.finish_pending()
            raise
        self.finish_pending()

    def _retire(self, newest: Path) -> None:
        """Keep ``newest``, known to be whole, and as many whole ones before it as asked for. Damaged ones do not count."""
        room = self.keep - 1
        for old in _newest_first(self.folder, before=newest):
            if room > 0 and manifest.looks_whole(old):
                room -= 1
            elif room <= 0:
                _remove(old)


def checkpoints_of(config: RunConfig, folder: RunFolder) -> Checkpoints:
    """The checkpoints of a run, as its settings want them."""
    trainer = config.trainer
    return Checkpoints(folder.checkpoints, keep=trainer.keep_checkpoints, asynchronous=trainer.asynchronous_checkpoints)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one: what ``latest`` names, or, where that file is torn, the newest that looks whole."""
    pointer = folder / "latest"
    named = folder / pointer.read_text(errors="replace").strip("\0 \n") if pointer.is_file() else None
    if named is not None and named.name.startswith("step_") and is_dir(named):
        return named
    return next((path for path in _newest_first(folder) if manifest.looks_whole(path)), None)


def previous(path: Path) -> Path | None:
    """The newest whole checkpoint older than ``path``; every byte of it was checked. A collective."""
    return next((other for other in _newest_first(path.parent, before=path) if manifest.fault(other) is None), None)


def load(path: Path, trained: Mapping[str, Trained]) -> Position:
    """Restore every trained model in place. A collective.

    Raises ValueError, before anything is restored, when a file is not what was written (the message names it and offers the previous
    whole checkpoint) or when the checkpoint is of another run's shape.
    """
    no_pickle.contain()
    fault = manifest.fault(path)
    if fault is not None:
        before = previous(path)
        offer = (
            f"the checkpoint before it, {before}, is whole: continue from there with resume=true resume_from={before}"
            if before
            else f"no whole checkpoint before it is in {path.parent}: choose another with resume_from=PATH, or begin in another run_dir"
        )
        raise ValueError(f"checkpoint file {fault}. Nothing was restored; {offer}.")
    stored = read_state(path)
    _check_shape(path, stored.pop("architectures"), _architectures(trained))
    position = position_of(path, stored)
    for name, one in trained.items():
        restored = dist_checkpointing.load(_sharded(one, is_loading=True), str(path / name))
        for key, module in _modules(one).items():
            module.load_state_dict(restored["model"][key])
        _restore_first_step(restored["optimizer"]["adam"])
        one.optimizer.load_state_dict(restored["optimizer"])
    return position


def position_of(path: Path, stored: Mapping[str, Any]) -> Position:
    """The position that a checkpoint's state.json holds. Raises ValueError for one of another version of this package."""
    if (strange := sorted((stored.keys() ^ asdict(Position()).keys()) - (_ADDED - stored.keys()))) != []:
        raise ValueError(f"checkpoint {path}: state.json has, or misses, {strange[0]}: another version of this package saved it; use that.")
    return Position(**stored)


def restore(config: RunConfig, trained: Mapping[str, Trained], folder: RunFolder, source: Source | None = None) -> Position:
    """Where a resumed run continues: ``resume_from``, or its latest checkpoint, or the start. A collective.

    Raises ValueError, before anything is cut, where the ranks' ``source`` is not the same, or not the one that the checkpoint counts in.
    Rows that later steps had written are cut, and later checkpoints are set aside as ``set_aside_step_NNNNNN``: nobody else deletes them.
    """
    chosen = config.resume_from
    path = Path(chosen) if chosen else latest(folder.checkpoints) if config.resume else None
    position = Position() if path is None else load(path, trained)
    if source is not None:
        _check_source(source, position, path)
        position.data = source.content
    folder.cut_after(-1 if path is None else position.step)
    if folder.writes:
        _sweep(folder.checkpoints)
    if chosen and folder.writes:
        set_aside_after(folder.checkpoints, position.step)
    dist.barrier()
    return position


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def steps_of(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in ``folder``, oldest first."""
    return sorted(_step(path) for path in _newest_first(folder) if manifest.looks_whole(path))


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of steps after ``step``. By rank 0."""
    later = [path for path in _newest_first(folder) if _step(path) > step]
    for path in later:
        _remove(path)
    if later and (remaining := next(iter(_newest_first(folder)), None)) is not None:
        _point(folder, remaining)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints of steps after ``step``, which a run that goes back does again."""
    for later in _newest_first(folder):
        if _step(later) > step:
            aside = folder / f"set_aside_{later.name}"
            if aside.exists():
                shutil.rmtree(aside)
            later.rename(aside)
    remaining = latest(folder)
    if remaining is not None:
        _point(folder, remaining)


def _check_source(source: Source, position: Position, path: Path | None) -> None:
    """A collective."""
    contents = gather(source.content)
    for rank, content in enumerate(contents):
        if content != contents[0]:
            raise ValueError(
                f"{source.field} {source.file} holds {content} on rank {rank} and {contents[0]} on rank 0; all ranks must read the same "
                "rows: copy the file anew, or put it on a file system that all hosts share."
            )
    if position.data and position.data != source.content:
        raise ValueError(
            f"{source.field} {source.file} holds {source.content}; checkpoint {path} was written by a run that drew from {position.data}, "
            "and would go on among other examples: give the file that the run began with, or begin another run_dir."
        )


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def _request(one: Trained, folder: Path) -> AsyncRequest:
    """The plan of who writes what, agreed between the ranks; small common parts are written."""
    # megatron-core would start a manager process per rank for the results of its writing processes. We write in this process.
    filesystem_async._results_queue = queue.SimpleQueue()
    return dist_checkpointing.save(_sharded(one, is_loading=False), str(folder), async_sharded_save=True)


def _staged(request: AsyncRequest, *, as_copies: bool) -> AsyncRequest:
    """``request`` with its tensors in host memory; ``as_copies``: in memory of their own, which later training steps do not touch."""
    if request.async_fn is None:  # nothing of this model falls to this rank
        return request
    rank, buckets, results = request.async_fn_args
    ours = []
    for (file, key, (objects, tensors)), (_, _, (_, live)) in zip(request.preload_fn(), buckets, strict=True):
        if as_copies:  # what was on a device was copied just now; what lives on the host was handed out as it is
            tensors = [(item, tensor.clone() if tensor is old else tensor) for (item, tensor), (_, old) in zip(tensors, live, strict=True)]
        ours.append((file, key, (objects, tensors)))
    return request._replace(async_fn_args=(rank, ours, results), preload_fn=None)


def _write(requests: list[AsyncRequest], folder: Path) -> dict[str, Seal]:
    """Write this rank's files, as megatron-core's writing processes would, and seal them."""
    seals = {}
    for request in requests:
        if request.async_fn is None:
            continue
        _, buckets, results = request.async_fn_args
        transforms = request.async_fn.args[0]
        outcomes, running = queue.SimpleQueue(), queue.Queue()
        written = {}
        for index, bucket in enumerate(buckets):
            running.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcomes, running, use_fsync=True)
            _, written[index] = outcomes.get()
            if isinstance(written[index], Exception):
                raise written[index]
            file = Path(bucket[0])
            seals[str(file.relative_to(folder))] = manifest.seal(file)
        results.put(written)
    return seals


def _sharded(one: Trained, *, is_loading: bool) -> dict:
    with one.model.groups.megatron_globals():
        weights = {key: module.sharded_state_dict() for key, module in _modules(one).items()}
        return {"model": weights, "optimizer": one.optimizer.sharded_state_dict(weights, is_loading=is_loading)}


def _restore_first_step(adam: dict) -> None:
    """megatron-core (0.16.1 and later) does not save a step count of 0, nor load without one: a model that has not been updated yet,
    say a policy whose critic warms up, could not be loaded. ZeRO-1 keeps the count elsewhere."""
    plain = adam.get("optimizer", adam)
    if "state" in plain:
        plain["state"].setdefault("common_step", torch.tensor(0.0))


def _modules(one: Trained) -> dict[str, nn.Module]:
    """The model's pieces on this rank: one, or one a virtual pipeline stage."""
    return {str(index): chunk.module for index, chunk in enumerate(one.model.chunks)}


def _architectures(trained: Mapping[str, Trained]) -> dict[str, dict]:
    return {name: json.loads(json.dumps(asdict(one.model.arch))) for name, one in trained.items()}


def _check_shape(path: Path, kept: Mapping[str, dict], ours: Mapping[str, dict]) -> None:
    if kept.keys() != ours.keys():
        raise ValueError(
            f"checkpoint {path} holds {', '.join(sorted(kept))}; this run trains {', '.join(sorted(ours))}: resume with the agents (and "
            "the critic) it was saved with."
        )
    for name, architecture in ours.items():
        differing = [key for key, value in architecture.items() if kept[name].get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"checkpoint {path}, {name}: {key} is {kept[name].get(key)}, model.path has {architecture[key]}; a checkpoint "
                "continues with its own architecture only: set model.path to the model it was trained from, or choose another run_dir."
            )


# --- names on the disk ------------------------------------------------------------------------------------------------


def _newest_first(folder: Path, *, before: Path | None = None) -> list[Path]:
    limit = float("inf") if before is None else _step(before)
    return sorted((path for path in folder.glob("step_*") if 0 <= _step(path) < limit), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    """-1 for a folder that only a user can have named."""
    number = checkpoint.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1


def _partial(target: Path) -> Path:
    return target.with_name(f".partial_{target.name}")


def _sweep(folder: Path) -> None:
    """Delete what a killed save, or a killed removal, left half done."""
    for rest in folder.glob(".partial_*"):
        shutil.rmtree(rest)


def _remove(checkpoint: Path) -> None:
    """Renamed first: what is half deleted must not look like a checkpoint."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial_removed_{checkpoint.name}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def _point(folder: Path, target: Path) -> None:
    fresh = folder / "latest.partial"
    fresh.write_text(target.name)
    manifest.seal(fresh)
    fresh.rename(folder / "latest")
    manifest.sync_folder(folder)


def _everywhere(here: bool) -> bool:
    flag = torch.tensor([int(here)], device=platform.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
