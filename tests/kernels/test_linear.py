"""Statistics straight from hidden states and the output layer's weight equal those of the whole logits.

Shapes: T label positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rema.kernels.library import using
from megatron_rema.parallel.linear_vocab import linear_logprobs_and_entropy

TOKENS, HIDDEN, WIDTH, VOCAB = 11, 16, 96, 90


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight_VH = torch.randn(WIDTH, HIDDEN, generator=generator)
    labels_T = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden_TH.to(dtype), weight_VH.to(dtype), labels_T


def weights(dtype=torch.float32):
    return torch.linspace(-2, 3, TOKENS, dtype=dtype), torch.linspace(1, -4, TOKENS, dtype=dtype)


def in_float64():
    hidden_TH, weight_VH, labels_T = make(torch.float64)
    hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    logp_TV = torch.log_softmax((hidden_TH @ weight_VH.T)[:, :VOCAB] / 0.7, -1)
    logprobs_T, entropy_T = logp_TV.gather(1, labels_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)
    g_T, h_T = weights(torch.float64)
    (logprobs_T * g_T + entropy_T * h_T).sum().backward()
    return [tensor.detach() for tensor in (logprobs_T, entropy_T, hidden_TH.grad, weight_VH.grad)]


def on_one_rank(mode, library, chunk_tokens):
    hidden_TH, weight_VH, labels_T = make()
    hidden_TH.requires_grad_()
    local_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    with using(mode, cpu=library):
        logprobs_T, entropy_T = linear_logprobs_and_entropy(
            hidden_TH, local_VH, labels_T, dist.group.WORLD, temperature=0.7, with_entropy=True, vocab_size=VOCAB, chunk_tokens=chunk_tokens
        )
        g_T, h_T = weights()
        (logprobs_T * g_T + entropy_T * h_T).sum().backward()
    return [tensor.tolist() for tensor in (logprobs_T, entropy_T, hidden_TH.grad, local_VH.grad)]


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize(("world", "chunk_tokens"), [(1, 4), (1, 100), (2, 1), (2, 5)])
def test_values_and_both_gradients_match_float64_for_any_chunk_and_cut(run_ranks, libraries, mode, world, chunk_tokens):
    ranks = run_ranks(world, on_one_rank, mode, libraries["cpu"], chunk_tokens)
    *expected, expected_weight_VH = in_float64()
    for rank in ranks:
        for ours, theirs in zip(rank[:3], expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours).double(), theirs, atol=5e-5, rtol=1e-5)  # float32, logits up to 20 / 0.7
    grad_VH = torch.cat([torch.tensor(rank[3]) for rank in ranks])
    torch.testing.assert_close(grad_VH.double(), expected_weight_VH, atol=5e-5, rtol=1e-5)
    assert (grad_VH[VOCAB:] == 0).all()


def test_logits_exist_for_one_chunk_only(on_cpu):
    hidden_TH, weight_VH, labels_T = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_logprobs_and_entropy(
            hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, None, vocab_size=VOCAB, chunk_tokens=3
        )
    assert max(tensor.numel() for tensor in saved) <= WIDTH * HIDDEN and not any(tensor.shape == (TOKENS, WIDTH) for tensor in saved)


def test_no_entropy_no_tokens_and_bad_chunks(on_cpu):
    hidden_TH, weight_VH, labels_T = make()
    logprobs_T, entropy_T = linear_logprobs_and_entropy(hidden_TH.requires_grad_(), weight_VH, labels_T, None, vocab_size=VOCAB)
    logprobs_T.sum().backward()
    assert entropy_T is None and hidden_TH.grad.abs().max() > 0
    nobody_TH = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs_T, _ = linear_logprobs_and_entropy(nobody_TH, weight_VH, labels_T[:0], None, vocab_size=VOCAB)
    logprobs_T.sum().backward()
    assert logprobs_T.shape == (0,) and nobody_TH.grad.shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_logprobs_and_entropy(hidden_TH, weight_VH, labels_T, None, vocab_size=VOCAB, chunk_tokens=0)
