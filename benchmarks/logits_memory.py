"""Peak memory of one update with whole logits and with logits in chunks: python benchmarks/logits_memory.py

A small model with a large vocabulary: its logits fill a step. The same packed tokens, forward and backward of log-probabilities and
entropy, alone and with the exact KL to a reference. Each row runs in a process of its own, after a step of few tokens; "extra" is the peak
of resident memory in the step above what the process held before it (weights and gradient buffers are not in it, the output weight's
fresh gradient is). The losses of all rows must agree to 1e-5.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence

from measure import forget_peak, peak_mib

VOCABULARY, HIDDEN = 151_936, 256
MIB = 1 << 20


def measure(tokens: int, chunk_tokens: int, exact: bool) -> tuple[float, float, float]:
    """Extra MiB, seconds of processor time, loss."""
    import torch

    from megatron_rema.architecture import Architecture
    from megatron_rema.kernels import library
    from megatron_rema.models.policy import build_policy
    from megatron_rema.parallel.groups import build_groups
    from megatron_rema.trainer.cast import process_group
    from megatron_rema.types import Batch

    torch.set_num_threads(1)
    library.select("auto", torch.device("cpu"))
    arch = Architecture(
        family="qwen2",
        num_layers=2,
        hidden_size=HIDDEN,
        ffn_hidden_size=2 * HIDDEN,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HIDDEN // 4,
        vocab_size=VOCABULARY,
        rope_theta=10000.0,
        rope_scaling_factor=None,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        qk_norm=False,
        tied=True,
        max_positions=tokens,
        eos_token_ids=(0,),
    )

    def packed(number: int) -> Batch:
        ids = torch.randint(0, VOCABULARY, (number + 1,), generator=torch.Generator().manual_seed(0))
        return Batch(
            tokens=ids[:-1],
            labels=ids[1:],
            positions=torch.arange(number),
            cu_seqlens=torch.tensor([0, number], dtype=torch.int32),
            max_seqlen=number,
            loss_mask=torch.ones(number, dtype=torch.bool),
            turn_ids=torch.zeros(number, dtype=torch.int64),
            trace_ids=torch.zeros(number, dtype=torch.int64),
            cu_turns=torch.tensor([0, number]),
        )

    with process_group():
        groups = build_groups(tensor=1, pipeline=1)
        model = build_policy(arch, groups=groups, seed=1, logits_chunk_tokens=chunk_tokens)
        reference = build_policy(arch, groups=groups, seed=2, trainable=False, logits_chunk_tokens=chunk_tokens) if exact else None

        def loss(outputs, batch):
            logprobs_T, entropy_T, kl_T = model.statistics(outputs, batch, with_entropy=True, reference=reference)
            total = -(logprobs_T + 0.01 * entropy_T).mean() + (0.1 * kl_T.mean() if exact else 0.0)
            return total, {"loss": total.detach()}

        def step(number: int) -> float:
            for chunk in model.chunks:
                chunk.zero_grad_buffer()
            return float(model.forward_backward([packed(number)], loss)[0]["loss"])

        step(64)
        before, start = forget_peak(), time.process_time()
        value = step(tokens)
        return peak_mib() - before, time.process_time() - start, value


def table(tokens: int, chunks: Sequence[int]) -> None:
    print(
        f"{tokens:,} tokens x {VOCABULARY:,} float32 logits: {tokens * VOCABULARY * 4 / MIB:,.0f} MiB; {os.cpu_count()} cores, one thread"
    )
    print("| logits_chunk_tokens | extra, MiB | processor, s | with exact KL: extra, MiB | processor, s |\n|---|---|---|---|---|")
    losses: dict[bool, list[float]] = {False: [], True: []}
    for chunk_tokens in chunks:
        cells = [f"{chunk_tokens:,}" if chunk_tokens else "0 (whole)"]
        for exact, values in losses.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                extra, seconds, loss = pool.apply(measure, (tokens, chunk_tokens, exact))
            cells += [f"{extra:,.0f}", f"{seconds:.1f}"]
            values.append(loss)
        print(f"| {' | '.join(cells)} |", flush=True)
    assert all(max(values) - min(values) < 1e-5 * abs(values[0]) for values in losses.values()), losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 1024, 256, 64])
    arguments = parser.parse_args()
    table(arguments.tokens, arguments.chunks)
