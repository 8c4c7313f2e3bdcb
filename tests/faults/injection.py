"""Faults, put into a forked rank by wrapping the product's functions; the product itself knows nothing of them.

A fault strikes at one place (a phase of a run), in one step, on one rank, at one of the calls there.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


@dataclass
class Now:
    """Where this rank stands."""

    step: int = 0  # the one at work, or the last one done


@dataclass(frozen=True)
class Point:
    """When and where a fault strikes."""

    place: str
    step: int
    rank: int
    call: int = 1  # of those at that place in that step
    after: bool = False  # as the call returns, not before it


def wrap(owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        value = inner(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return value

    setattr(owner, name, outer)


def places() -> dict[str, list[tuple[Any, str]]]:
    """Place -> the functions that begin it. Of several, each call counts."""
    from megatron_rema.engine.transformers import TransformersEngine
    from megatron_rema.models.optimizer import Optimizer
    from megatron_rema.models.policy import ParallelModel
    from megatron_rema.reward.math_verifier import VerifierPool
    from megatron_rema.trainer import cast, cold_start, learning, loop, preflight, state
    from megatron_rema.trainer.run_folder import RunFolder

    return {
        "preflight": [(preflight, "check")],
        "build": [(loop, "build_policies"), (cold_start, "build_policies")],
        "restore": [(state, "restore")],
        "engines": [(loop, "build_engines")],
        "generate": [(TransformersEngine, "step")],
        "verify": [(VerifierPool, "collect")],
        "score": [(learning, "label_logprobs"), (learning, "scalars")],
        "update": [(ParallelModel, "forward_backward")],
        "optimizer": [(Optimizer, "step")],
        "sync": [(TransformersEngine, "load_weights")],
        "episodes": [(RunFolder, "episodes")],
        "metrics": [(RunFolder, "metrics")],
        "evaluate": [(loop, "evaluate_sets")],
        "evaluation": [(RunFolder, "evaluation")],
        "checkpoint": [(state.Checkpoints, "save")],
        "export": [(cast, "save_hf")],
        "report": [(loop, "write_report"), (cold_start, "write_report")],
    }


def install(point: Point, rank: int, action: Callable[[], None], struck: Path) -> None:
    """From now on ``action`` happens at ``point`` in this rank. ``struck``: a file that notes when."""
    now = follow()
    if rank != point.rank:
        return
    count = 0
    done = False

    def arrive(*_: Any, **__: Any) -> None:
        nonlocal count, done
        if now.step != point.step or done:
            return
        count += 1
        if count == point.call:
            done = True
            struck.write_text(str(time.monotonic()))
            action()

    if point.place == "disk":  # a change of the file system where checkpoints are

        def look(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            name = str(arguments[0]) if arguments else ""
            if not done and (event in WRITES or writes) and ("/checkpoints" in name or "/" not in name):  # rmtree names files by folder
                arrive()

        sys.addaudithook(look)
        return
    for owner, name in places()[point.place]:
        wrap(owner, name, **{"after" if point.after else "before": arrive})


def follow() -> Now:
    """Keeps track of the step at work: RL's by its own function, a supervised one's by the draw of its examples."""
    from megatron_rema.trainer import loop, supervised

    now = Now()

    def begins(study: Any) -> None:
        now.step = study.position.step + 1

    wrap(loop, "step", before=begins)
    draw = supervised.draw

    def drawn(examples: Any, count: int, taken: int, seed: int) -> Any:
        now.step = taken // count + 1
        return draw(examples, count, taken, seed)

    supervised.draw = drawn
    return now


# --- what may happen --------------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fails() -> None:
    raise RuntimeError("injected: this rank alone is broken")


def out_of_memory() -> None:
    raise MemoryError


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")


def out_of_host_memory() -> None:
    """The allocator of torch itself refuses."""
    torch.empty(1 << 60, dtype=torch.uint8)


@dataclass
class Disk:
    """A small file system of its own for the run folder: it can really be full, and really be read-only."""

    path: Path
    mib: int = 64

    def mount(self) -> Disk:
        self.path.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.mib}m", "tmpfs", str(self.path)], check=True, capture_output=True)
        return self

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True, capture_output=True)

    def fill(self, *, spare_pages: int) -> None:
        """Leave ``spare_pages`` pages of 4 KiB."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            block = bytes(1 << 16)
            for size in (len(block), 4096):
                try:
                    while True:
                        if file.write(block[:size]) < size:
                            break
                except OSError as full:
                    assert full.errno == errno.ENOSPC, full
            file.truncate(max(0, file.tell() // 4096 - spare_pages) * 4096)

    def free(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)

    def remount(self, mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.path)], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system here."""
    disk = Disk(folder / "trial", mib=1)
    try:
        disk.mount()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
    disk.unmount()
    return True


def jump_clock(seconds: float) -> None:
    """The wall clock moves; the monotonic clocks do not."""
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)


def signal_verifiers(number: int) -> None:
    verifiers = [child for child in psutil.Process().children() if "math_verifier" in " ".join(child.cmdline())]
    assert verifiers, "there is no verifier process to be struck"
    for verifier in verifiers:
        verifier.send_signal(number)


@dataclass
class Poison:
    """A loss on the victim that is not finite, in the updates of the given steps: so are the gradients that follow from it."""

    steps: tuple[int, ...]
    value: float = float("nan")
    struck: Path | None = None
    found: list[int] = field(default_factory=list)

    def install(self, rank: int, victim: int) -> None:
        from megatron_rema.models.policy import ParallelModel

        now = follow()

        forward_backward = ParallelModel.forward_backward

        def spoilt(model: ParallelModel, batches: Any, loss_fn: Any, *, forward_only: bool = False) -> Any:
            if now.step not in self.steps or rank != victim or forward_only:
                return forward_backward(model, batches, loss_fn, forward_only=forward_only)

            def loss(*args: Any) -> Any:
                if self.struck is not None and not self.found:
                    self.struck.write_text(str(time.monotonic()))
                self.found.append(now.step)
                total, stats = loss_fn(*args)
                return total * self.value, stats

            return forward_backward(model, batches, loss)

        ParallelModel.forward_backward = spoilt


def bewitch_verifiers(what: str) -> None:
    """This rank's verifier processes are replaced; the first new one does ``what`` with its first answer, all others judge rightly."""
    from megatron_rema.reward import math_verifier

    signal_verifiers(signal.SIGKILL)
    marker = Path(os.environ["MEGATRON_REMA_FAULT_CASE"]) / f"bewitched_{os.environ['RANK']}"
    os.environ["MEGATRON_REMA_BEWITCHED"] = f"{what} {marker}"
    inner = math_verifier._VerifierProcess.__init__

    def bewitched(self: Any, function: str, timeout_s: float) -> None:
        inner(self, "tests.faults.verifiers:judge", timeout_s)

    math_verifier._VerifierProcess.__init__ = bewitched
