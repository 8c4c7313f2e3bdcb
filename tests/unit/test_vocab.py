"""Log-probability and entropy of an unsharded vocabulary. Sharded ones: tests/distributed/test_vocab_parallel.py.

Shapes: T label positions, V padded vocabulary.
"""

import pytest
import torch

from megatron_rema.parallel import vocab
from megatron_rema.parallel.vocab import vocab_parallel_statistics


def make(num_tokens=13, width=24, vocab_size=21, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * scale
    logits_TV[:, vocab_size:] = 1e4  # padding columns: would swallow all probability if they were read
    labels_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return logits_TV.to(dtype), labels_T


def reference(logits_TV, labels_T, temperature, vocab_size):
    logp_TV = torch.log_softmax(logits_TV.double()[:, :vocab_size] / temperature, -1)
    return logp_TV.gather(1, labels_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


# float32: one rounding of the logits (spacing 1e-6 at 10) and of sums over 21 columns; bf16 logits are read exactly, so the same
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_values_match_log_softmax_in_float64(dtype, temperature):
    logits_TV, labels_T = make(dtype=dtype)
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(
        logits_TV, labels_T, None, temperature=temperature, with_entropy=True, vocab_size=21
    )
    expected_logprobs_T, expected_entropy_T = reference(logits_TV, labels_T, temperature, 21)
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    torch.testing.assert_close(logprobs_T.double(), expected_logprobs_T, atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy_T.double(), expected_entropy_T, atol=5e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("use_logprobs", [True, False])
@pytest.mark.parametrize("use_entropy", [True, False])
def test_gradients_match_log_softmax_in_float64_for_any_chunking(monkeypatch, rows, use_logprobs, use_entropy):
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", rows * 24)
    logits_TV, labels_T = make()
    ours_TV, theirs_TV = logits_TV.clone().requires_grad_(), logits_TV.double().requires_grad_()
    g_T, h_T = torch.linspace(-2, 3, 13), torch.linspace(1, -4, 13)  # incoming gradients other than 1, both signs

    def loss(logprobs_T, entropy_T):
        zero = 0.0 * (logprobs_T.sum() + entropy_T.sum())
        return zero + use_logprobs * (logprobs_T * g_T).sum() + use_entropy * (entropy_T * h_T).sum()

    loss(*vocab_parallel_statistics(ours_TV, labels_T, None, temperature=0.7, with_entropy=True, vocab_size=21)[:2]).backward()
    loss(*reference(theirs_TV, labels_T, 0.7, 21)).backward()
    torch.testing.assert_close(ours_TV.grad.double(), theirs_TV.grad, atol=2e-5, rtol=0)  # gradients are of order 4 / 0.7
    assert (ours_TV.grad[:, 21:] == 0).all()


def test_gradients_match_finite_differences():
    logits_TV, labels_T = make(5, 7, 6, scale=1.0, dtype=torch.float64)
    logits_TV[:, 6:] = 0.0
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_statistics(x, labels_T, None, temperature=0.7, with_entropy=True, vocab_size=6)[:2],
        logits_TV.requires_grad_(),
    )


def packed(allowed_SV):
    """[S, V] bool -> [S, W] int32 words, bit by bit."""
    words_SW = torch.zeros(len(allowed_SV), -(-allowed_SV.shape[1] // 32), dtype=torch.int64)
    for s, v in allowed_SV.nonzero().tolist():
        words_SW[s, v // 32] |= 1 << (v % 32)
    return words_SW.where(words_SW < 2**31, words_SW - 2**32).int()  # bit 31 is the sign


def make_constrained(vocab_size):
    """Sets: everything, about half of the tokens, one token. Positions take them in turn; every label is in its set."""
    generator = torch.Generator().manual_seed(1)
    logits_TV, labels_T = make(12, vocab_size + 3, vocab_size)
    allowed_SV = torch.ones(3, vocab_size, dtype=torch.bool)
    ids_T = torch.arange(12) % 3
    allowed_SV[1] = torch.rand(vocab_size, generator=generator) < 0.5
    allowed_SV[1, labels_T[ids_T == 1]] = True
    allowed_SV[2] = False
    allowed_SV[2, labels_T[2]] = True
    labels_T[ids_T == 2] = labels_T[2].item()
    return logits_TV, labels_T, allowed_SV, ids_T


@pytest.mark.parametrize("vocab_size", [21, 32, 75])  # inside a word, a whole word with its sign bit, over three words
@pytest.mark.parametrize("rows", [1, 100])
def test_under_allowed_sets_values_and_gradients_are_those_of_a_softmax_over_the_set(monkeypatch, vocab_size, rows):
    logits_TV, labels_T, allowed_SV, ids_T = make_constrained(vocab_size)
    monkeypatch.setattr(vocab, "CHUNK_ELEMENTS", rows * logits_TV.shape[1])
    ours_TV, theirs_TV = logits_TV.clone().requires_grad_(), logits_TV.double().requires_grad_()
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(
        ours_TV, labels_T, None, temperature=0.7, with_entropy=True, vocab_size=vocab_size, allowed_sets_SW=packed(allowed_SV),
        allowed_ids_T=ids_T,
    )  # fmt: skip
    logp_TV = (theirs_TV[:, :vocab_size] / 0.7).masked_fill(~allowed_SV[ids_T], float("-inf")).log_softmax(-1)
    expected_T = logp_TV.gather(1, labels_T[:, None])[:, 0]
    expected_entropy_T = -(logp_TV.exp() * logp_TV.masked_fill(~allowed_SV[ids_T], 0.0)).sum(-1)
    torch.testing.assert_close(logprobs_T.double(), expected_T, atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy_T.double(), expected_entropy_T, atol=5e-6, rtol=0)
    g_T, h_T = torch.linspace(-2, 3, 12), torch.linspace(1, -4, 12)
    (logprobs_T * g_T + entropy_T * h_T).sum().backward()
    (expected_T * g_T + expected_entropy_T * h_T).sum().backward()
    torch.testing.assert_close(ours_TV.grad.double(), theirs_TV.grad, atol=2e-5, rtol=0)
    forced_T = ids_T == 2
    assert (logprobs_T[forced_T] == 0.0).all() and (ours_TV.grad[forced_T] == 0.0).all()  # no choice: nothing to learn
    assert (ours_TV.grad[:, :vocab_size][~allowed_SV[ids_T]] == 0.0).all()


def test_a_label_outside_its_set_stands_out():
    logits_TV, labels_T, allowed_SV, ids_T = make_constrained(21)
    allowed_SV[1, labels_T[1]] = False
    logprobs_T, _, _ = vocab_parallel_statistics(
        logits_TV, labels_T, None, vocab_size=21, allowed_sets_SW=packed(allowed_SV), allowed_ids_T=ids_T
    )
    assert logprobs_T[1] == -torch.inf and torch.isfinite(logprobs_T[2:]).all()


def test_without_entropy_there_is_none_and_the_logprob_gradient_is_the_same():
    logits_TV, labels_T = make()
    grads = []
    for with_entropy in (False, True):
        leaf_TV = logits_TV.clone().requires_grad_()
        logprobs_T, entropy_T, _ = vocab_parallel_statistics(leaf_TV, labels_T, None, with_entropy=with_entropy, vocab_size=21)
        assert (entropy_T is not None) == with_entropy
        logprobs_T.sum().backward()
        grads.append(leaf_TV.grad)
    assert torch.equal(*grads)


def test_backward_keeps_the_logits_and_only_small_tensors_beside_them():
    saved = []
    logits_TV, labels_T = make(dtype=torch.bfloat16)
    logits_TV.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        vocab_parallel_statistics(logits_TV, labels_T, None, with_entropy=True, vocab_size=21)
    large = [t for t in saved if t.numel() > 13]
    assert [t.data_ptr() for t in large] == [logits_TV.data_ptr()]


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_peaked_distributions_stay_finite_with_entropy_near_zero(scale):
    logits_TV, labels_T = make(scale=scale)
    logits_TV[:, 21:] = 0
    leaf_TV = logits_TV.requires_grad_()
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(leaf_TV, labels_T, None, with_entropy=True, vocab_size=21)
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert logprobs_T.isfinite().all() and leaf_TV.grad.isfinite().all()
    expected_T = reference(logits_TV.detach(), labels_T, 1.0, 21)[1]
    torch.testing.assert_close(entropy_T.double(), expected_T, atol=1e-4, rtol=0)  # float32 spacing of logits near 1e3 is 6e-5


def test_nan_logits_and_impossible_labels_are_not_hidden():
    logits_TV, labels_T = make()
    logits_TV[2, 4] = float("nan")
    labels_T[5], labels_T[6] = 21, -1  # a padding column and no column
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(logits_TV, labels_T, None, with_entropy=True, vocab_size=21)
    assert logprobs_T.isnan().nonzero()[:, 0].tolist() == [2, 5, 6]
    assert entropy_T.isnan().nonzero()[:, 0].tolist() == [2]


def test_impossible_logits_have_no_probability_and_no_gradient():
    """Row 0: three -inf of 21; row 1: all but the label's. Entropies are those of the other columns; 0 * log 0 = 0."""
    logits_TV, labels_T = make()
    labels_T[:2] = torch.tensor([9, 9])
    logits_TV[0, 3:6] = logits_TV[1, :9] = logits_TV[1, 10:21] = -torch.inf
    leaf_TV = logits_TV.clone().requires_grad_()
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(leaf_TV, labels_T, None, with_entropy=True, vocab_size=21)
    (logprobs_T + entropy_T).sum().backward()
    kept = [*range(3), *range(6, 21)]
    expected_logp, expected_entropy = reference(logits_TV[:1, kept], labels_T[:1] - 3, 1.0, 18)
    torch.testing.assert_close(logprobs_T[:1].double(), expected_logp, atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy_T[:1].double(), expected_entropy, atol=5e-6, rtol=0)
    assert logprobs_T[1] == 0.0 and entropy_T[1] == 0.0
    assert leaf_TV.grad.isfinite().all() and (leaf_TV.grad[0, 3:6] == 0).all() and (leaf_TV.grad[1] == 0).all()


def kl(logits_TV, ref_TV, **options):
    labels_T = torch.zeros(len(logits_TV), dtype=torch.int64)
    return vocab_parallel_statistics(logits_TV, labels_T, None, local_ref_logits_TV=ref_TV, **options).kl


def test_exact_kl_gradients_match_finite_differences():
    logits_TV, _ = make(5, 7, 6, scale=1.0, dtype=torch.float64)
    ref_TV = logits_TV.flip(0).clone()
    logits_TV[:, 6:] = ref_TV[:, 6:] = 0.0
    assert torch.autograd.gradcheck(lambda x: kl(x, ref_TV, temperature=0.7, vocab_size=6), logits_TV.requires_grad_())


def test_exact_kl_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812."""
    p_TV, q_TV = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    assert kl(p_TV, q_TV, vocab_size=2).item() == pytest.approx(0.1308120, abs=1e-6)
    assert kl(p_TV, p_TV, vocab_size=2).item() == pytest.approx(0.0, abs=1e-7)
    assert kl(p_TV, torch.tensor([[0.0, -torch.inf]]), vocab_size=2).item() == float("inf")


def test_no_tokens_are_fine():
    logits_TV = torch.zeros(0, 24, requires_grad=True)
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(logits_TV, torch.zeros(0).long(), None, with_entropy=True, vocab_size=21)
    (logprobs_T.sum() + entropy_T.sum()).backward()
    assert logprobs_T.shape == entropy_T.shape == (0,) and logits_TV.grad.shape == (0, 24)


def test_bad_settings_are_refused_with_the_numbers():
    logits_TV, labels_T = make()
    with pytest.raises(ValueError, match=r"1 shards of 24 columns hold 24 logits, fewer than vocab_size \(25\)"):
        vocab_parallel_statistics(logits_TV, labels_T, None, vocab_size=25)
    with pytest.raises(ValueError, match="temperature"):
        vocab_parallel_statistics(logits_TV, labels_T, None, temperature=0.0, vocab_size=21)
