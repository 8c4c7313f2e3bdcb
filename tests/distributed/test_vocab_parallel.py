"""Log-probability and entropy of a vocabulary sharded over gloo ranks, against float64 log_softmax of the whole.

Shapes: T label positions, V padded vocabulary.
"""

import pytest
import torch
import torch.distributed as dist

from megatron_rema.parallel.vocab import vocab_parallel_statistics


def whole(num_tokens, width, vocab_size, dtype):
    generator = torch.Generator().manual_seed(7)
    logits_TV = (torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * 3).to(dtype)
    logits_TV[:, vocab_size:] = 1e4  # padding: would swallow all probability if it were read
    labels_T = torch.arange(num_tokens) * vocab_size // num_tokens  # spread over all shards
    labels_T[0], labels_T[-1] = 0, vocab_size - 1
    return logits_TV, labels_T


def on_one_rank(width, vocab_size, dtype):
    """Log-probabilities, entropies and the gradient of this rank's shard, as lists of exact floats."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits_TV, labels_T = whole(12, width, vocab_size, dtype)
    local_TV = logits_TV.chunk(size, -1)[rank].clone().requires_grad_()
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(
        local_TV, labels_T, dist.group.WORLD, temperature=0.7, with_entropy=True, vocab_size=vocab_size
    )
    loss = (logprobs_T * torch.linspace(-2, 3, 12)).sum() + (entropy_T * torch.linspace(1, -4, 12)).sum()
    if rank != 0:
        # backward of this rank alone, the others wait: a collective in it would never complete
        dist.barrier()
    loss.backward()
    if rank == 0:
        dist.barrier()
    return logprobs_T.tolist(), entropy_T.tolist(), local_TV.grad.tolist(), str(local_TV.grad.dtype)


def constrained_on_one_rank(width, vocab_size):
    """As on_one_rank, under two sets: every third token and the labels; the last shard's labels alone."""
    rank, size = dist.get_rank(), dist.get_world_size()
    logits_TV, labels_T = whole(12, width, vocab_size, torch.float32)
    local_TV = logits_TV.chunk(size, -1)[rank].clone().requires_grad_()
    sets_SW, ids_T = sets_of(labels_T, vocab_size)[1:]
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(
        local_TV, labels_T, dist.group.WORLD, temperature=0.7, with_entropy=True, vocab_size=vocab_size, allowed_sets_SW=sets_SW,
        allowed_ids_T=ids_T,
    )  # fmt: skip
    ((logprobs_T * torch.linspace(-2, 3, 12)).sum() + (entropy_T * torch.linspace(1, -4, 12)).sum()).backward()
    return logprobs_T.tolist(), entropy_T.tolist(), local_TV.grad.tolist()


def sets_of(labels_T, vocab_size):
    """([S, V] bool, the same in [S, 2] int32 words, [T] set of each position)."""
    allowed_SV = torch.zeros(2, vocab_size, dtype=torch.bool)
    allowed_SV[0, ::3] = True
    allowed_SV[:, labels_T[6:]] = True  # set 1 lies in the upper half: the first of two shards has no token of it
    allowed_SV[0, labels_T] = True
    words_S = [sum(1 << v for v in row.nonzero()[:, 0].tolist()) for row in allowed_SV]
    sets_SW = torch.frombuffer(bytearray(b"".join(word.to_bytes(8, "little") for word in words_S)), dtype=torch.int32).view(2, 2)
    return allowed_SV, sets_SW, torch.arange(12) // 6


@pytest.mark.parametrize("vocab_size", [40, 22])
@pytest.mark.parametrize("world", [1, 2])
def test_allowed_sets_are_the_same_however_the_vocabulary_is_cut(run_ranks, world, vocab_size):
    results = run_ranks(world, constrained_on_one_rank, 40, vocab_size)
    logits_TV, labels_T = whole(12, 40, vocab_size, torch.float32)
    allowed_SV, _, ids_T = sets_of(labels_T, vocab_size)
    leaf_TV = logits_TV.double().requires_grad_()
    logp_TV = (leaf_TV[:, :vocab_size] / 0.7).masked_fill(~allowed_SV[ids_T], float("-inf")).log_softmax(-1)
    logprobs_T = logp_TV.gather(1, labels_T[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV.masked_fill(~allowed_SV[ids_T], 0.0)).sum(-1)
    ((logprobs_T * torch.linspace(-2, 3, 12)).sum() + (entropy_T * torch.linspace(1, -4, 12)).sum()).backward()
    assert_close(results[0][0], logprobs_T.detach(), atol=5e-6)
    assert_close(results[0][1], entropy_T.detach(), atol=5e-6)
    assert_close(torch.cat([torch.tensor(rank[2], dtype=torch.float64) for rank in results], -1), leaf_TV.grad, atol=2e-5)
    assert all(rank[:2] == results[0][:2] for rank in results)


def assert_close(ours, theirs, atol):
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), theirs, atol=atol, rtol=0)


# 40: both shards full; 22: padding inside a shard; 18: with two shards of 20 the whole last shard is padding
@pytest.mark.parametrize("vocab_size", [40, 22, 18])
@pytest.mark.parametrize("world", [1, 2])
def test_sharded_values_and_gradients_match_float64_and_backward_is_silent(run_ranks, world, vocab_size):
    results = run_ranks(world, on_one_rank, 40, vocab_size, torch.float32)
    logits_TV, labels_T = whole(12, 40, vocab_size, torch.float32)
    leaf_TV = logits_TV.double().requires_grad_()
    logp_TV = torch.log_softmax(leaf_TV[:, :vocab_size] / 0.7, -1)
    logprobs_T = logp_TV.gather(1, labels_T[:, None])[:, 0]
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    ((logprobs_T * torch.linspace(-2, 3, 12)).sum() + (entropy_T * torch.linspace(1, -4, 12)).sum()).backward()

    # float32 roundings of logits up to 10 / 0.7 (spacing 1e-6) and of sums over 40 columns
    assert_close(results[0][0], logprobs_T.detach(), atol=5e-6)
    assert_close(results[0][1], entropy_T.detach(), atol=5e-6)
    grad_TV = torch.cat([torch.tensor(rank[2], dtype=torch.float64) for rank in results], -1)
    assert_close(grad_TV, leaf_TV.grad, atol=2e-5)
    assert all(rank[:2] == results[0][:2] for rank in results)


def test_bf16_shards_are_computed_in_float32(run_ranks):
    results = run_ranks(2, on_one_rank, 40, 22, torch.bfloat16)
    logits_TV, labels_T = whole(12, 40, 22, torch.bfloat16)
    logprobs_T = torch.log_softmax(logits_TV.double()[:, :22] / 0.7, -1).gather(1, labels_T[:, None])[:, 0]
    assert_close(results[0][0], logprobs_T, atol=5e-6)
    assert results[0][3] == "torch.bfloat16"


def kl_on_one_rank(vocab_size):
    rank, size = dist.get_rank(), dist.get_world_size()
    logits_TV, ref_TV = pair(vocab_size)
    local_TV = logits_TV.chunk(size, -1)[rank].clone().requires_grad_()
    labels_T = torch.zeros(12, dtype=torch.int64)
    kl_T = vocab_parallel_statistics(
        local_TV, labels_T, dist.group.WORLD, local_ref_logits_TV=ref_TV.chunk(size, -1)[rank], temperature=0.7, vocab_size=vocab_size
    ).kl
    (kl_T * torch.linspace(-2, 3, 12)).sum().backward()
    return kl_T.tolist(), local_TV.grad.tolist()


def pair(vocab_size):
    """Row 3: impossible under both on all of the first shard; row 4: impossible under the policy alone."""
    logits_TV, _ = whole(12, 40, vocab_size, torch.float32)
    ref_TV = logits_TV.flip(0) * 0.5 + logits_TV * 0.5
    logits_TV[3, :20] = ref_TV[3, :20] = logits_TV[4, 5:9] = -torch.inf
    return logits_TV, ref_TV


@pytest.mark.parametrize("vocab_size", [40, 22])
@pytest.mark.parametrize("world", [1, 2])
def test_exact_kl_of_shards_matches_float64(run_ranks, world, vocab_size):
    results = run_ranks(world, kl_on_one_rank, vocab_size)
    logits_TV, ref_TV = (tensor.double()[:, :vocab_size] / 0.7 for tensor in pair(vocab_size))
    logp_TV, logq_TV = torch.log_softmax(logits_TV, -1), torch.log_softmax(ref_TV, -1)
    p_TV, difference_TV = logp_TV.exp(), torch.where(logp_TV.isinf(), 0.0, logp_TV - logq_TV)
    kl_T = (p_TV * difference_TV).sum(-1)
    assert_close(results[0][0], kl_T, atol=5e-6)
    grad_TV = torch.zeros(12, 40, dtype=torch.float64)
    grad_TV[:, :vocab_size] = p_TV * (difference_TV - kl_T[:, None]) * torch.linspace(-2, 3, 12)[:, None] / 0.7
    assert_close(torch.cat([torch.tensor(rank[1], dtype=torch.float64) for rank in results], -1), grad_TV, atol=2e-5)
    assert all(rank[0] == results[0][0] for rank in results)
