"""Fused kernels beside plain torch: time and memory of log-probabilities with entropy, exact KL, and generalised advantages.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--rounds 9] [--device cpu]

Methods take turns, in an order that flips every round; a table gives each one's median and its ratio to the fused kernel, by wall clock and
(CPU) by processor time, which other jobs on the machine disturb less. Memory is the peak above what was held before, the gradient included.
Shapes: T label positions, V columns, B traces of L tokens.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_rema.kernels.advantage import gae, masked_whiten
from megatron_rema.kernels.library import select, using
from megatron_rema.parallel.vocab import vocab_parallel_statistics

MIB = 1 << 20


def naive_statistics(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = torch.log_softmax(logits_TV.float(), -1)
    return logp_TV.gather(1, labels_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def naive_kl(logits_TV: Tensor, ref_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = torch.log_softmax(logits_TV.float(), -1)
    return logp_TV.gather(1, labels_T[:, None])[:, 0], (logp_TV.exp() * (logp_TV - torch.log_softmax(ref_TV.float(), -1))).sum(-1)


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of wall clock and of processor time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def compare(title: str, methods: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for run in methods.values():
        run()  # loads what is loaded once
    memory = {name: peak_mib(run, device) for name, run in methods.items()}
    for number in range(rounds):
        for name in list(methods)[:: 1 if number % 2 else -1]:
            times[name].append(clock(methods[name], device))
    print(f"\n{title}\n| method | wall, ms | x fused | processor, ms | x fused | extra, MiB |\n|---|---|---|---|---|---|")
    fused = times["fused"]
    for name, rows in times.items():
        wall, processor = (statistics.median(row[i] for row in rows) for i in (0, 1))
        by_wall, by_processor = (statistics.median(row[i] / base[i] for row, base in zip(rows, fused, strict=True)) for i in (0, 1))
        print(f"| {name} | {wall:.2f} | {by_wall:.2f} | {processor:.2f} | {by_processor:.2f} | {memory[name]:.0f} |", flush=True)


def logits_tables(tokens: int, width: int, dtype: torch.dtype, rounds: int, device: torch.device) -> None:
    logits_TV = (torch.randn(tokens, width, device=device) * 3).to(dtype)
    ref_TV = (logits_TV.float() + torch.randn(tokens, width, device=device)).to(dtype)
    labels_T = torch.randint(0, width, (tokens,), device=device)

    def ours(mode: str, leaf_TV: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        with using(mode):
            return vocab_parallel_statistics(leaf_TV, labels_T, None, with_entropy=True, vocab_size=width, **options)[:2]

    def backward(statistics_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        leaf_TV = logits_TV.detach().requires_grad_()
        logprobs_T, entropy_T = statistics_of(leaf_TV)
        (logprobs_T - 0.1 * entropy_T).sum().backward()

    def kl(mode: str) -> tuple[Tensor, Tensor]:
        with using(mode):
            return vocab_parallel_statistics(logits_TV, labels_T, None, local_ref_logits_TV=ref_TV, vocab_size=width)[::2]

    shape = f"{tokens} x {width}, {str(dtype).removeprefix('torch.')}"
    compare(
        f"Log-probability and entropy, {shape}",
        {
            "fused": lambda: ours("fused", logits_TV),
            "parallel/vocab.py": lambda: ours("reference", logits_TV),
            "naive torch": lambda: naive_statistics(logits_TV, labels_T),
        },
        rounds,
        device,
    )
    compare(
        f"Log-probability and entropy with gradient, {shape}",
        {
            "fused": lambda: backward(lambda leaf_TV: ours("fused", leaf_TV)),
            "parallel/vocab.py": lambda: backward(lambda leaf_TV: ours("reference", leaf_TV)),
            "naive torch": lambda: backward(lambda leaf_TV: naive_statistics(leaf_TV, labels_T)),
        },
        rounds,
        device,
    )
    compare(
        f"Log-probability and exact KL, {shape}",
        {
            "fused": lambda: kl("fused"),
            "parallel/vocab.py": lambda: kl("reference"),
            "naive torch": lambda: naive_kl(logits_TV, ref_TV, labels_T),
        },
        rounds,
        device,
    )


def advantage_tables(traces: int, length: int, rounds: int, device: torch.device) -> None:
    """Turns of 64 own tokens between observations of 64."""
    total = traces * length
    places_T = torch.arange(total, device=device)
    mask_T = places_T % 128 >= 64
    columns = (
        torch.randn(total, device=device),
        torch.randn(total, device=device),
        torch.where(mask_T, places_T // 128, -1),
        places_T // length,
        mask_T,
    )
    numbers = {"discount": 1.0, "gae_lambda": 0.95, "turn_discount": 0.99, "turn_lambda": 0.9}

    def advantages(mode: str) -> Tensor:
        with using(mode):
            return masked_whiten(gae(*columns, **numbers)[0], mask_T)

    compare(
        f"Bi-level advantages, whitened, {traces} traces x {length} tokens",
        {"fused": lambda: advantages("fused"), "algorithm/gae.py": lambda: advantages("reference")},
        rounds,
        device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{select('fused', device)}; {torch.get_num_threads()} thread(s), torch {torch.__version__}, {arguments.rounds} rounds")
    for length in (2048, 8192):
        advantage_tables(64, length, arguments.rounds, device)
    for dtype in (torch.float32, torch.bfloat16):
        logits_tables(2048, 32768, dtype, arguments.rounds, device)


if __name__ == "__main__":
    main()
