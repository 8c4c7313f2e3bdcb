"""Turn rewards of a step's episodes -> advantages per role and turn. Which episodes are compared is decided here; how, in algorithm/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rema.algorithm.advantage import group_advantage, reinforce_plus_plus
from megatron_rema.algorithm.gae import gae
from megatron_rema.algorithm.kl import kl_estimate
from megatron_rema.algorithm.masked import weighted_whiten
from megatron_rema.config import AlgorithmConfig
from megatron_rema.types import Episode, Role, Trace


def assign_advantages(episodes: Sequence[Episode], roles: Sequence[Role], algorithm: AlgorithmConfig) -> None:
    """Fill ``episode.advantages[role]`` ([K]) of every episode that has ``turn_rewards[role]``.

    Group estimators compare a role's total reward with that of the same role in the other episodes of the prompt, and give every
    turn of the trace that advantage; reinforce_plus_plus compares turn returns over the whole step.
    """
    for role in roles:
        played = [episode for episode in episodes if episode.turn_rewards.get(role)]
        if not played:
            continue
        rewards = [episode.turn_rewards[role] for episode in played]
        if algorithm.advantage == "reinforce_plus_plus":
            flat = torch.tensor([reward for turns in rewards for reward in turns])
            trace_ids = torch.tensor([index for index, turns in enumerate(rewards) for _ in turns])
            tokens = torch.tensor([len(turn.completion.token_ids) for episode in played for turn in episode.turns_of(role)])
            per_turn = reinforce_plus_plus(flat, trace_ids, tokens, turn_discount=algorithm.turn_discount).tolist()
            for episode, turns in zip(played, rewards, strict=True):
                episode.advantages[role], per_turn = per_turn[: len(turns)], per_turn[len(turns) :]
        else:
            group_of = {prompt_id: index for index, prompt_id in enumerate(dict.fromkeys(e.prompt.prompt_id for e in played))}
            group_ids = torch.tensor([group_of[episode.prompt.prompt_id] for episode in played])
            totals = torch.tensor([sum(turns) for turns in rewards])
            for episode, turns, value in zip(
                played, rewards, group_advantage(totals, group_ids, estimator=algorithm.advantage).tolist(), strict=True
            ):
                episode.advantages[role] = [value] * len(turns)


def generalized_advantages(
    traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]], algorithm: AlgorithmConfig
) -> dict[str, list[Tensor]]:
    """Columns ``advantages`` (whitened over every own token of the step) and ``returns``, [L-1] a trace, from the critic's ``values``.

    A turn's reward stands on its last token. With ``algorithm.reward_kl_coef`` every own token also pays that times
    log policy - log reference (``old_logprobs``, ``ref_logprobs``), whose mean is the KL: InstructGPT arXiv:2203.02155 eq. 2.
    """
    sizes = [len(trace.token_ids) - 1 for trace in traces]
    mask_T = torch.tensor([own for trace in traces for own in trace.loss_mask[1:]])
    first_turn = 0
    turn_ids: list[int] = []
    rewards: list[Tensor] = []
    for index, trace in enumerate(traces):
        own = torch.tensor(trace.turn_ids[1:])
        rewards_L = torch.zeros(len(own))
        if algorithm.reward_kl_coef > 0:
            kl_L = kl_estimate(columns["old_logprobs"][index], columns["ref_logprobs"][index], estimator="k1")
            rewards_L = torch.where(own >= 0, -algorithm.reward_kl_coef * kl_L, 0.0)
        for turn, reward in enumerate(trace.turn_rewards):
            places = (own == turn).nonzero()
            if len(places):
                rewards_L[places[-1]] += reward
        rewards.append(rewards_L)
        turn_ids += torch.where(own >= 0, own + first_turn, -1).tolist()
        first_turn += 1 + max(trace.turn_ids)
    advantages_T, returns_T = gae(
        torch.cat(rewards),
        torch.cat(list(columns["values"])),
        torch.tensor(turn_ids),
        torch.repeat_interleave(torch.arange(len(traces)), torch.tensor(sizes)),
        mask_T,
        discount=algorithm.discount,
        gae_lambda=algorithm.gae_lambda,
        turn_discount=algorithm.turn_discount,
        turn_lambda=algorithm.turn_lambda,
    )
    white_T = torch.zeros_like(advantages_T)
    white_T[mask_T] = weighted_whiten(advantages_T[mask_T], torch.ones(int(mask_T.sum())))
    return {"advantages": list(white_T.split(sizes)), "returns": list(returns_T.split(sizes))}
