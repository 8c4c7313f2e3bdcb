"""Methods that compute the same, side by side: first checked against float64, then timed in turns. Prints one table a comparison."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20
FLOOR = "copy of those bytes"
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Method:
    """``run(prepare())`` computes; only ``run`` is timed, so that a method which destroys its input gets a fresh one each time."""

    run: Callable[[Any], Outputs]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Row:
    """What was measured of one method: medians over rounds of milliseconds, and of the ratio to ``fused`` and to the copy of that round."""

    wall_ms: float
    processor_ms: float
    wall_x_fused: float
    processor_x_fused: float
    wall_x_floor: float
    processor_x_floor: float
    extra_mib: float
    error: float | None


def compare(
    title: str,
    methods: dict[str, Method | Exception],
    error: Callable[[Outputs], float],
    *,
    tolerance: float,
    num_bytes: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Row]:
    """Time ``methods`` (one is called fused; an exception says why one is left out). ``error``: a method's largest difference from float64;
    above ``tolerance`` it computes something else, which raises AssertionError before anything is timed.

    ``num_bytes`` is what the operation must read and write: a copy of so many bytes on the device, half read and half written, takes its
    turn in every round and is the floor.
    """
    half, other = (torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
    absent = {name: str(method) for name, method in methods.items() if isinstance(method, Exception)}
    running = {name: method for name, method in methods.items() if isinstance(method, Method)}
    running[FLOOR] = Method(lambda _: (other.copy_(half),))
    errors: dict[str, float | None] = {}
    memory: dict[str, float] = {}
    for name, method in list(running.items()):
        try:
            errors[name] = None if name == FLOOR else error(method.run(method.prepare()))  # also loads and compiles what is done once
            memory[name] = _peak_mib(method, device)
        except torch.cuda.OutOfMemoryError:
            absent[name] = "out of memory"
            del running[name]
    for name, value in errors.items():
        assert value is None or value <= tolerance, f"{title}: {name} differs from float64 by {value:.2e} > {tolerance:.0e}"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for number in range(rounds):
        for name in list(running)[:: 1 if number % 2 else -1]:
            times[name].append(_clock(running[name], device))

    def row(name: str) -> Row:
        def ratio(base: str, clock: int) -> float:
            return statistics.median(own[clock] / other[clock] for own, other in zip(times[name], times[base], strict=True))

        wall, processor = (statistics.median(pair[clock] for pair in times[name]) for clock in (0, 1))
        ratios = (ratio(base, clock) for base in ("fused", FLOOR) for clock in (0, 1))
        return Row(wall, processor, *ratios, memory[name], errors[name])

    rows = {name: row(name) for name in running}
    _print_table(title, rows, absent, num_bytes)
    return rows


def _print_table(title: str, rows: dict[str, Row], absent: dict[str, str], num_bytes: int) -> None:
    print(f"\n{title}: {num_bytes / MIB:.1f} MiB must be read and written")
    print("| method | wall, ms | x fused | x copy | processor, ms | x fused | x copy | extra, MiB | error |\n|" + "---|" * 9)
    for name, row in rows.items():
        walls = f"{row.wall_ms:.2f} | {row.wall_x_fused:.2f} | {row.wall_x_floor:.1f}"
        processors = f"{row.processor_ms:.2f} | {row.processor_x_fused:.2f} | {row.processor_x_floor:.1f}"
        print(f"| {name} | {walls} | {processors} | {row.extra_mib:.0f} | {'' if row.error is None else f'{row.error:.0e}'} |")
    for name, reason in absent.items():
        print(f"| {name} | {reason} |" + " |" * 7)
    print(end="", flush=True)


def _clock(method: Method, device: torch.device) -> tuple[float, float]:
    """Milliseconds of wall clock and of processor time (all threads of this process)."""
    prepared = method.prepare()
    _wait(device)
    wall, processor = time.perf_counter(), time.process_time()
    outputs = method.run(prepared)
    _wait(device)
    times = (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3
    del outputs  # after the clock: giving memory back is the caller's
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_mib(method: Method, device: torch.device) -> float:
    """Above what was held before, outputs included."""
    prepared = method.prepare()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        method.run(prepared)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    before = forget_peak()
    method.run(prepared)
    return peak_mib() - before


def forget_peak() -> float:
    """MiB that this process holds; its peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def peak_mib() -> float:
    """The most that this process has held since `forget_peak`."""
    return _status_mib("VmHWM")


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
