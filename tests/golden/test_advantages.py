"""Advantage and baseline estimators against verl and pandas on random rewards.

Ours return float32 (computed in float64), hence a tolerance of 1e-6 also where the opponent runs in float64.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rema.algorithm.advantage import group_advantage, reinforce_plus_plus, turn_returns, turn_to_tokens
from megatron_rema.algorithm.baseline import RunningMean, counterfactual_advantage, ema_baseline, plan_rewards
from tests.golden import oracles
from tests.golden.batches import random_batch
from tests.golden.oracles import agree

import pandas as pd  # isort: skip  (found by the line above)

SEEDS = range(5)
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def verl():
    from verl.trainer.ppo import core_algos

    return core_algos


def rewards_and_groups(seed: int, dtype: torch.dtype, num_traces: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal rewards of 2 roles over 6 prompts; a group is a prompt and a role, sizes are ragged. Groups of one are left out."""
    generator = torch.Generator().manual_seed(seed)
    groups_N = torch.randint(12, (num_traces,), generator=generator) * 7 - 20  # any integers
    rewards_N = torch.randn(num_traces, generator=generator, dtype=torch.float64).to(dtype)
    compared_N = (groups_N[:, None] == groups_N).sum(1) > 1
    return rewards_N[compared_N], groups_N[compared_N]


def uids(groups_N: torch.Tensor) -> np.ndarray:
    """verl knows a group by a string."""
    return np.array([f"group {group}" for group in groups_N.tolist()], dtype=object)


def outcome(rewards_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's shape of an outcome reward: three tokens a trace, the reward on the last, all three trained."""
    rewards_NL = torch.zeros(len(rewards_N), 3, dtype=rewards_N.dtype)
    rewards_NL[:, -1] = rewards_N
    return rewards_NL, torch.ones_like(rewards_NL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("estimator", "function", "settings"),
    [
        ("grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": True}),
        ("grpo", "compute_grpo_vectorized_outcome_advantage", {"norm_adv_by_std_in_grpo": True}),
        ("dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "compute_rloo_outcome_advantage", {}),
        ("rloo", "compute_rloo_vectorized_outcome_advantage", {}),
    ],
)
def test_group_advantages(verl, estimator, function, settings, seed, dtype):
    """Same standard deviation (of the sample), same eps. verl's vectorised GRPO computes in float32 whatever it is given."""
    rewards_N, groups_N = rewards_and_groups(seed, dtype)
    rewards_NL, mask_NL = outcome(rewards_N)
    theirs_NL, _ = getattr(verl, function)(rewards_NL, mask_NL, index=uids(groups_N), **settings)
    ours_N = group_advantage(rewards_N, groups_N, estimator=estimator)
    agree(f"group_advantage {estimator}", f"verl {function}", ours_N[:, None].expand(-1, 3), theirs_NL, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_plus_plus_over_turns(verl, seed, dtype):
    """verl discounts per token and ours per turn: the same with a discount of 1. verl whitens by the sample's variance and ours by the
    population's, so ours is sqrt((n - 1) / n) smaller after the transformation, n the tokens of the step."""
    batch = random_batch(seed)
    rewards_K = torch.randn(batch.num_turns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    rewards_BL = batch.spread(rewards_K) * batch.is_last_of_turn()
    theirs_BL, returns_BL = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards_BL, batch.mask_BL.to(dtype), config=_algorithm(gamma=1.0)
    )
    num_tokens = int(batch.mask_BL.sum())
    ours_K = reinforce_plus_plus(rewards_K, batch.trace_ids_K, batch.num_tokens_K, turn_discount=1.0)
    ours_K = ours_K * math.sqrt((num_tokens - 1) / num_tokens)
    name = "verl compute_reinforce_plus_plus_outcome_advantage"
    agree("reinforce_plus_plus", name, batch.spread(ours_K), theirs_BL, tolerance=TOLERANCE[torch.float32])
    returns_K = turn_returns(rewards_K, batch.trace_ids_K, turn_discount=1.0)
    agree("turn_returns", name, batch.spread(returns_K), returns_BL, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("seed", SEEDS)
def test_turn_discount_is_a_token_discount_between_turns_of_one_token(verl, seed):
    batch = random_batch(seed, max_turns=6, max_tokens=1)
    rewards_K = torch.randn(batch.num_turns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs_BL, returns_BL = verl.compute_reinforce_plus_plus_outcome_advantage(
        batch.spread(rewards_K), batch.mask_BL.double(), config=_algorithm(gamma=0.9)
    )
    name = "verl compute_reinforce_plus_plus_outcome_advantage"
    returns_K = turn_returns(rewards_K, batch.trace_ids_K, turn_discount=0.9)
    agree("turn_returns", name, batch.spread(returns_K), returns_BL, tolerance=TOLERANCE[torch.float64])
    ours_K = reinforce_plus_plus(rewards_K, batch.trace_ids_K, batch.num_tokens_K, turn_discount=0.9)
    ours_K = ours_K * math.sqrt((batch.num_turns - 1) / batch.num_turns)
    agree("reinforce_plus_plus", name, batch.spread(ours_K), theirs_BL, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("seed", SEEDS)
def test_token_discount_inside_a_turn(verl, seed):
    """One turn a trace, its reward on the last token: verl's return of a token is reward * gamma ** (tokens to come)."""
    batch = random_batch(seed, max_turns=1)
    rewards_K = torch.randn(batch.num_turns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, returns_BL = verl.compute_reinforce_plus_plus_outcome_advantage(
        batch.spread(rewards_K) * batch.is_last_of_turn(), batch.mask_BL.double(), config=_algorithm(gamma=0.8)
    )
    ours_T = turn_to_tokens(rewards_K, batch.ids()["turn_ids_T"], token_discount=0.8)
    name = "verl compute_reinforce_plus_plus_outcome_advantage"
    agree("turn_to_tokens", name, batch.unpack(ours_T), returns_BL, tolerance=TOLERANCE[torch.float64])


def _algorithm(**settings: float) -> object:
    from verl.trainer.config import AlgoConfig

    return AlgoConfig(**settings)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_running_mean_is_the_adjusted_moving_average_of_pandas(seed, decay):
    """pandas divides by the sum of the weights, which is the bias correction; a step in which a role has no trace is a missing value.

    The first step's baseline is its own mean here: pandas has no value before it.
    """
    generator = torch.Generator().manual_seed(seed)
    num_roles, num_steps = 3, 12
    state, baselines, means = RunningMean.start(num_roles), [], []
    for _ in range(num_steps):
        roles_N = torch.randint(num_roles, (4,), generator=generator)
        rewards_N = torch.randn(4, generator=generator, dtype=torch.float64)
        means.append([rewards_N[roles_N == role].mean().item() for role in range(num_roles)])  # NaN: no trace
        advantages_N, state = ema_baseline(rewards_N, roles_N, state, decay=decay)
        baseline_N = rewards_N - advantages_N
        baselines.append([baseline_N[roles_N == role].mean().item() for role in range(num_roles)])
    table = pd.DataFrame(means)
    before = table.ewm(alpha=1.0 - decay, adjust=True, ignore_na=True).mean().shift(1).ffill()
    expected = before.where(before.notna(), table)
    compared = torch.tensor(table.notna().to_numpy())
    ours, theirs = torch.tensor(baselines, dtype=torch.float64)[compared], torch.tensor(expected.to_numpy())[compared]
    agree("ema_baseline", "pandas DataFrame.ewm", ours, theirs, tolerance=TOLERANCE[torch.float64])


@pytest.mark.parametrize("seed", SEEDS)
def test_plan_rewards_are_means_by_plan(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards_N = torch.randn(40, generator=generator, dtype=torch.float64)
    plans_N = torch.randint(15, (40,), generator=generator)
    theirs = pd.Series(rewards_N.numpy()).groupby(plans_N.numpy()).mean()
    ours_P = plan_rewards(rewards_N, plans_N, 16)
    assert set(ours_P.isnan().nonzero()[:, 0].tolist()) == set(range(16)) - set(theirs.index)
    agree("plan_rewards", "pandas groupby.mean", ours_P[list(theirs.index)], torch.tensor(theirs.to_numpy()), tolerance=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_counterfactual_credit_is_remax_with_the_ablated_mean_as_baseline(verl, seed):
    """ReMax subtracts the reward of a greedy answer; here the mean of the ablated episodes of the prompt takes that place."""
    generator = torch.Generator().manual_seed(seed)
    rewards_N = torch.randn(48, generator=generator, dtype=torch.float64)
    prompts_N = torch.randint(4, (48,), generator=generator)
    ablated_N = torch.rand(48, generator=generator) < 0.4
    means = pd.Series(rewards_N[ablated_N].numpy()).groupby(prompts_N[ablated_N].numpy()).mean()
    assert len(means) == 4, "the draw leaves no prompt without an ablated episode"
    factual_N = ~ablated_N
    baselines_N = torch.tensor(means[prompts_N[factual_N].numpy()].to_numpy())
    theirs_NL, _ = verl.compute_remax_outcome_advantage(outcome(rewards_N[factual_N])[0], baselines_N, torch.ones(len(baselines_N), 3))
    ours_N = counterfactual_advantage(rewards_N, prompts_N, ablated_N)
    assert (ours_N[ablated_N] == 0.0).all()
    name = "verl compute_remax_outcome_advantage, pandas"
    agree("counterfactual_advantage", name, ours_N[factual_N], theirs_NL[:, 0], tolerance=TOLERANCE[torch.float64])


def test_the_opponents_are_the_pinned_ones():
    import trl
    import verl

    pins = (Path(__file__).parents[2] / "requirements/golden.txt").read_text().split()
    for package in (trl, verl, pd):
        assert f"{package.__name__}=={package.__version__}" in pins
        assert Path(package.__file__).is_relative_to(oracles.PACKAGES)
