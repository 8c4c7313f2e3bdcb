"""Which rewards stand on which token before a critic's advantages are taken."""

from __future__ import annotations

import pytest
import torch

from megatron_rema.config import AlgorithmConfig
from megatron_rema.trainer.credit import generalized_advantages
from megatron_rema.types import Role, Trace

# two turns: prompt, own, own | heard | own; six tokens, so five labels: own at labels 0, 1 and 3, heard at 2 and 4
TRACE = Trace(
    episode_id="e",
    role=Role.REASONING,
    token_ids=(5, 6, 7, 8, 9, 4),
    loss_mask=(False, True, True, False, True, False),
    turn_ids=(-1, 0, 0, -1, 1, -1),
    rollout_logprobs=(0.0,) * 6,
    turn_rewards=(1.0, 3.0),
)


def returns(columns: dict, **algorithm) -> list[float]:
    """With values 0 and every discount and lambda 1 a token's return is the plain sum of rewards from it on."""
    found = generalized_advantages([TRACE], {"values": [torch.zeros(5)], **columns}, AlgorithmConfig(advantage="gae", **algorithm))
    return found["returns"][0].tolist()


def test_a_turns_reward_stands_on_its_last_token():
    # rewards 0, 1, -, 3: sums from each own token on are 4, 4, 3
    assert returns({}) == [4.0, 4.0, 0.0, 3.0, 0.0]


def test_every_own_token_pays_for_its_distance_from_the_reference():
    # k1 = old - ref: .5, -1, -, 2; rewards -.1*.5, 1 + .1*1, -, 3 - .1*2 = -.05, 1.1, -, 2.8; sums 3.85, 3.9, -, 2.8
    old, ref = torch.tensor([-1.0, -2.0, -9.0, -1.0, -9.0]), torch.tensor([-1.5, -1.0, -1.0, -3.0, -1.0])
    found = returns({"old_logprobs": [old], "ref_logprobs": [ref]}, reward_kl_coef=0.1)
    assert found == pytest.approx([3.85, 3.9, 0.0, 2.8, 0.0], abs=1e-6)
