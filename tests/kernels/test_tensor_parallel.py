"""Fused statistics of a vocabulary sharded over gloo ranks equal those of one rank.

Shapes: T label positions, V padded vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rema.kernels import logits as kernels
from megatron_rema.kernels.library import using
from megatron_rema.parallel.vocab import vocab_parallel_statistics

TOKENS, WIDTH = 9, 1024


def on_one_rank(library, vocab_size, dtype):
    """Log-probabilities, entropies, KLs, the gradient of this rank's shard, and the largest exponents, as lists of exact floats."""
    generator = torch.Generator().manual_seed(3)
    logits_TV = (torch.randn(TOKENS, WIDTH, generator=generator) * 4).to(dtype)
    ref_TV = (logits_TV.float() + torch.randn(TOKENS, WIDTH, generator=generator)).to(dtype)
    logits_TV[:, vocab_size:], ref_TV[:, vocab_size:] = 1e4, float("nan")
    labels_T = torch.arange(TOKENS) * vocab_size // TOKENS  # spread over the shards
    labels_T[0], labels_T[-1] = 0, vocab_size - 1
    rank, size = dist.get_rank(), dist.get_world_size()
    local_TV = logits_TV.chunk(size, -1)[rank].clone().requires_grad_()
    local_ref_TV = ref_TV.chunk(size, -1)[rank]
    with using("fused", cpu=library):
        first = rank * WIDTH // size
        num_valid = min(max(vocab_size - first, 0), WIDTH // size)
        part_T8 = kernels.partial(local_TV, local_ref_TV, labels_T, first_column=first, num_valid=num_valid, temperature=0.7)
        parts_ST8 = [torch.empty_like(part_T8) for _ in range(size)]
        dist.all_gather(parts_ST8, part_T8)
        largest = [torch.stack(parts_ST8)[..., column].amax(0).tolist() for column in (0, 5)]
        logprobs_T, entropy_T, kl_T = vocab_parallel_statistics(
            local_TV,
            labels_T,
            dist.group.WORLD,
            local_ref_logits_TV=local_ref_TV,
            temperature=0.7,
            with_entropy=True,
            vocab_size=vocab_size,
        )
        (logprobs_T * torch.linspace(-2, 3, TOKENS) + entropy_T * torch.linspace(1, -4, TOKENS) + kl_T * 0.5).sum().backward()
    return [logprobs_T.tolist(), entropy_T.tolist(), kl_T.tolist()], local_TV.grad.tolist(), largest


# 1024: no padding; 700: a shard with padding and (of four) one that is all padding
@pytest.mark.parametrize("vocab_size", [1024, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["cpu", "emulator"])
def test_shards_give_what_the_whole_gives(run_ranks, libraries, kind, world, dtype, vocab_size):
    (whole,) = run_ranks(1, on_one_rank, libraries[kind], vocab_size, dtype)
    shards = run_ranks(world, on_one_rank, libraries[kind], vocab_size, dtype)
    assert all(shard[0] == shards[0][0] for shard in shards), "every rank has the same values, bit for bit"
    assert all(shard[2] == whole[2] for shard in shards), "largest exponents are the same bits however the columns are cut"
    # sums of up to 512 terms in another order, float32, values up to 20
    torch.testing.assert_close(torch.tensor(shards[0][0]), torch.tensor(whole[0]), atol=2e-6, rtol=3e-7)
    grad_TV = torch.cat([torch.tensor(shard[1]) for shard in shards], -1)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]  # bfloat16: one step of its last bit where a sum differs
    torch.testing.assert_close(grad_TV, torch.tensor(whole[1]), atol=2e-6, rtol=rounding)
