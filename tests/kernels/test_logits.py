"""Fused log-probability, entropy and KL against float64, on odd shapes and with incoming gradients of both signs.

Error rule: at most twice that of plain torch (log_softmax and autograd in float32 from the same logits), plus a floor of a few roundings.
Shapes: T label positions, V columns.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_rema.kernels import logits as kernels
from megatron_rema.kernels.library import using
from megatron_rema.parallel.vocab import vocab_parallel_statistics

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, V, vocab_size): one column; fewer columns than a 16-byte load has numbers; a scalar tail; rows that are not aligned; several rounds of
# the widest loop (4 loads of 8 numbers by 256 threads = 8,192 columns) with a tail; padding
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 257, 257), (5, 1003, 1000), (2, 16384 + 2056, 16384 + 2049)]


def make(tokens, width, vocab_size, dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_TV = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
    ref_TV = (logits_TV.double() + torch.randn(tokens, width, generator=generator, dtype=torch.float64)).to(dtype)
    logits_TV[:, vocab_size:], ref_TV[:, vocab_size:] = 1e4, NAN  # padding that would be seen
    labels_T = torch.randint(0, vocab_size, (tokens,), generator=generator)
    labels_T[0] = vocab_size - 1
    return logits_TV, ref_TV, labels_T


def incoming(tokens, seed=1):
    """[3, T] gradients of log-probabilities, entropies and KLs: not 1, both signs."""
    return torch.randn(3, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def plain(logits_TV, ref_TV, labels_T, temperature, vocab_size, dtype):
    """Plain torch with autograd, computed in ``dtype``: [3, T] values and the gradient of their sum times `incoming`."""
    leaf_TV = logits_TV.clone().requires_grad_()
    logp_TV = torch.log_softmax(leaf_TV.to(dtype)[:, :vocab_size] / temperature, -1)
    logq_TV = torch.log_softmax(ref_TV.to(dtype)[:, :vocab_size] / temperature, -1)
    values = torch.stack(
        [
            logp_TV.gather(1, labels_T[:, None])[:, 0],
            -(logp_TV.exp() * logp_TV).sum(-1),
            (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1),
        ]
    )
    (values * incoming(len(labels_T)).to(dtype)).sum().backward()
    return values.detach(), leaf_TV.grad


def fused(logits_TV, ref_TV, labels_T, temperature, vocab_size, device, use=(True, True, True)):
    """The same through the kernels, log-probability, entropy and KL from one pass."""
    leaf_TV, ref_TV, labels_T = logits_TV.detach().to(device).requires_grad_(), ref_TV.to(device), labels_T.to(device)
    shape = {"first_column": 0, "num_valid": vocab_size, "temperature": temperature}
    parts_STW = kernels.partial(leaf_TV, ref_TV, labels_T, **shape)[None]
    result = kernels.finish(parts_STW, leaf_TV, ref_TV, labels_T, vocab_size=vocab_size, **shape)
    sums = [(v * g.float().to(device)).sum() for v, g, used in zip(result, incoming(len(labels_T)), use, strict=True) if used]
    sum(sums).backward()
    return torch.stack(list(result)).detach().cpu(), leaf_TV.grad.cpu()


def assert_at_most_twice(ours, theirs, exact, floor):
    error, allowed = (ours.double() - exact).abs().max().item(), (theirs.double() - exact).abs().max().item()
    assert error <= 2 * allowed + floor, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "vocab_size"), SHAPES)
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 3.0), (0.7, 30.0)])
def test_values_and_gradients_err_at_most_twice_as_much_as_plain_torch(device, dtype, tokens, width, vocab_size, temperature, scale):
    case = make(tokens, width, vocab_size, dtype, scale)
    exact, exact_grad_TV = plain(case[0].double(), case[1].double(), case[2], temperature, vocab_size, torch.float64)
    theirs, their_grad_TV = plain(*case, temperature, vocab_size, torch.float32)
    ours, our_grad_TV = fused(*case, temperature, vocab_size, device)
    assert ours.dtype == torch.float32 and our_grad_TV.dtype == dtype
    for values in zip(ours, theirs, exact, strict=True):
        assert_at_most_twice(*values, floor=1e-6)
    # a gradient is rounded to the logits' dtype: one rounding (2^-24, 2^-8, 2^-11) of the largest is the floor
    ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] * exact_grad_TV.abs().max().item()
    assert_at_most_twice(our_grad_TV, their_grad_TV, exact_grad_TV, floor=1e-6 + ulp)
    assert (our_grad_TV[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("use", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)])
def test_each_gradient_alone(device, use):
    logits_TV, ref_TV, labels_T = make(3, 300, 290, torch.float32)
    leaf_TV = logits_TV.double().requires_grad_()
    logp_TV, logq_TV = torch.log_softmax(leaf_TV[:, :290], -1), torch.log_softmax(ref_TV.double()[:, :290], -1)
    values = [logp_TV.gather(1, labels_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1), (logp_TV.exp() * (logp_TV - logq_TV)).sum(-1)]
    sum((v * g).sum() for v, g, used in zip(values, incoming(3), use, strict=True) if used).backward()
    _, grad_TV = fused(logits_TV, ref_TV, labels_T, 1.0, 290, device, use)
    torch.testing.assert_close(grad_TV.double(), leaf_TV.grad, atol=2e-6, rtol=0)  # gradients of order 2 in float32


@pytest.mark.parametrize("vocab_size", [24, 21])
def test_the_public_functions_are_those_of_plain_torch(device, vocab_size):
    logits_TV, ref_TV, labels_T = (tensor.to(device) for tensor in make(6, 24, vocab_size, torch.float32))
    ref_TV[:, vocab_size:] = 0.0
    results = []
    for mode in ("fused", "reference"):
        leaf_TV = logits_TV.clone().requires_grad_()
        with using(mode):
            logprobs_T, entropy_T, kl_T = vocab_parallel_statistics(
                leaf_TV, labels_T, None, local_ref_logits_TV=ref_TV, temperature=0.6, with_entropy=True, vocab_size=vocab_size
            )
            (logprobs_T * incoming(6)[0].float().to(device) + entropy_T * 0.5 - kl_T * 3).sum().backward()
        results.append((logprobs_T.detach(), entropy_T.detach(), kl_T.detach(), leaf_TV.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)  # gradients of order 10


def test_what_nobody_asked_for_is_none(device):
    logits_TV, _, labels_T = make(2, 9, 9, torch.float32)
    assert vocab_parallel_statistics(logits_TV.to(device), labels_T.to(device), None, vocab_size=9)[1:] == (None, None)


def test_impossible_logits_have_no_probability_and_disturb_nothing(device):
    """Rows: some -inf; the label's own logit -inf; nothing but one finite logit. Autograd of entropy would give NaN here."""
    logits_TV, ref_TV, labels_T = make(3, 600, 600, torch.float32)
    logits_TV[0, ::3] = logits_TV[1, :5] = -INF
    logits_TV[2] = -INF
    logits_TV[2, 7] = 2.0
    labels_T[:] = torch.tensor([1, 2, 7])
    ref_TV = ref_TV.nan_to_num(0.0)
    ref_TV[0, ::3] = -INF  # q = 0 where p = 0
    values, grad_TV = fused(logits_TV, ref_TV, labels_T, 1.0, 600, device)

    logp_TV, logq_TV = torch.log_softmax(logits_TV.double(), -1), torch.log_softmax(ref_TV.double(), -1)
    p_TV, logp_TV, logq_TV = logp_TV.exp(), logp_TV.clamp(min=-1e4), logq_TV.clamp(min=-1e4)
    entropy_T, kl_T = -(p_TV * logp_TV).sum(-1), (p_TV * (logp_TV - logq_TV)).sum(-1)
    g_T, h_T, k_T = incoming(3)[..., None]
    expected_TV = -p_TV * (g_T + h_T * (logp_TV + entropy_T[:, None]) - k_T * (logp_TV - logq_TV - kl_T[:, None]))
    expected_TV[torch.arange(3), labels_T] += g_T[:, 0]
    assert values[0, 1] == -INF and values[0, 2] == 0.0
    torch.testing.assert_close(values[0, 0].double(), logp_TV[0, 1], atol=2e-6, rtol=0)
    torch.testing.assert_close(values[1].double(), entropy_T, atol=2e-6, rtol=0)
    torch.testing.assert_close(values[2].double(), kl_T, atol=2e-6, rtol=0)
    torch.testing.assert_close(grad_TV.double(), expected_TV, atol=2e-6, rtol=0)


def test_what_the_reference_excludes_is_infinitely_far(device):
    logits_TV, ref_TV, labels_T = make(2, 40, 40, torch.float32)
    ref_TV[1, 3] = -INF
    values, _ = fused(logits_TV, ref_TV, labels_T, 1.0, 40, device)
    assert values[2, 0].isfinite() and values[2, 1] == INF


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_is_nan_alone_forward_and_backward(device, bad):
    logits_TV, ref_TV, labels_T = make(4, 300, 300, torch.float32)
    if bad == -INF:
        logits_TV[2] = bad
    else:
        logits_TV[2, 17] = bad
    values, grad_TV = fused(logits_TV, ref_TV, labels_T, 1.0, 300, device)
    assert values.isnan().tolist() == [[False, False, True, False]] * 3
    assert grad_TV.isnan().any(-1).tolist() == [False, False, True, False]
    good_values, _ = fused(*(tensor[:2] for tensor in (logits_TV, ref_TV, labels_T)), 1.0, 300, device)
    assert torch.equal(values[:, :2], good_values)


def test_labels_outside_the_vocabulary_give_nan_logprobs_and_no_label_gradient(device):
    logits_TV, _, labels_T = make(3, 24, 21, torch.float32)
    labels_T[1], labels_T[2] = 21, -1  # a padding column, no column
    leaf_TV = logits_TV.to(device).requires_grad_()
    logprobs_T, entropy_T, _ = vocab_parallel_statistics(leaf_TV, labels_T.to(device), None, with_entropy=True, vocab_size=21)
    assert logprobs_T.isnan().tolist() == [False, True, True] and entropy_T.isfinite().all()
    torch.where(logprobs_T.isnan(), 0.0, logprobs_T).sum().backward()
    assert leaf_TV.grad[0].abs().max() > 0 and (leaf_TV.grad[1:] == 0).all()


def test_rows_without_an_incoming_gradient_are_exactly_zero_even_where_logits_are_nan(device):
    logits_TV, _, labels_T = make(3, 1003, 1003, torch.float32)
    logits_TV[1] = NAN
    leaf_TV = logits_TV.to(device).requires_grad_()
    logprobs_T, _, _ = vocab_parallel_statistics(leaf_TV, labels_T.to(device), None, vocab_size=1003)
    torch.where(torch.tensor([True, False, True], device=device), logprobs_T, 0.0).sum().backward()
    assert leaf_TV.grad.isfinite().all() and (leaf_TV.grad[1] == 0).all() and (leaf_TV.grad[0] != 0).any()


def test_no_tokens_are_fine(device):
    leaf_TV = torch.zeros(0, 24, device=device, requires_grad=True)
    labels_T = torch.zeros(0, dtype=torch.long, device=device)
    logprobs_T, entropy_T, kl_T = vocab_parallel_statistics(
        leaf_TV, labels_T, None, local_ref_logits_TV=leaf_TV.detach(), with_entropy=True, vocab_size=21
    )
    (logprobs_T.sum() + entropy_T.sum() + kl_T.sum()).backward()
    assert logprobs_T.shape == entropy_T.shape == kl_T.shape == (0,) and leaf_TV.grad.shape == (0, 24)


@pytest.mark.parametrize("width", [1000, 1001])
def test_rows_that_are_views_are_read_and_nothing_beside_them_is_written(device, width):
    """A slice of wider rows, unaligned from the second row on; the gradient goes into the same slice and leaves its neighbours alone."""
    logits_TV, _, labels_T = make(3, 1005, 1005, torch.float32)
    whole_TV = logits_TV.to(device)
    view_TV = whole_TV[:, 3 : 3 + width]
    exact_TV = view_TV.cpu().double().requires_grad_()
    labels_T = (labels_T % width).contiguous()
    torch.log_softmax(exact_TV, -1).gather(1, labels_T[:, None]).sum().backward()
    leaf_TV = view_TV.detach().requires_grad_()
    logprobs_T, _, _ = vocab_parallel_statistics(leaf_TV, labels_T.to(device), None, vocab_size=width, overwrite_logits=True)
    logprobs_T.sum().backward()
    torch.testing.assert_close(leaf_TV.grad.cpu().double(), exact_TV.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(view_TV.cpu().double(), exact_TV.grad, atol=1e-6, rtol=0)
    assert torch.equal(whole_TV[:, :3].cpu(), logits_TV[:, :3]) and torch.equal(whole_TV[:, 3 + width :].cpu(), logits_TV[:, 3 + width :])


def test_overwriting_gives_the_same_gradient_without_a_second_tensor_and_only_once(device):
    logits_TV, _, labels_T = make(4, 515, 512, torch.bfloat16)
    grads = []
    for overwrite in (False, True):
        leaf_TV = logits_TV.to(device, copy=True).requires_grad_()
        hidden_TV = leaf_TV * 1  # what a model's last layer hands over
        logprobs_T, entropy_T, _ = vocab_parallel_statistics(
            hidden_TV, labels_T.to(device), None, with_entropy=True, vocab_size=512, overwrite_logits=overwrite
        )
        loss = (logprobs_T * 0.3 - entropy_T).sum()
        loss.backward(retain_graph=True)
        grads.append(leaf_TV.grad.clone())
    assert torch.equal(*grads) and torch.equal(hidden_TV, grads[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def make_constrained(tokens, width, vocab_size, dtype):
    """`make`, and sets that positions take in turn: everything, about half of the tokens, one token. Every label is in its set.

    Returns logits, reference logits, labels, [S, W] words, [T] set of each position, [T, V] bool."""
    logits_TV, ref_TV, labels_T = make(tokens, width, vocab_size, dtype)
    allowed_SV, ids_T = torch.ones(3, vocab_size, dtype=torch.bool), torch.arange(tokens) % 3
    labels_T[ids_T == 2] = vocab_size // 2
    allowed_SV[1:] = torch.rand(vocab_size, generator=torch.Generator().manual_seed(4)) < 0.5
    allowed_SV[1, labels_T[ids_T == 1]] = True
    allowed_SV[2] = torch.arange(vocab_size) == vocab_size // 2
    bits_SWB = torch.nn.functional.pad(allowed_SV, (0, -vocab_size % 32)).view(3, -1, 32).long()
    words_SW = (bits_SWB << torch.arange(32)).sum(-1)
    words_SW = torch.where(words_SW < 2**31, words_SW, words_SW - 2**32).int()
    ref_TV[:, vocab_size:] = 0.0
    return logits_TV, ref_TV, labels_T, words_SW, ids_T, allowed_SV[ids_T]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("width", "vocab_size"), [(24, 21), (1005, 1001)])
def test_under_a_grammar_the_kernels_err_at_most_twice_as_much_as_plain_torch(device, dtype, overwrite, width, vocab_size):
    """Against a softmax over the set in float64: values, and the gradient of all three at once."""
    logits_TV, ref_TV, labels_T, *sets, allowed_TV = make_constrained(7, width, vocab_size, dtype)
    exact_TV = logits_TV.double().requires_grad_()
    logp_TV, logq_TV = (
        (source_TV[:, :vocab_size] / 0.7).masked_fill(~allowed_TV, -INF).log_softmax(-1).masked_fill(~allowed_TV, 0.0)
        for source_TV in (exact_TV, ref_TV.double())
    )
    p_TV = logp_TV.exp().masked_fill(~allowed_TV, 0.0)
    expected = [logp_TV.gather(1, labels_T[:, None])[:, 0], -(p_TV * logp_TV).sum(-1), (p_TV * (logp_TV - logq_TV)).sum(-1)]
    sum((value * g).sum() for value, g in zip(expected, incoming(7), strict=True)).backward()
    found = {}
    for mode in ("fused", "reference"):
        leaf_TV, their_ref_TV = logits_TV.to(device, copy=True).requires_grad_(), ref_TV.to(device, copy=True)
        given_TV = leaf_TV * 1
        with using(mode):
            values = vocab_parallel_statistics(
                given_TV,
                labels_T.to(device),
                None,
                local_ref_logits_TV=their_ref_TV,
                temperature=0.7,
                with_entropy=True,
                vocab_size=vocab_size,
                allowed_sets_SW=sets[0].to(device),
                allowed_ids_T=sets[1].to(device),
                overwrite_logits=overwrite,
            )
            sum((v * g.float().to(device)).sum() for v, g in zip(values, incoming(7), strict=True)).backward()
        found[mode] = [*(value.detach().cpu() for value in values), leaf_TV.grad.cpu()]
        if not overwrite:
            assert torch.equal(given_TV.detach().cpu(), logits_TV) and torch.equal(their_ref_TV.cpu(), ref_TV), "not the caller's copies"
    ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype] * exact_TV.grad.abs().max().item()
    for ours, theirs, exact, floor in zip(*found.values(), [*expected, exact_TV.grad], (2e-6, 2e-6, 2e-6, 4e-6 + ulp), strict=True):
        assert_at_most_twice(ours, theirs, exact, floor=floor)
    assert (found["fused"][3][:, :vocab_size][~allowed_TV] == 0).all() and (found["fused"][3][:, vocab_size:] == 0).all()


def test_a_label_that_its_grammar_forbids_has_no_probability(device):
    logits_TV, _, labels_T, words_SW, ids_T, _ = make_constrained(7, 24, 21, torch.float32)
    labels_T[2] -= 1
    for mode in ("fused", "reference"):
        with using(mode):
            logprobs_T, *_ = vocab_parallel_statistics(
                logits_TV.to(device),
                labels_T.to(device),
                None,
                vocab_size=21,
                allowed_sets_SW=words_SW.to(device),
                allowed_ids_T=ids_T.to(device),
            )
        assert logprobs_T.isfinite().tolist() == [position != 2 for position in range(7)] and logprobs_T[2] == -INF


def test_a_run_repeats_itself_bitwise(device):
    case = make(3, 1003, 1003, torch.bfloat16)
    first, second = (fused(*case, 0.7, 1003, device) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("cuts", [(0, 1003), (0, 400, 1003), (0, 1, 1, 600, 1003)])
def test_unequal_and_empty_shards_merge_to_the_whole(device, cuts):
    logits_TV, ref_TV, labels_T = (tensor.to(device) for tensor in make(3, 1003, 1003, torch.float32))
    logits_TV[1, :500] = -INF  # a shard that holds nothing but -inf
    exact, _ = plain(logits_TV.cpu().double(), ref_TV.cpu().double(), labels_T.cpu(), 0.7, 1003, torch.float64)
    shards = list(pairwise(cuts))
    parts_STW = torch.stack(
        [
            kernels.partial(
                logits_TV[:, a:b] if b > a else logits_TV[:, :1],
                ref_TV[:, a:b] if b > a else ref_TV[:, :1],
                labels_T,
                first_column=a,
                num_valid=b - a,
                temperature=0.7,
            )
            for a, b in shards
        ]
    )
    whole = kernels.partial(logits_TV, ref_TV, labels_T, first_column=0, num_valid=1003, temperature=0.7)
    assert torch.equal(parts_STW[..., 0].amax(0), whole[:, 0]) and torch.equal(parts_STW[..., 5].amax(0), whole[:, 5])
    result = kernels.finish(parts_STW, logits_TV, ref_TV, labels_T, first_column=0, num_valid=1003, vocab_size=1003, temperature=0.7)
    torch.testing.assert_close(result.logprobs.cpu().double(), exact[0], atol=5e-6, rtol=0)
    for ours, theirs in ((result.entropy[[0, 2]], exact[1, [0, 2]]), (result.kl[[0, 2]], exact[2, [0, 2]])):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=3e-6, rtol=0)
    assert result.entropy.isfinite().all() and result.kl.isfinite().all()


def test_offsets_beyond_31_bits_reach_the_right_elements(libraries, tmp_path):
    """Rows 2^30 elements apart in a sparse file: the third begins at element 2^31, of which no more than a page is ever touched."""
    rows, width = 3, 64  # aligned in both places, hence the same order of sums
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=(rows - 1) * 2**30 + width, dtype=torch.bfloat16)
    far_TV = far.as_strided((rows, width), (2**30, 1))
    logits_TV, _, labels_T = make(rows, width, width, torch.bfloat16)
    for library in libraries.values():
        far_TV.copy_(logits_TV)
        with using("fused", cpu=library):
            results = []
            for source_TV in (far_TV.detach().requires_grad_(), logits_TV.clone().requires_grad_()):
                logprobs_T, _, _ = vocab_parallel_statistics(source_TV, labels_T, None, vocab_size=width, overwrite_logits=True)
                logprobs_T.sum().backward()
                results.append((logprobs_T.detach(), source_TV.detach().clone()))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_nothing(on_cpu, threads):
    case = make(7, 5000, 4990, torch.float32)
    before = torch.get_num_threads()
    alone = fused(*case, 1.0, 4990, torch.device("cpu"))
    try:
        torch.set_num_threads(threads)
        together = fused(*case, 1.0, 4990, torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])


def test_what_the_kernels_cannot_read_is_refused_with_the_remedy(on_cpu):
    logits_TV, _, labels_T = make(6, 24, 24, torch.float32)
    with pytest.raises(ValueError, match=r"strides \(1, 24\).*contiguous\(\)"):
        vocab_parallel_statistics(torch.randn(24, 24).T, torch.zeros(24).long(), None, vocab_size=24)
    with pytest.raises(ValueError, match="float64: set kernels=auto"):
        vocab_parallel_statistics(logits_TV.double(), labels_T, None, vocab_size=24)
    with pytest.raises(ValueError, match=r"labels are .* int64"):
        vocab_parallel_statistics(logits_TV, labels_T.int(), None, vocab_size=24)
    with pytest.raises(ValueError, match="reference logits"):
        kernels.partial(logits_TV, logits_TV.bfloat16(), labels_T, first_column=0, num_valid=24, temperature=1.0)


def test_the_operators_keep_torchs_contract(on_cpu):
    """Schema, fake tensors, autograd registration, and tracing with symbolic shapes."""
    logits_TV, ref_TV, labels_T = make(3, 24, 24, torch.float32)
    leaf_TV = logits_TV.requires_grad_()
    for ref in (None, ref_TV):
        part_TW = torch.ops.megatron_rema.logits_partial(logits_TV.detach(), ref, labels_T, 0, 24, 1.0)
        torch.library.opcheck(torch.ops.megatron_rema.logits_partial.default, (logits_TV.detach(), ref, labels_T, 0, 24, 1.0))
        torch.library.opcheck(torch.ops.megatron_rema.logits_finish.default, (part_TW[None], leaf_TV, ref, labels_T, 0, 24, 24, 1.0, False))


def test_a_compiled_loss_is_one_graph_with_the_same_gradient(on_cpu):
    logits_TV, _, labels_T = make(5, 24, 21, torch.float32)

    def loss(leaf_TV):
        logprobs_T, entropy_T, _ = vocab_parallel_statistics(leaf_TV, labels_T, None, with_entropy=True, vocab_size=21)
        return (logprobs_T * 2 - entropy_T.exp()).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf_TV = logits_TV.clone().requires_grad_()
        function(leaf_TV).backward()
        grads.append(leaf_TV.grad)
    assert torch.equal(*grads)


def test_rows_behind_the_2_to_the_31st_element_are_computed_and_written_where_they_lie(on_cpu):
    """4.3 GB of bfloat16 logits: an offset of 32 bits would read and write other rows. The gradient is written over them."""
    width, tokens = 32768, 65536 + 64
    with open("/proc/meminfo") as lines:
        free_gib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    if free_gib < 8:
        pytest.skip(f"needs 8 GiB of free memory, here are {free_gib:.1f}")
    last_V = torch.randn(width, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_TV = torch.zeros(tokens, width, dtype=torch.bfloat16)
    logits_TV[-1] = last_V
    assert logits_TV[:-1].numel() > 2**31
    labels_T = torch.full((tokens,), 7)
    alone_V = last_V[None].clone().requires_grad_()
    alone = vocab_parallel_statistics(alone_V, labels_T[:1], None, with_entropy=True, vocab_size=width)
    logits_TV.requires_grad_()
    values = vocab_parallel_statistics(logits_TV, labels_T, None, with_entropy=True, vocab_size=width, overwrite_logits=True)
    for value_T, value_1 in zip(values[:2], alone[:2], strict=True):
        assert value_T[-1] == value_1[0] and (value_T[1:-1] == value_T[0]).all() and value_T[0] != value_T[-1]
    values[0][-1].backward()
    alone[0][0].backward()
    assert torch.equal(logits_TV.grad[-1], alone_V.grad[0])
    assert not logits_TV.grad[:256].any() and not logits_TV.grad[-256:-1].any()  # where an offset that lost its upper bits would lead
