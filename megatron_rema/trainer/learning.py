"""Optimizer steps on a step's episodes: whom it updates, what the objective needs, and what is told where an update was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from megatron_rema.algorithm.control import adapted_kl_coef
from megatron_rema.rollout.traces import traces_of
from megatron_rema.trainer.cast import Policy
from megatron_rema.trainer.credit import generalized_advantages, penalise_divergence
from megatron_rema.trainer.diagnosis import find_non_finite, tell_skipped
from megatron_rema.trainer.experience import is_trainable, pack_for_rank
from megatron_rema.trainer.scoring import label_logprobs, scalars
from megatron_rema.trainer.study import Study
from megatron_rema.trainer.update import update_critic, update_policy
from megatron_rema.trainer.whitebox import heavy_tail
from megatron_rema.types import Episode, Trace


def active_policies(study: Study) -> list[Policy]:
    """Whom this step updates: everyone who learns, or one policy after the other every ``alternate_every`` steps."""
    agents, policies = study.config.agents, [policy for policy in study.policies.values() if policy.optimizer is not None]
    if agents.schedule == "simultaneous":
        return policies
    return [policies[study.position.step // agents.alternate_every % len(policies)]]


def train_policy(study: Study, policy: Policy, episodes: Sequence[Episode]) -> dict[str, float]:
    """Optimizer steps of one policy, and of its critic, on its roles' traces. With several policies, metric names carry the policy's."""
    config, reporter = study.config, study.reporter
    parts = [
        [study.constrain(t) for e in part for t in traces_of(e) if t.role in policy.roles]
        for part in minibatches(episodes, config.trainer.minibatches_per_step)
    ]
    kept = [[trace for trace in part if is_trainable(trace)] for part in parts]
    traces = [trace for part in kept for trace in part]
    if not traces:  # a step may have none: of a reasoner, say, whose meta-thinker never came to an end
        study.folder.alert({"step": study.position.step + 1, "alert": "no_trainable_trace", "policy": policy.name})
        reporter.say(f"ALERT step {study.position.step + 1}: policy {policy.name} said nothing that can be trained on; it is not updated")
        return {}
    with reporter.phase("score"):  # before the first update: all minibatches are scored by the policy that sampled them
        columns = score(study, policy, traces)
    divergence: dict[str, float] = {}
    if config.algorithm.chi2_coef > 0:
        columns["advantages"], divergence = penalise_divergence(traces, columns, config.algorithm)
    results = []
    first = 0
    with reporter.phase("update", total=len(kept)):
        for part in kept:
            own = {name: column[first : first + len(part)] for name, column in columns.items()}
            first += len(part)
            if part:
                results.append(update(study, policy, part, own))
                study.skipped.count(results[-1], step=study.position.step + 1, owner=f"policy {policy.name}")
            reporter.advance(len(results))
    merged = {name: sum(row[name] for row in results) / len(results) for name in results[0]}
    merged |= {name: float(sum(row[name] for row in results)) for name in merged if name.endswith("/skipped_updates")}
    if "sync/logprob_gap_max" in merged:
        merged["sync/logprob_gap_max"] = max(row["sync/logprob_gap_max"] for row in results)
    merged |= divergence | control_kl(study, policy, merged, num_traces=len(traces))
    merged["train/dropped_traces"] = float(sum(map(len, parts)) - len(traces))
    if study.monitor is not None:
        merged |= heavy_tail(traces, columns)
    if len(study.policies) == 1:
        return merged
    return {f"{name.split('/')[0]}/{policy.name}/{name.split('/', 1)[1]}": value for name, value in merged.items()}


def kl_coef_of(study: Study, policy: Policy) -> float:
    """The policy's KL coefficient in this step: the configured one, or where its controller stands."""
    return study.position.kl_coefs.get(policy.name, study.config.algorithm.kl_coef)


def control_kl(study: Study, policy: Policy, metrics: Mapping[str, float], *, num_traces: int) -> dict[str, float]:
    """Move the policy's KL coefficient towards ``algorithm.kl_target_nats``, for the steps to come. Returns the one that this step had."""
    algorithm = study.config.algorithm
    if algorithm.kl_target_nats is None:
        return {}
    coef = kl_coef_of(study, policy)
    if "train/kl_ref_nats" in metrics:  # not where the critic alone was updated
        study.position.kl_coefs[policy.name] = adapted_kl_coef(
            coef,
            metrics["train/kl_ref_nats"],
            target=algorithm.kl_target_nats,
            num_traces=num_traces,
            horizon=algorithm.kl_horizon,
        )
    return {"train/kl_coef": coef}


def score(study: Study, policy: Policy, traces: Sequence[Trace]) -> dict[str, list[Tensor]]:
    """Per-token columns that the objective needs, trace by trace, from each model at its own layout."""
    config = study.config
    tokens, temperature = config.trainer.microbatch_tokens, config.rollout.temperature
    columns: dict[str, list[Tensor]] = {}
    if config.trainer.minibatches_per_step > 1 or config.algorithm.reward_kl_coef > 0 or config.algorithm.chi2_coef > 0:
        columns["old_logprobs"] = label_logprobs(policy.model, traces, temperature=temperature, microbatch_tokens=tokens)
    if config.algorithm.needs_ref_logprobs:
        columns["ref_logprobs"] = label_logprobs(policy.reference, traces, temperature=temperature, microbatch_tokens=tokens)
    if policy.critic is not None:
        columns["values"] = [values[:, 0] for values in scalars(policy.critic.model, traces, microbatch_tokens=tokens)]
        columns |= generalized_advantages(traces, columns, config.algorithm)
    return columns


def update(study: Study, policy: Policy, traces: Sequence[Trace], columns: dict[str, list[Tensor]]) -> dict[str, float]:
    """One optimizer step of the policy, one of its critic; the critic alone while it warms up."""
    config = study.config
    shape = {"max_turns": config.rollout.max_rounds, "microbatch_tokens": config.trainer.microbatch_tokens, "columns": columns}
    at = min(study.position.sampled_tokens, config.trainer.token_budget) if config.trainer.token_budget else None
    metrics: dict[str, float] = {}
    if policy.critic is not None:
        batches = pack_for_rank(traces, aggregation="token", groups=policy.critic.model.groups, **shape)
        metrics |= update_critic(
            policy.critic.model, policy.critic.optimizer, batches, value_clip=config.critic.value_clip, schedule_position=at
        )
        if metrics["critic/skipped_updates"]:
            values = scalars(policy.critic.model, traces, microbatch_tokens=config.trainer.microbatch_tokens)
            explain_skipped(study, f"the critic of policy {policy.name}", traces, {"values": values} | columns)
    if policy.critic is None or study.position.step >= config.critic.warmup_steps:
        batches = pack_for_rank(traces, aggregation=config.algorithm.aggregation, groups=policy.model.groups, **shape)
        metrics |= update_policy(
            policy.model,
            policy.optimizer,
            batches,
            algorithm=replace(config.algorithm, kl_coef=kl_coef_of(study, policy)),
            temperature=config.rollout.temperature,
            reference=policy.reference if config.algorithm.kl_estimator == "exact" else None,
            schedule_position=at,
            with_energy=study.monitor is not None,
        )
        if metrics["train/skipped_updates"]:
            logprobs = label_logprobs(
                policy.model, traces, temperature=config.rollout.temperature, microbatch_tokens=config.trainer.microbatch_tokens
            )
            explain_skipped(study, f"policy {policy.name}", traces, {"logprobs": logprobs} | columns)
    return metrics


def explain_skipped(study: Study, model: str, traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]]) -> None:
    found = find_non_finite(traces, columns)
    tell_skipped(found, step=study.position.step + 1, model=model, folder=study.folder, reporter=study.reporter)


def minibatches(episodes: Sequence[Episode], count: int) -> list[list[Episode]]:
    """Episodes split by whole prompts, dealt in turn, so that every minibatch holds whole groups."""
    order = {prompt_id: index for index, prompt_id in enumerate(dict.fromkeys(e.prompt.prompt_id for e in episodes))}
    parts: list[list[Episode]] = [[] for _ in range(count)]
    for episode in episodes:
        parts[order[episode.prompt.prompt_id] % count].append(episode)
    return parts
