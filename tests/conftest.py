"""Fixtures for all tests: `run_ranks` forks gloo ranks from a process that has already imported torch and megatron-core."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _rank_main(rank: int, world: int, store: str, fn: Callable, args: tuple, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        value = fn(*args)
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list]:
    """``run_ranks(world, fn, *args, timeout_s=60)`` runs ``fn(*args)`` on ``world`` forked gloo ranks; returns its values in rank order.

    Values travel by pickle: return numbers, lists or numpy arrays. A rank's exception fails the test with that rank's traceback.
    Forking a parent in which torch has one thread is safe and takes 0.1-1 s a call, where torchrun takes 8-18 s.
    """
    import torch

    import megatron_rema.parallel.groups  # noqa: F401  (megatron-core imported once, before the fork)

    torch.set_num_threads(1)
    calls = 0

    def run(world: int, fn: Callable, *args: Any, timeout_s: float = 60) -> list:
        nonlocal calls
        calls += 1
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        store = str(tmp_path / f"store_{calls}")
        ranks = [context.Process(target=_rank_main, args=(r, world, store, fn, args, results)) for r in range(world)]
        for process in ranks:
            process.start()
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(values) < world:
                try:
                    rank, error, value = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [r for r, process in enumerate(ranks) if r not in values and process.exitcode not in (None, 0)]
                    if dead:
                        pytest.fail(f"ranks {dead} of {world} died with exit codes {[ranks[r].exitcode for r in dead]}")
                    if time.monotonic() > deadline:
                        pytest.fail(f"ranks {sorted(set(range(world)) - set(values))} of {world} gave no answer within {timeout_s} s")
                    continue
                if error:
                    pytest.fail(f"rank {rank} of {world} failed:\n{error}")
                values[rank] = value
            for process in ranks:
                process.join(timeout=10)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        return [values[r] for r in range(world)]

    return run
