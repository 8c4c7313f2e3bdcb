"""Turn rewards of a step's episodes -> advantages per role and turn. Which episodes are compared is decided here; how, in algorithm/."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rema.algorithm.baseline import RunningMean, counterfactual_advantage, ema_baseline, plan_rewards
from megatron_rema.algorithm.control import chi_squared_penalty
from megatron_rema.algorithm.selection import informative_groups, within_success_rate
from megatron_rema.algorithm.shaping import overlong_penalty
from megatron_rema.config import AlgorithmConfig, RewardConfig, RolloutConfig
from megatron_rema.kernels.advantage import gae, group_advantage, masked_whiten, reinforce_plus_plus
from megatron_rema.reward.answers import normalised
from megatron_rema.reward.components import final_answer
from megatron_rema.reward.gates import PREFIX
from megatron_rema.types import Episode, Role, Trace


def group_by_prompt(episodes: Sequence[Episode]) -> dict[str, list[Episode]]:
    """Episodes of each prompt, by prompt_id, in the order of first appearance."""
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.prompt.prompt_id].append(episode)
    return dict(groups)


def inside(episodes: Sequence[Episode], right: Mapping[str, float], rollout: RolloutConfig) -> list[str]:
    """Prompts (by id) whose fraction of right answers lies in [success_low, success_high]; ``right`` is 1.0 or 0.0 by episode_id."""
    groups = group_by_prompt(episodes)
    numbers = {prompt_id: number for number, prompt_id in enumerate(groups)}
    kept_N = within_success_rate(
        torch.tensor([right[episode.episode_id] for episode in episodes]),
        torch.tensor([numbers[episode.prompt.prompt_id] for episode in episodes], dtype=torch.long),
        low=rollout.success_low,
        high=rollout.success_high,
    )
    return list(dict.fromkeys(e.prompt.prompt_id for e, kept in zip(episodes, kept_N.tolist(), strict=True) if kept))


def chosen_for_training(scored: Sequence[Episode], rollout: RolloutConfig) -> list[Episode]:
    """The episodes of the first ``prompts_per_step`` prompts that are neither hopeless nor solved (ReMA algorithm 1)."""
    kept = inside(scored, {episode.episode_id: episode.score["correct"] for episode in scored}, rollout)
    chosen = set(kept[: rollout.prompts_per_step])
    return [episode for episode in scored if episode.prompt.prompt_id in chosen]


def informative_frac(episodes: Sequence[Episode]) -> float:
    """Fraction of prompts whose episodes do not all earn the reasoner the same: those that a group estimator learns from (DAPO)."""
    played = [episode for episode in episodes if episode.turn_rewards.get(Role.REASONING)]
    numbers = {prompt_id: number for number, prompt_id in enumerate(group_by_prompt(played))}
    if not numbers:
        return 0.0
    prompts_N = torch.tensor([numbers[episode.prompt.prompt_id] for episode in played])
    informative_N = informative_groups(torch.tensor([sum(episode.turn_rewards[Role.REASONING]) for episode in played]), prompts_N)
    return prompts_N[informative_N].unique().numel() / len(numbers)


def penalise_overlong(episodes: Sequence[Episode], *, buffer_tokens: int, max_tokens: int) -> None:
    """Add DAPO's penalty for length to the last turn of every rewarded role; 0 ``buffer_tokens``: none."""
    if buffer_tokens == 0 or not episodes:
        return
    lengths_N = torch.tensor([episode.num_sampled_tokens for episode in episodes])
    for episode, penalty in zip(episodes, overlong_penalty(lengths_N, max_tokens=max_tokens, buffer_tokens=buffer_tokens), strict=True):
        episode.score["overlong_penalty"] = float(penalty)
        for role in episode.turn_rewards:
            episode.add_reward("overlong", role, float(penalty))


def share_plan_rewards(episodes: Sequence[Episode], *, scheme: str) -> None:
    """A plan with several answers earns the mean of what its episodes gave the meta-thinker (arXiv:2503.09501), once.

    The reward stands in the episode that planned, or, where that one was excluded, in the first of the others, which then counts as the
    one that planned. ``consistency``: the plan earns instead the fraction of its answers that are the most frequent one, right or wrong.
    """
    families: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        if Role.META_THINKING in episode.turn_rewards:
            families[episode.plan_of or episode.episode_id].append(episode)
    for family in families.values():
        planner, *others = family
        if planner.plan_of is None and not others and scheme != "consistency":
            continue
        if scheme == "consistency":
            worth = majority_frequency([final_answer(episode) for episode in family])
        else:
            rewards = torch.tensor([episode.turn_rewards[Role.META_THINKING][-1] for episode in family])
            worth = float(plan_rewards(rewards, torch.zeros(len(family), dtype=torch.long), 1))
        planner.plan_of = None
        planner.add_reward("other_answers", Role.META_THINKING, worth - planner.turn_rewards[Role.META_THINKING][-1])
        planner.turn_rewards[Role.META_THINKING] = [worth]  # to the bit
        for other in others:
            other.plan_of = planner.episode_id
            other.drop_reward(Role.META_THINKING)


def majority_frequency(answers: Sequence[str | None]) -> float:
    """Fraction of answers that are the most frequent one, compared as normalised text; None is no answer."""
    texts = Counter(normalised(answer) for answer in answers if answer is not None)
    return max(texts.values(), default=0) / len(answers)


def credit_plans(episodes: Sequence[Episode], counterfactuals: Sequence[Episode]) -> None:
    """Fill the meta-thinker's advantage in every episode that planned: its reward - the mean of its counterfactuals (baseline.py).

    An ablated one stands for every episode of its prompt, a swapped one for one episode. Where none has a verdict nothing can be
    compared: advantage 0. Both sides are what the reward scheme gives the meta-thinker.
    """
    everyone = [episode for episode in (*episodes, *counterfactuals) if Role.META_THINKING in episode.turn_rewards]
    ablated = any(episode.counterfactual_of == episode.prompt.prompt_id for episode in counterfactuals)
    keys = [e.counterfactual_of or (e.prompt.prompt_id if ablated else e.episode_id) for e in everyone]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    advantages_N = counterfactual_advantage(
        torch.tensor([episode.turn_rewards[Role.META_THINKING][-1] for episode in everyone]),
        torch.tensor([numbers[key] for key in keys], dtype=torch.long),
        torch.tensor([episode.is_counterfactual for episode in everyone], dtype=torch.bool),
    )
    for episode, advantage in zip(everyone, advantages_N.tolist(), strict=True):
        if not episode.is_counterfactual:
            episode.advantages[Role.META_THINKING] = [advantage]


def component_weights(reward: RewardConfig) -> dict[str, float]:
    """w_k of components by name, where it is not 1."""
    return {**reward.weights, "model": reward.model_weight}


def normalised_components(episodes: Sequence[Episode], role: Role, group_ids_N: Tensor, weights: Mapping[str, float]) -> Tensor:
    """[N] A = sum over components k of |w_k| (R_k - mean_g R_k) / (std_g R_k + 1e-6), so that none drowns in another's spread.

    Source: GDPO arXiv:2601.05242, without its whitening of A over the batch. R_k are ``reward_parts`` as weighted, which leaves the sign
    of w_k in them, std that of the sample (n - 1). Where a gate closed, or an unfinished episode was held at 0, each R_k counts as
    min(0, R_k): a veto is no component whose standard deviation could be divided away.
    """

    def is_veto(name: str) -> bool:
        return name == "mask" or name.startswith(PREFIX)

    vetoed = [any(role in part for name, part in episode.reward_parts.items() if is_veto(name)) for episode in episodes]
    names = dict.fromkeys(name for episode in episodes for name in episode.reward_parts if not is_veto(name))
    advantages_N = torch.zeros(len(episodes), dtype=torch.float64)
    for name in names:
        values = [sum(episode.reward_parts.get(name, {}).get(role, ())) for episode in episodes]
        values_N = torch.tensor([min(0.0, value) if closed else value for value, closed in zip(values, vetoed, strict=True)])
        advantages_N += abs(weights.get(name, 1.0)) * group_advantage(values_N, group_ids_N, estimator="grpo").double()
    return advantages_N.float()


def assign_advantages(
    episodes: Sequence[Episode],
    roles: Sequence[Role],
    algorithm: AlgorithmConfig,
    baselines: Mapping[str, Sequence[float]],
    *,
    counterfactuals: Sequence[Episode] = (),
    weights: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Fill ``episode.advantages[role]`` ([K]) of every episode that has ``turn_rewards[role]``. Returns the baselines after this step.

    Group estimators compare a role's total reward with that of the same role in the other episodes of the prompt, ema with the role's
    own past (``baselines``), and give every turn of the trace that advantage; reinforce_plus_plus compares turn returns over the step.
    With counterfactual credit a plan is compared with ``counterfactuals`` instead, whatever the estimator. ``advantage_components`` =
    normalised compares the reward component by component, times ``weights`` (see `normalised_components`).
    """
    after = {role: list(pair) for role, pair in baselines.items()}
    for role in roles:
        if role is Role.META_THINKING and algorithm.credit != "outcome":
            credit_plans(episodes, counterfactuals)
            continue
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
            continue
        totals = torch.tensor([sum(turns) for turns in rewards])
        if algorithm.advantage == "ema":
            before = RunningMean(*(torch.tensor([value], dtype=torch.float64) for value in after.get(role, (0.0, 0.0))))
            per_trace, mean = ema_baseline(totals, torch.zeros(len(played), dtype=torch.long), before, decay=algorithm.ema_decay)
            after[str(role)] = [float(mean.sums_R), float(mean.weights_R)]
        else:
            group_of = {prompt_id: index for index, prompt_id in enumerate(group_by_prompt(played))}
            group_ids = torch.tensor([group_of[episode.prompt.prompt_id] for episode in played])
            if algorithm.advantage_components == "normalised":
                per_trace = normalised_components(played, role, group_ids, weights or {})
            else:
                per_trace = group_advantage(totals, group_ids, estimator=algorithm.advantage)
        for episode, turns, value in zip(played, rewards, per_trace.tolist(), strict=True):
            episode.advantages[role] = [value] * len(turns)
    return after


def generalized_advantages(
    traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]], algorithm: AlgorithmConfig
) -> dict[str, list[Tensor]]:
    """Columns ``advantages`` (whitened over every own token of the step) and ``returns``, [L-1] a trace, from the critic's ``values``.

    A turn's reward stands on its last token. With ``algorithm.reward_kl_coef`` every own token also pays that times the KL of the
    sampling policy (``old_logprobs``) from the reference (``ref_logprobs``).
    """
    sizes = [len(trace.token_ids) - 1 for trace in traces]
    mask_T = torch.tensor([own for trace in traces for own in trace.loss_mask[1:]])
    first_turn = 0
    turn_ids: list[int] = []
    rewards: list[Tensor] = []
    for trace in traces:
        own = torch.tensor(trace.turn_ids[1:])
        rewards_L = torch.zeros(len(own))
        for turn, reward in enumerate(trace.turn_rewards):
            places = (own == turn).nonzero()
            if len(places):
                rewards_L[places[-1]] += reward
        rewards.append(rewards_L)
        turn_ids += torch.where(own >= 0, own + first_turn, -1).tolist()
        first_turn += 1 + max(trace.turn_ids)
    kl: dict[str, Any] = {}
    if algorithm.reward_kl_coef > 0:
        kl = {"logprobs_T": torch.cat(list(columns["old_logprobs"])), "ref_logprobs_T": torch.cat(list(columns["ref_logprobs"]))}
        kl |= {"kl_coef": algorithm.reward_kl_coef, "kl_estimator": algorithm.reward_kl_estimator}
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
        **kl,
    )
    return {"advantages": list(masked_whiten(advantages_T, mask_T).split(sizes)), "returns": list(returns_T.split(sizes))}


def penalise_divergence(
    traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]], algorithm: AlgorithmConfig
) -> tuple[list[Tensor], dict[str, float]]:
    """Column ``advantages``, [L-1] a trace, less the chi-squared penalty on every own token, and metrics.

    Reads ``old_logprobs`` and ``ref_logprobs``, and ``advantages`` where a critic has given them; else those of the traces.
    """
    masks = [torch.tensor(trace.loss_mask[1:]) for trace in traces]
    log_ratios_N = torch.stack(
        [
            (old_L - ref_L).masked_fill(~mask_L, 0.0).sum()
            for old_L, ref_L, mask_L in zip(columns["old_logprobs"], columns["ref_logprobs"], masks, strict=True)
        ]
    )
    penalty_N, chi2 = chi_squared_penalty(log_ratios_N, coef=algorithm.chi2_coef, log_ratio_cap=algorithm.chi2_log_ratio_cap)
    given = columns.get("advantages") or [
        torch.tensor([trace.advantages[turn] if turn >= 0 else 0.0 for turn in trace.turn_ids[1:]]) for trace in traces
    ]
    capped = (log_ratios_N > algorithm.chi2_log_ratio_cap).float().mean()
    return [advantages_L + penalty * mask_L for advantages_L, penalty, mask_L in zip(given, penalty_N, masks, strict=True)], {
        "train/chi2": chi2,
        "train/chi2_capped_frac": float(capped),
    }
