"""The fused advantage scan, group statistics and whitening against algorithm/, which computes in float64.

Shapes: T label positions of packed traces.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rema.algorithm import gae as reference
from megatron_rema.algorithm.advantage import group_advantage as group_advantages_of_algorithm
from megatron_rema.algorithm.kl import penalised_rewards
from megatron_rema.algorithm.masked import masked_moments, merge_moments, weighted_whiten, whiten
from megatron_rema.kernels.advantage import gae, group_advantage, masked_whiten, reinforce_plus_plus, turn_returns
from megatron_rema.kernels.library import using

NAN = float("nan")
BI_LEVEL = {"discount": 0.99, "gae_lambda": 0.95, "turn_discount": 0.9, "turn_lambda": 0.5}


def packed(lengths, seed=0, own=0.6):
    """Traces one after the other, turns of random lengths with observation tokens between them; unmasked values are NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    trace_ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    mask_T = torch.rand(total, generator=generator) < own
    turn_ids_T = (torch.rand(total, generator=generator) < 0.1).cumsum(0)
    rewards_T, values_T = torch.randn(2, total, generator=generator)
    return (
        rewards_T.masked_fill(~mask_T, NAN),
        values_T.masked_fill(~mask_T, NAN),
        turn_ids_T.masked_fill(~mask_T, -1),
        trace_ids_T,
        mask_T,
    )


def on(device, columns):
    return [column.to(device) for column in columns]


def assert_like_reference(ours, columns, numbers):
    for mine, theirs in zip(ours, reference.gae(*columns, **numbers), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-6, rtol=2e-7, equal_nan=True)  # float64 sums in another order, rounded once


# 2,048 tokens are a tile of the CUDA scan, 8 tokens a thread's part
LENGTHS = {
    "one token": [1],
    "traces of one": [1] * 9,
    "short": [3, 1, 50, 7],
    "a tile and one": [2049],
    "across tiles": [1000, 3000, 1, 2500],
    "many tiles": [300] * 30,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(
    "numbers", [BI_LEVEL, dict.fromkeys(BI_LEVEL, 1.0), BI_LEVEL | {"turn_discount": 0.0}], ids=["bi-level", "sums", "zero"]
)
def test_the_scan_is_that_of_algorithm(device, lengths, numbers):
    columns = packed(lengths)
    assert_like_reference(gae(*on(device, columns), **numbers), columns, numbers)


def test_a_hand_computed_trace(device):
    """Two turns with an observation between: A2 = 1 - 0.4 = 0.6; A0 = 0 + 0.9 * 0.4 - 0.2 + 0.9 * 0.5 * 0.6 = 0.43."""
    columns = [
        torch.tensor([0.0, NAN, 1.0]),
        torch.tensor([0.2, NAN, 0.4]),
        torch.tensor([0, -1, 1]),
        torch.zeros(3, dtype=torch.long),
        torch.tensor([True, False, True]),
    ]
    advantages_T, returns_T = gae(*on(device, columns), **BI_LEVEL)
    assert advantages_T.tolist() == pytest.approx([0.43, 0.0, 0.6], abs=1e-7)
    assert returns_T.tolist() == pytest.approx([0.63, 0.0, 1.0], abs=1e-7)


def test_turns_of_one_token_and_a_trace_without_an_own_token(device):
    columns = packed([40, 30, 20], own=1.0)
    columns[2][:] = torch.arange(90)  # every token its own turn
    columns[4][40:70] = False
    assert_like_reference(gae(*on(device, columns), **BI_LEVEL), columns, BI_LEVEL)


def test_nothing_is_fine(device):
    columns = on(device, packed([]))
    assert [column.shape for column in gae(*columns, **BI_LEVEL)] == [(0,), (0,)]
    nobody = on(device, packed([2100], own=0.0))
    assert all((column == 0).all() for column in gae(*nobody, **BI_LEVEL))


def test_a_nan_reaches_back_in_its_own_trace_only(device):
    columns = packed([2000, 2200, 2000], own=0.9)
    columns[1][3100] = NAN
    columns[4][3100], columns[2][3100] = True, int(columns[2].max()) + 1
    advantages_T, _ = gae(*on(device, columns), **BI_LEVEL)
    expected_T = torch.zeros(6200, dtype=torch.bool)
    expected_T[2000:3101] = columns[4][2000:3101]
    assert torch.equal(advantages_T.cpu().isnan(), expected_T)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_cut_between_traces_and_change_nothing(on_cpu, threads):
    columns = packed([9000, 100, 12000, 5, 7000])
    alone = gae(*columns, **BI_LEVEL)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = gae(*columns, **BI_LEVEL)
        white_T = masked_whiten(alone[0], columns[4])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])
    assert torch.equal(white_T, masked_whiten(alone[0], columns[4]))


def test_bad_discounts_are_refused(on_cpu):
    with pytest.raises(ValueError, match=r"turn_lambda must be in \[0, 1\], got 1.5"):
        gae(*packed([4]), **BI_LEVEL | {"turn_lambda": 1.5})


@pytest.mark.parametrize("count", [1, 5, 2049, 30000])
def test_whitening_is_that_of_algorithm_far_from_zero_too(device, count):
    generator = torch.Generator().manual_seed(0)
    values_T, mask_T = torch.randn(count, generator=generator) + 1000, torch.rand(count, generator=generator) < 0.7
    values_T[~mask_T] = NAN
    white_T = masked_whiten(values_T.to(device), mask_T.to(device)).cpu()
    # float64 of a mean near 1000: 1e-13 of a variance of 1, magnified by 1 / sqrt(eps) where all are equal
    torch.testing.assert_close(white_T, weighted_whiten(values_T, mask_T.float()), atol=1e-6, rtol=1e-6)
    assert (white_T[~mask_T] == 0).all()


def test_whitening_equal_values_or_nothing_gives_exactly_zero(device):
    equal_T = torch.full((5000,), 0.1, device=device)
    everything_T = torch.ones(5000, dtype=torch.bool, device=device)
    assert (masked_whiten(equal_T, everything_T) == 0).all()
    assert (masked_whiten(equal_T, ~everything_T) == 0).all()
    assert masked_whiten(equal_T[:0], everything_T[:0]).shape == (0,)


def test_whitening_does_not_hide_a_nan(device):
    values_T = torch.tensor([1.0, NAN, 2.0, NAN], device=device)
    mask_T = torch.tensor([True, True, True, False], device=device)
    assert masked_whiten(values_T, mask_T).isnan().tolist() == [True, True, True, False]


def test_moments_of_parts_merge_to_those_of_the_whole():
    """Values 1, 2 | 6 | none: mean 3, squared distances 4 + 1 + 9 = 14; whitened 6 is 3 / sqrt(14 / 3)."""
    values_T, everything_T = torch.tensor([1.0, 2.0, 6.0]), torch.ones(3, dtype=torch.bool)
    parts = [(values_T[:2], everything_T[:2]), (values_T[2:], everything_T[2:]), (values_T[:0], everything_T[:0])]
    merged_3 = merge_moments(torch.stack([masked_moments(*part) for part in parts]))
    assert merged_3.tolist() == pytest.approx([3.0, 3.0, 14.0], abs=1e-12)
    assert whiten(values_T, everything_T, merged_3, eps=0.0)[2].item() == pytest.approx(3 / (14 / 3) ** 0.5)


def whiten_my_part(counts, mode, library):
    """This data-parallel rank's part of 1000 values, whitened over all ranks."""
    values_T = torch.randn(sum(counts), generator=torch.Generator().manual_seed(0)) * 3 + 5
    mask_T = torch.arange(sum(counts)) % 3 > 0
    rank = dist.get_rank()
    with using(mode, cpu=library):
        return masked_whiten(values_T.split(counts)[rank], mask_T.split(counts)[rank], dist.group.WORLD).tolist()


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_ranks_whiten_over_all_their_values(run_ranks, libraries, mode):
    (whole,) = run_ranks(1, whiten_my_part, [1000], mode, libraries["cpu"])
    parts = run_ranks(3, whiten_my_part, [600, 1, 399], mode, libraries["cpu"])
    assert [value for part in parts for value in part] == pytest.approx(whole, abs=1e-6)


def test_the_operators_keep_torchs_contract(on_cpu):
    columns = [column.nan_to_num(0.0) if column.is_floating_point() else column for column in packed([5, 9])]
    torch.library.opcheck(torch.ops.megatron_rema.gae.default, (*columns, 0.9, 0.9, 0.9, 0.9, None, None, 0.0, 0))
    torch.library.opcheck(torch.ops.megatron_rema.moments.default, (columns[0], columns[4], None))
    moments_13 = torch.ops.megatron_rema.moments(columns[0], columns[4], None)[None]
    torch.library.opcheck(torch.ops.megatron_rema.groups.default, (columns[0], columns[3], 0, 1e-6))
    torch.library.opcheck(torch.ops.megatron_rema.whiten.default, (columns[0], columns[4], moments_13, 1e-8))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_reward_is_that_of_algorithm(device, estimator):
    columns = packed([1000, 3000, 1, 2500], own=0.9)
    logprobs_T, ref_T = -3 * torch.rand(2, 6501, generator=torch.Generator().manual_seed(4))
    ref_T[0], columns[4][0], columns[2][0] = 100.0, True, 0  # a log-ratio of 100 is capped
    mask_T = columns[4]
    logprobs_T, ref_T = logprobs_T.masked_fill(~mask_T, NAN), ref_T.masked_fill(~mask_T, NAN)
    rewards_T = penalised_rewards(columns[0].double(), logprobs_T.double(), ref_T.double(), mask_T, coef=0.2, estimator=estimator)
    exact = reference.gae(rewards_T, columns[1].double(), *columns[2:], **BI_LEVEL)
    kl = {"logprobs_T": logprobs_T, "ref_logprobs_T": ref_T, "kl_coef": 0.2, "kl_estimator": estimator}
    ours = gae(*on(device, columns), **BI_LEVEL, **kl | {name: kl[name].to(device) for name in ("logprobs_T", "ref_logprobs_T")})
    with using("reference"):
        plain = gae(*columns, **BI_LEVEL, **kl)
    for mine, theirs, expected in zip(ours, plain, exact, strict=True):
        finite_T = expected.abs() < 1e6  # behind the capped one: e^20 and its rounding
        assert ((mine.cpu() - expected).abs()[finite_T] <= 2 * (theirs - expected).abs()[finite_T].max() + 1e-6).all()
        torch.testing.assert_close(mine.cpu(), theirs, atol=1e-5, rtol=1e-6)
    assert not torch.equal(ours[0].cpu(), gae(*on(device, columns), **BI_LEVEL)[0].cpu())


def test_a_hand_computed_kl_in_the_reward(device):
    """k2 of a log-ratio of 2 is 2, of 0 is 0: rewards 1 - 0.1 * 2 = 0.8 and 1."""
    ids_T, everything_T = torch.zeros(2, dtype=torch.long, device=device), torch.ones(2, dtype=torch.bool, device=device)
    columns = (torch.ones(2, device=device), torch.zeros(2, device=device), ids_T, ids_T, everything_T)
    numbers = dict.fromkeys(BI_LEVEL, 0.0)
    policy_T, ref_T = torch.tensor([[-1.0, -1.0], [-3.0, -1.0]], device=device)
    advantages_T, _ = gae(*columns, **numbers, logprobs_T=policy_T, ref_logprobs_T=ref_T, kl_coef=0.1, kl_estimator="k2")
    assert advantages_T.tolist() == pytest.approx([0.8, 1.0])


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("count", [0, 1, 7, 700])
def test_group_advantages_are_those_of_algorithm(device, estimator, count):
    generator = torch.Generator().manual_seed(count)
    rewards_N = torch.randint(0, 3, (count,), generator=generator) * 0.1 + 1000.0
    ids_N = torch.randint(-3, 1 + count // 5, (count,), generator=generator) * 10**12  # any numbers, in any order, groups of one
    ours_N = group_advantage(rewards_N.to(device), ids_N.to(device), estimator=estimator).cpu()
    assert ours_N.dtype == torch.float32
    # the same float64 sums in another order, rounded once; equal rewards give exactly 0
    theirs_N = group_advantages_of_algorithm(rewards_N, ids_N, estimator=estimator)
    torch.testing.assert_close(ours_N, theirs_N, atol=1e-6, rtol=1e-6)
    assert ((ours_N == 0) == (theirs_N == 0)).all()


def test_hand_computed_group_advantages(device):
    """Group 7: rewards 0, 1: mean 1/2, standard deviation sqrt(1/2); group 5 has one trace; a NaN stays in group 9."""
    rewards_N, ids_N = torch.tensor([0.0, 3.0, 1.0, NAN, 1.0], device=device), torch.tensor([7, 5, 7, 9, 9], device=device)
    expected = {"grpo": 0.5 / (0.5**0.5 + 1e-6), "dr_grpo": 0.5, "rloo": 1.0}
    for estimator, value in expected.items():
        advantages = group_advantage(rewards_N, ids_N, estimator=estimator).tolist()
        assert advantages[:3] == pytest.approx([-value, 0.0, value]), estimator
        assert torch.tensor(advantages[3:]).isnan().all()


def test_unknown_group_estimators_are_refused(on_cpu):
    with pytest.raises(ValueError, match="estimator must be one of"):
        group_advantage(torch.zeros(2), torch.zeros(2, dtype=torch.long), estimator="gae")


@pytest.mark.parametrize("turns", [[], [1], [3, 1, 40], [700] * 5])
def test_turn_returns_and_reinforce_plus_plus_are_those_of_algorithm(device, turns):
    generator = torch.Generator().manual_seed(0)
    rewards_K = torch.randn(sum(turns), generator=generator)
    trace_ids_K = torch.repeat_interleave(torch.arange(len(turns)) * 3, torch.tensor(turns, dtype=torch.long))
    tokens_K = torch.randint(0, 50, (sum(turns),), generator=generator)  # a turn of no token has no advantage
    inputs = [column.to(device) for column in (rewards_K, trace_ids_K, tokens_K)]
    returns_K = turn_returns(*inputs[:2], turn_discount=0.9).cpu()
    ours_K = reinforce_plus_plus(*inputs, turn_discount=0.9).cpu()
    with using("reference"):
        torch.testing.assert_close(returns_K, turn_returns(rewards_K, trace_ids_K, turn_discount=0.9), atol=1e-6, rtol=1e-6)
        theirs_K = reinforce_plus_plus(rewards_K, trace_ids_K, tokens_K, turn_discount=0.9)
    torch.testing.assert_close(ours_K, theirs_K, atol=2e-6, rtol=1e-6)


def test_hand_computed_reinforce_plus_plus(device):
    """Returns 1, 1, 0 of turns with 1, 2, 3 tokens: mean 1/2, variance 1/4, hence 1, 1, -1."""
    rewards_K = torch.tensor([0.0, 1.0, 0.0], device=device)
    advantages_K = reinforce_plus_plus(
        rewards_K, torch.tensor([0, 0, 1], device=device), torch.tensor([1, 2, 3], device=device), turn_discount=1.0
    )
    assert advantages_K.tolist() == pytest.approx([1.0, 1.0, -1.0], abs=1e-6)
