"""Update tokens per second of our training path beside plain transformers + torch on the same batch: python benchmarks/training_step.py

Both hold the same ~10M random weights in float32, see the same sequences, take the same loss (mean negative log-likelihood of every token
but each sequence's first), clip gradients to norm 1 and step AdamW. Ours (TP1 PP1): pack -> megatron-core forward and backward -> its
optimizer. Theirs: right-padded batch -> AutoModelForCausalLM (sdpa) -> torch.nn.functional.cross_entropy -> torch.optim.AdamW. A step is
timed whole, batching of the sequences included. The two take turns, step by step, and the order flips every round. Beside the wall clock
stands the processor time of the process, which other users of a shared machine disturb less.

Before anything is timed, three steps of each must give losses that agree to 1e-4. --profile adds where the time goes, by kind of operation.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import load_hf
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import Groups, build_groups
from megatron_rema.parallel.pipeline import reduce_stats
from megatron_rema.parallel.vocab import vocab_parallel_statistics
from megatron_rema.trainer.cast import process_group
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.types import Batch, Role, Trace

MODEL = {
    "hidden_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "intermediate_size": 864,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LR, BETAS, EPS, CLIP = 1e-4, (0.9, 0.95), 1e-8, 1.0
Sequences = list[list[int]]
Step = Callable[[Sequences], float]  # -> loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each path on each batch")
    parser.add_argument("--sequences", type=int, default=16, help="in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="mean length of a sequence")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")), help="of torch")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = {
        "equal lengths": equal_lengths(arguments.sequences, arguments.tokens),
        "mixed lengths": mixed_lengths(arguments.sequences, arguments.tokens),
    }
    with tempfile.TemporaryDirectory() as folder, process_group():
        arch = save_random_model(Path(folder) / "hf")
        paths = {"ours": our_path(Path(folder) / "hf", arch), "transformers": their_path(Path(folder) / "hf")}
        print(f"torch {torch.__version__}, {arguments.threads} thread(s), {os.cpu_count()} cores")
        columns = ["batch", "trained tokens", "padded to", "ours, tokens/s", "transformers, tokens/s"]
        columns += ["ratio", "middle half", "by processor time", "middle half"]
        print(table_row(columns) + "\n" + table_row(["---"] * len(columns)))
        for name, sequences in batches.items():
            check_equal_losses(paths, sequences)
            compare(name, paths, sequences, arguments.rounds)
        if arguments.profile:
            for name, sequences in batches.items():
                profile(name, paths, sequences)


def equal_lengths(num_sequences: int, num_tokens: int) -> Sequences:
    generator = random.Random(0)
    return [[generator.randrange(MODEL["vocab_size"]) for _ in range(num_tokens + 1)] for _ in range(num_sequences)]


def mixed_lengths(num_sequences: int, mean: int) -> Sequences:
    """As many tokens in all; lengths spread evenly from a quarter of the mean to seven quarters, as dialogue views do and more."""
    generator = random.Random(1)
    lengths = [round(mean * (0.25 + 1.5 * i / (num_sequences - 1))) for i in range(num_sequences)]
    lengths[-1] += num_sequences * mean - sum(lengths)
    generator.shuffle(lengths)
    return [[generator.randrange(MODEL["vocab_size"]) for _ in range(length + 1)] for length in lengths]


def save_random_model(path: Path) -> Architecture:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODEL))
    print(f"{model.num_parameters() / 1e6:.1f}M parameters")
    model.save_pretrained(path)
    return Architecture.from_pretrained(path)


def our_path(path: Path, arch: Architecture) -> Step:
    groups = build_groups(tensor=1, pipeline=1)
    model = build_policy(arch, groups=groups)
    load_hf(model.module, arch, path, groups)
    optimizer = build_optimizer(model, lr=LR, total_steps=1, betas=BETAS, eps=EPS, grad_clip=CLIP)

    def loss(local_logits_TV: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_T, _, _ = vocab_parallel_statistics(local_logits_TV, batch.labels, groups.tp, vocab_size=arch.vocab_size)
        total = -torch.where(batch.loss_mask, batch.loss_weights * logprobs_T, 0.0).sum()
        return total, {"loss": total.detach()}

    def step(sequences: Sequences) -> float:
        batches = our_batches(sequences, groups)
        optimizer.zero_grad()
        stats = reduce_stats(model.forward_backward(batches, loss), groups)
        optimizer.step()
        return stats["loss"]

    return step


def our_batches(sequences: Sequences, groups: Groups) -> list[Batch]:
    traces = [
        Trace("", Role.REASONING, tuple(ids), (False,) + (True,) * (len(ids) - 1), (-1,) + (0,) * (len(ids) - 1), (0.0,) * len(ids), (0.0,))
        for ids in sequences
    ]
    length = sum(len(ids) - 1 for ids in sequences)
    return pack_for_rank(traces, aggregation="token", max_turns=1, microbatch_tokens=-(-length // 8) * 8, groups=groups)


def their_path(path: Path) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def step(sequences: Sequences) -> float:
        longest = max(len(ids) for ids in sequences) - 1
        tokens = torch.tensor([ids[:-1] + [0] * (longest + 1 - len(ids)) for ids in sequences])
        labels = torch.tensor([ids[1:] + [-100] * (longest + 1 - len(ids)) for ids in sequences])
        mask = labels >= 0
        optimizer.zero_grad()
        logits = model(tokens, attention_mask=None if mask.all() else mask.long(), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return step


def check_equal_losses(paths: dict[str, Step], sequences: Sequences) -> None:
    """Three steps: the later losses see the earlier updates."""
    for _ in range(3):
        losses = {name: step(sequences) for name, step in paths.items()}
        assert abs(losses["ours"] - losses["transformers"]) < 1e-4, losses


def compare(name: str, paths: dict[str, Step], sequences: Sequences, rounds: int) -> None:
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {path: [] for path in paths} for clock in clocks}
    for number in range(rounds):
        for path in sorted(paths, reverse=number % 2 == 1):
            begin = {clock: now() for clock, now in clocks.items()}
            paths[path](sequences)
            for clock, now in clocks.items():
                seconds[clock][path].append(now() - begin[clock])
    num_tokens = sum(len(ids) - 1 for ids in sequences)
    padded = len(sequences) * (max(len(ids) for ids in sequences) - 1)
    rate = {path: num_tokens / statistics.median(times) for path, times in seconds["wall"].items()}
    cells = [name, f"{num_tokens:,}", f"{padded:,}", f"{rate['ours']:,.0f}", f"{rate['transformers']:,.0f}"]
    for clock in clocks:
        ratios = [theirs / ours for ours, theirs in zip(seconds[clock]["ours"], seconds[clock]["transformers"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
    print(table_row(cells), flush=True)


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- where the time goes ----------------------------------------------------------------------------------------------

KINDS = {  # kind -> what an operation's name contains; the first that fits counts
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("flash_attention",),
    "loss": ("log_softmax", "aten::exp", "aten::log", "nll_loss", "aten::amax", "aten::scatter_add", "aten::gather"),
    "optimizer": ("aten::lerp", "aten::addcdiv", "aten::sqrt", "AdamW", "vector_norm", "_foreach"),
    "copies, zeros": ("copy", "aten::cat", "clone", "index", "zero", "fill", "empty", "embedding"),
}


def profile(name: str, paths: dict[str, Step], sequences: Sequences, steps: int = 3) -> None:
    """Self time of every operation, by kind, per step. The profiler itself costs time: compare shares, not with the table above."""
    print(f"\n{name}")
    rows = {}
    for path, step in paths.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                step(sequences)
        spent = dict.fromkeys([*KINDS, "the rest"], 0.0)
        for event in profiler.key_averages():
            kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "the rest")
            spent[kind] += event.self_cpu_time_total / 1000 / steps
        rows[path] = spent
    print(table_row(["ms a step", *spent, "all"]) + "\n" + table_row(["---"] * (len(spent) + 2)))
    for path, spent in rows.items():
        print(table_row([path, *(f"{value:.0f}" for value in [*spent.values(), sum(spent.values())])]))


if __name__ == "__main__":
    main()
