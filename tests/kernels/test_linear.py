"""Statistics straight from hidden states and the output layer's weight equal those of the whole logits.

Shapes: T label positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rema.kernels.library import using
from megatron_rema.parallel.linear_vocab import Factors, linear_statistics

TOKENS, HIDDEN, WIDTH, VOCAB = 11, 16, 96, 90
ALLOWED_SETS = torch.tensor([[-1] * 3, [0x55555555] * 3], dtype=torch.int32)  # all tokens; the even ones, as all labels are


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight_VH = torch.randn(WIDTH, HIDDEN, generator=generator)
    labels_T = torch.randint(0, VOCAB // 2, (TOKENS,), generator=generator) * 2
    return hidden_TH.to(dtype), weight_VH.to(dtype), labels_T


def weights(dtype=torch.float32):
    return [torch.linspace(*ends, TOKENS, dtype=dtype) for ends in ((-2, 3), (1, -4), (0.5, 2))]


def in_float64():
    hidden_TH, weight_VH, labels_T = make(torch.float64)
    hidden_TH.requires_grad_(), weight_VH.requires_grad_()
    forbidden_TV = torch.zeros(TOKENS, VOCAB, dtype=torch.bool)
    forbidden_TV[1::2, 1::2] = True
    logp_TV, logq_TV = (
        ((states_TH @ rows_VH.T)[:, :VOCAB] / 0.7).masked_fill(forbidden_TV, -torch.inf).log_softmax(-1).masked_fill(forbidden_TV, 0.0)
        for states_TH, rows_VH in ((hidden_TH, weight_VH), (hidden_TH.detach().flip(0), weight_VH.detach()))
    )
    p_TV = logp_TV.exp().masked_fill(forbidden_TV, 0.0)
    values = [logp_TV.gather(1, labels_T[:, None])[:, 0], -(p_TV * logp_TV).sum(-1), (p_TV * (logp_TV - logq_TV)).sum(-1)]
    sum((value_T * grad_T).sum() for value_T, grad_T in zip(values, weights(torch.float64), strict=True)).backward()
    return [tensor.detach() for tensor in (*values, hidden_TH.grad, weight_VH.grad)]


def on_one_rank(mode, library, chunk_tokens):
    hidden_TH, weight_VH, labels_T = make()
    hidden_TH.requires_grad_()
    local_VH = weight_VH.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    with using(mode, cpu=library):
        values = linear_statistics(
            Factors(hidden_TH, local_VH),
            labels_T,
            dist.group.WORLD,
            ref_logits=Factors(hidden_TH.detach().flip(0), local_VH.detach()),
            temperature=0.7,
            with_entropy=True,
            vocab_size=VOCAB,
            allowed_sets_SW=ALLOWED_SETS,
            allowed_ids_T=torch.arange(TOKENS) % 2,
            chunk_tokens=chunk_tokens,
        )
        sum((value_T * grad_T).sum() for value_T, grad_T in zip(values, weights(), strict=True)).backward()
    return [tensor.tolist() for tensor in (*values, hidden_TH.grad, local_VH.grad)]


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize(("world", "chunk_tokens"), [(1, 4), (1, 100), (2, 1), (2, 5)])
def test_values_and_both_gradients_match_float64_for_any_chunk_and_cut(run_ranks, libraries, mode, world, chunk_tokens):
    ranks = run_ranks(world, on_one_rank, mode, libraries["cpu"], chunk_tokens)
    *expected, expected_weight_VH = in_float64()
    for rank in ranks:
        for ours, theirs in zip(rank[:4], expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours).double(), theirs, atol=5e-5, rtol=1e-5)  # float32, logits up to 20 / 0.7
    grad_VH = torch.cat([torch.tensor(rank[4]) for rank in ranks])
    torch.testing.assert_close(grad_VH.double(), expected_weight_VH, atol=5e-5, rtol=1e-5)
    assert (grad_VH[VOCAB:] == 0).all()


def test_logits_exist_for_one_chunk_only(on_cpu):
    hidden_TH, weight_VH, labels_T = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        factors = Factors(hidden_TH.requires_grad_(), weight_VH.requires_grad_())
        linear_statistics(factors, labels_T, None, vocab_size=VOCAB, chunk_tokens=3)
    assert max(tensor.numel() for tensor in saved) <= WIDTH * HIDDEN and not any(tensor.shape == (TOKENS, WIDTH) for tensor in saved)


def test_no_entropy_no_tokens_and_bad_chunks(on_cpu):
    hidden_TH, weight_VH, labels_T = make()
    logprobs_T, *rest = linear_statistics(Factors(hidden_TH.requires_grad_(), weight_VH), labels_T, None, vocab_size=VOCAB)
    logprobs_T.sum().backward()
    assert rest == [None, None] and hidden_TH.grad.abs().max() > 0
    nobody_TH = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs_T, *_ = linear_statistics(Factors(nobody_TH, weight_VH), labels_T[:0], None, vocab_size=VOCAB)
    logprobs_T.sum().backward()
    assert logprobs_T.shape == (0,) and nobody_TH.grad.shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_statistics(Factors(hidden_TH, weight_VH), labels_T, None, vocab_size=VOCAB, chunk_tokens=0)
