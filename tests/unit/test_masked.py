"""Masked and segmented sums. Shapes: T label positions, K segments."""

import math

import pytest
import torch

from megatron_rema.algorithm.masked import (
    masked_mean,
    masked_sum,
    segment_count_K,
    segment_mean_K,
    segment_mean_T,
    segment_sum_K,
    spread_T,
    weighted_whiten,
)

NAN = float("nan")
IDS_T = torch.tensor([-1, 0, 0, -1, 2, 2, 2, -1])  # segment 1 has no token
VALUES_T = torch.tensor([9.0, 1.0, 3.0, 9.0, 1.0, 2.0, 6.0, 9.0])


def test_masked_mean_reads_only_the_masked_positions():
    mask_T = torch.tensor([True, False, True])
    values_T = torch.tensor([1.0, NAN, 4.0])
    assert masked_sum(values_T, mask_T).item() == 5.0  # 1 + 4
    assert masked_mean(values_T, mask_T).item() == 2.5  # 5 / 2


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    values_T = torch.tensor([1.0, NAN], requires_grad=True)
    mean = masked_mean(values_T, torch.zeros(2, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0.0
    assert values_T.grad.tolist() == [0.0, 0.0]


def test_segments_are_summed_counted_averaged_and_spread_back():
    assert segment_sum_K(VALUES_T, IDS_T, 3).tolist() == [4.0, 0.0, 9.0]  # 1+3, none, 1+2+6
    assert segment_count_K(IDS_T, 3).tolist() == [2, 0, 3]
    assert segment_mean_K(VALUES_T, IDS_T, 3).tolist() == [2.0, 0.0, 3.0]
    assert segment_mean_T(VALUES_T, IDS_T, 3).tolist() == [0.0, 2.0, 2.0, 0.0, 3.0, 3.0, 3.0, 0.0]
    assert spread_T(torch.tensor([5, 6, 7]), IDS_T).tolist() == [0, 5, 5, 0, 7, 7, 7, 0]


def test_a_nan_is_kept_in_its_segment_and_cannot_leak_from_outside():
    values_T = VALUES_T.clone()
    values_T[0] = NAN  # no segment
    values_T[5] = NAN  # segment 2
    mean_K = segment_mean_K(values_T, IDS_T, 3)
    assert mean_K[:2].tolist() == [2.0, 0.0]
    assert math.isnan(mean_K[2])


def test_segment_mean_has_the_gradient_of_its_definition():
    values_T = VALUES_T.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: segment_mean_T(v, IDS_T, 3).square(), values_T)
    (grad_T,) = torch.autograd.grad(segment_mean_K(values_T, IDS_T, 3).sum(), values_T)
    torch.testing.assert_close(grad_T, torch.tensor([0, 1 / 2, 1 / 2, 0, 1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64))


def test_segment_sums_do_not_depend_on_the_order_of_the_tokens():
    generator = torch.Generator().manual_seed(0)
    values_T = torch.randn(4096, generator=generator) * 1e3
    ids_T = torch.randint(-1, 5, (4096,), generator=generator)
    order_T = torch.randperm(4096, generator=generator)
    assert torch.equal(segment_sum_K(values_T, ids_T, 5), segment_sum_K(values_T[order_T], ids_T[order_T], 5))


def test_whitening_counts_a_value_as_often_as_its_weight():
    # values 1 (x1) and 4 (x2): mean (1 + 8) / 3 = 3; variance (4 + 2 * 1) / 3 = 2
    white_N = weighted_whiten(torch.tensor([1.0, 4.0, NAN]), torch.tensor([1, 2, 0]))
    assert white_N.tolist() == pytest.approx([-2 / math.sqrt(2), 1 / math.sqrt(2), 0.0], abs=1e-6)


def test_whitening_equal_values_or_nothing_gives_exactly_zero():
    assert weighted_whiten(torch.full((3,), 0.1), torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert weighted_whiten(torch.tensor([7.0]), torch.ones(1)).tolist() == [0.0]
    assert weighted_whiten(torch.tensor([7.0]), torch.zeros(1)).tolist() == [0.0]
    assert weighted_whiten(torch.zeros(0), torch.zeros(0)).tolist() == []
    assert weighted_whiten(torch.tensor([1.0, NAN]), torch.ones(2)).isnan().all()
