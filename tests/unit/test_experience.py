"""Packing: the one shift, padding that trains nothing, global counts; and credit from rewards to advantages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rema.config import AlgorithmConfig
from megatron_rema.trainer.credit import assign_advantages
from megatron_rema.trainer.experience import Counts, is_trainable, pack
from megatron_rema.types import Completion, Episode, Prompt, Role, StopReason, Trace, Turn

# context 10 11, turn 0 = 20 21, context 12, turn 1 = 22
TRACE = Trace(
    episode_id="a",
    role=Role.REASONING,
    token_ids=(10, 11, 20, 21, 12, 22),
    loss_mask=(False, False, True, True, False, True),
    turn_ids=(-1, -1, 0, 0, -1, 1),
    rollout_logprobs=(0.0, 0.0, -0.1, -0.2, 0.0, -0.3),
    turn_rewards=(0.0, 1.0),
    advantages=(0.5, -0.5),
)


def test_labels_are_the_next_tokens_and_every_field_is_aligned_with_them():
    batch = pack([TRACE], 5)
    assert batch.tokens.tolist() == [10, 11, 20, 21, 12]
    assert batch.labels.tolist() == [11, 20, 21, 12, 22]
    assert batch.loss_mask.tolist() == [False, True, True, False, True]
    assert batch.turn_ids.tolist() == [-1, 0, 0, -1, 1]
    assert torch.allclose(batch.rollout_logprobs, torch.tensor([0.0, -0.1, -0.2, 0.0, -0.3]))
    assert batch.advantages.tolist() == [0.0, 0.5, 0.5, 0.0, -0.5]


def test_packed_traces_keep_their_turns_apart_and_padding_trains_nothing():
    batch = pack([TRACE, replace(TRACE, episode_id="b")], 16)
    assert batch.turn_ids[5:10].tolist() == [-1, 2, 2, -1, 3]  # the second trace's turns follow the first's two
    assert batch.cu_turns.tolist() == [0, 4, 6, 9, 16] and batch.num_turns == 4
    assert batch.trace_ids.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3]  # 6 positions of padding: no sequence longer than 5
    assert batch.positions.tolist() == [0, 1, 2, 3, 4] * 3 + [0]
    assert batch.cu_seqlens.tolist() == [0, 5, 10, 15, 16]
    assert batch.max_seqlen == 5
    assert not batch.loss_mask[10:].any() and (batch.turn_ids[10:] == -1).all()


def test_a_batch_of_padding_alone_is_whole():
    batch = pack([], 300)
    assert batch.cu_seqlens.tolist() == [0, 128, 256, 300] and not batch.loss_mask.any()
    assert batch.cu_turns.tolist() == [0, 300]


def test_a_turn_without_a_label_is_an_empty_part():
    """A trace's first token is never predicted: its turn 0 begins where turn 1 does."""
    mine_first = replace(TRACE, turn_ids=(0, -1, 1, 1, -1, 2), advantages=(0.0, 0.5, -0.5))
    assert pack([mine_first, TRACE], 10).cu_turns.tolist() == [0, 1, 4, 6, 9, 10]


def test_allowed_sets_are_packed_once_each_and_free_positions_allow_everything():
    # 40 tokens, 2 words of 4 bytes: {20} = bit 20 of word 0, {21, 33} = bit 21 of word 0 and bit 1 of word 1
    only_20, two = (1 << 20).to_bytes(8, "little"), (1 << 21 | 1 << 33).to_bytes(8, "little")
    constrained = replace(TRACE, allowed=(None, None, only_20, two, None, only_20))
    batch = pack([TRACE, constrained], 12)
    assert batch.allowed_sets.tolist() == [[-1, -1], [1 << 20, 0], [1 << 21, 1 << 1]]
    assert batch.allowed_ids.tolist() == [0] * 5 + [0, 1, 2, 0, 1] + [0] * 2
    assert pack([TRACE], 5).allowed_sets is None and pack([], 4).allowed_ids is None


def test_traces_that_do_not_fit_are_an_error_with_the_arithmetic():
    with pytest.raises(ValueError, match="2 traces need 10 positions, the batch has 9"):
        pack([TRACE, TRACE], 9)


def test_global_counts_count_what_has_a_label():
    first_token_is_mine = Trace("c", Role.REASONING, (1, 2), (True, True), (0, 0), (-0.1, -0.1), (1.0,), (1.0,))
    nothing = Trace("d", Role.REASONING, (1,), (True,), (0,), (-0.1,), (1.0,), (1.0,))
    assert not is_trainable(nothing)
    # tokens 3 + 1 + 0, turns 2 + 1 + 0, traces with a label 2
    assert Counts.of([TRACE, first_token_is_mine, nothing]) == Counts(num_tokens=4, num_turns=3, num_traces=2)


def episode(prompt: str, index: int, reward: float, turns: int = 1, tokens: int = 2) -> Episode:
    completion = Completion("r", (1,) * tokens, (0.0,) * tokens, StopReason.STOP, 0)
    spoken = [Turn(role, k, (0,), completion, "") for k in range(turns) for role in Role]
    rewards = {role: [0.0] * (turns - 1) + [reward] for role in Role}
    return Episode(f"{prompt}/{index}", Prompt(prompt, "q", "a"), index, spoken, turn_rewards=rewards)


def test_grpo_compares_a_role_with_itself_within_one_prompt_and_gives_every_turn_the_trace_advantage():
    episodes = [episode("p", 0, 1.0, turns=2), episode("p", 1, 0.0), episode("q", 0, 5.0), episode("q", 1, 5.0)]
    assign_advantages(episodes, tuple(Role), AlgorithmConfig(advantage="grpo"), {})
    # p: rewards 1, 0: mean 0.5, sample std sqrt(0.5) = 0.7071 -> +-0.7071; q: equal rewards -> 0
    for role in Role:
        assert episodes[0].advantages[role] == pytest.approx([0.7071, 0.7071], abs=1e-4)
        assert episodes[1].advantages[role] == pytest.approx([-0.7071], abs=1e-4)
        assert episodes[2].advantages[role] == [0.0]


def test_reinforce_plus_plus_whitens_turn_returns_over_the_step():
    episodes = [episode("p", 0, 1.0, turns=2), episode("q", 0, 0.0)]
    assign_advantages(episodes, (Role.REASONING,), AlgorithmConfig(advantage="reinforce_plus_plus", turn_discount=0.5), {})
    # returns: p turn 0: 0 + 0.5 * 1 = 0.5, turn 1: 1.0; q: 0. Equal token counts: mean 0.5, population std 0.4082
    assert episodes[0].advantages[Role.REASONING] == pytest.approx([0.0, 1.2247], abs=1e-3)
    assert episodes[1].advantages[Role.REASONING] == pytest.approx([-1.2247], abs=1e-3)
    assert Role.META_THINKING not in episodes[0].advantages
