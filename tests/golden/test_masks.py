"""Masked and segment sums, group filters and the overlong penalty against verl, pandas and TRL."""

import math

import numpy as np
import pytest
import torch

from megatron_rema.algorithm.masked import masked_mean, masked_sum, segment_count_K, segment_mean_T, segment_sum_K, weighted_whiten
from megatron_rema.algorithm.selection import informative_groups, within_success_rate
from megatron_rema.algorithm.shaping import overlong_penalty
from tests.golden.batches import random_batch
from tests.golden.oracles import agree

import pandas as pd  # isort: skip  (found by the line above)

SEEDS = range(5)


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_sum_mean_and_whitening(seed):
    """verl's denominators are 1e-8 larger; its whitening divides by the sample's variance, ours by the population's."""
    import verl.utils.torch_functional as verl_F

    batch = random_batch(seed)
    values_BL, mask_BL = values(seed, *batch.valid_BL.shape), batch.mask_BL
    agree("masked_sum", "verl masked_sum", masked_sum(values_BL, mask_BL), verl_F.masked_sum(values_BL, mask_BL), tolerance=1e-12)
    agree("masked_mean", "verl masked_mean", masked_mean(values_BL, mask_BL), verl_F.masked_mean(values_BL, mask_BL), tolerance=1e-8)
    of_turns_K, num_tokens = values(seed, batch.num_turns), int(mask_BL.sum())
    theirs_BL = verl_F.masked_whiten(batch.spread(of_turns_K), mask_BL) * mask_BL
    ours_BL = batch.spread(weighted_whiten(of_turns_K, batch.num_tokens_K)) * math.sqrt((num_tokens - 1) / num_tokens)
    agree("weighted_whiten", "verl masked_whiten", ours_BL, theirs_BL, tolerance=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_segments(seed):
    """Tokens of no segment (id -1) are no group of pandas."""
    batch = random_batch(seed)
    ids_T, values_T = batch.turn_ids_BL.flatten(), values(seed, batch.turn_ids_BL.numel())
    groups = pd.Series(values_T.numpy()).groupby(ids_T.masked_fill(ids_T < 0, -1).numpy())
    own_T, num_turns = ids_T >= 0, batch.num_turns
    sums = torch.tensor(groups.sum().loc[0:].to_numpy())
    means_T = torch.tensor(groups.transform("mean").to_numpy()) * own_T
    agree("segment_sum_K", "pandas groupby.sum", segment_sum_K(values_T, ids_T, num_turns), sums, tolerance=1e-12)
    agree("segment_mean_T", "pandas groupby.mean", segment_mean_T(values_T, ids_T, num_turns), means_T, tolerance=1e-12)
    assert segment_count_K(ids_T, num_turns).tolist() == groups.count().loc[0:].tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_filters_of_groups(seed):
    """Informative: more than one distinct reward. Success rate: the group's mean is within the bounds, ends included."""
    draw = np.random.default_rng(seed)
    groups, successes = draw.integers(-4, 12, 50), draw.random(50) < 0.6
    by_group = pd.Series(successes.astype(float)).groupby(groups)
    ours_N = informative_groups(torch.tensor(successes).float(), torch.tensor(groups))
    assert ours_N.tolist() == (by_group.transform("nunique") > 1).tolist()
    rate = by_group.transform("mean")
    ours_N = within_success_rate(torch.tensor(successes), torch.tensor(groups), low=0.25, high=0.75)
    assert ours_N.tolist() == rate.between(0.25, 0.75).tolist()
    assert ours_N.any() and not ours_N.all()


def test_overlong_penalty():
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(70))
    theirs = get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=16)([[1] * length for length in lengths])
    ours_N = overlong_penalty(torch.tensor(lengths), max_tokens=50, buffer_tokens=16)
    agree("overlong_penalty", "trl get_soft_overlong_punishment", ours_N, torch.tensor(theirs, dtype=torch.float64), tolerance=1e-7)
