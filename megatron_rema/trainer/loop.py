"""ReMA RL, one step told in order: prompts, episodes, rewards, advantages, updates, weight sync.

Every rank runs this same program. Variants are data: which roles speak, which policy speaks for them, which is updated when.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.parallel.groups import build_groups
from megatron_rema.report.page import write_report
from megatron_rema.reward.assign import assign, reward_metrics
from megatron_rema.reward.behaviour import behaviour_metrics
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dataset import PromptStream
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.rollout.traces import traces_of
from megatron_rema.trainer import state
from megatron_rema.trainer.cast import (
    Policy,
    build_engines,
    build_policies,
    chat_format,
    dialogue_rules,
    export_hf,
    process_group,
    sync_weights,
)
from megatron_rema.trainer.collect import play_everywhere
from megatron_rema.trainer.credit import assign_advantages
from megatron_rema.trainer.evaluation import evaluate_sets, table
from megatron_rema.trainer.experience import is_trainable, pack_for_rank
from megatron_rema.trainer.inputs import Inputs
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.update import score, update
from megatron_rema.types import Engine, Episode, Prompt, Trace

# phase of a step -> its metric
_PHASES = {
    "generate": "rollout/generate_s",
    "verify": "reward/verify_s",
    "score": "experience/score_s",
    "update": "train/update_s",
    "sync": "sync/sync_s",
}


@dataclass
class Study:
    """One assembled run."""

    config: RunConfig
    policies: dict[str, Policy]
    engines: dict[str, Engine]
    rules: DialogueRules
    chat: ChatFormat
    stream: PromptStream
    sets: dict[str, list[Prompt]]
    verifier: VerifierPool
    folder: RunFolder
    reporter: Reporter
    position: state.Position


def train(config: RunConfig, inputs: Inputs) -> None:
    """The ``train`` front door, its inputs read."""
    chat = chat_format(config)
    with process_group():
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        reporter, folder = Reporter(speaks=first), RunFolder(config.run_dir, writes=first)
        explain(config, reporter)
        groups = build_groups(tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
        total_steps = config.trainer.steps * config.trainer.minibatches_per_step
        policies = build_policies(
            config, inputs.architectures, groups, total_steps=max(total_steps, 1), with_reference=config.algorithm.kl_coef > 0
        )
        position = state.restore(config, policies, folder)
        if position.step:
            reporter.say(f"resumed at step {position.step}")
        folder.write_config(as_mapping(config))
        reporter.say("starting engines")
        engines = build_engines(config)
        with VerifierPool(config.reward.verifier_processes, config.reward.verifier_timeout_s) as verifier:
            study = Study(
                config=config,
                policies=policies,
                engines=engines,
                rules=dialogue_rules(config),
                chat=chat,
                stream=PromptStream(inputs.prompts, config.seed),
                sets=inputs.evaluation_sets or {},
                verifier=verifier,
                folder=folder,
                reporter=reporter,
                position=position,
            )
            run(study)
        for engine in engines.values():
            engine.close()


def run(study: Study) -> None:
    """All steps that are left, with evaluations and checkpoints in between, and the report."""
    config, position, reporter = study.config, study.position, study.reporter
    trainer = config.trainer
    started = position.step
    sync_weights(study.policies, study.engines, position.weight_version)
    if position.step == 0:
        evaluate(study)
    with reporter.run("train", total=trainer.steps, done=position.step):
        while position.step < trainer.steps:
            metrics = step(study)
            study.folder.metrics(metrics)
            reporter.step_done(position.step, _headline(metrics))
            last = position.step == trainer.steps
            if last or (trainer.evaluate_every and position.step % trainer.evaluate_every == 0):
                evaluate(study)
            if last or (trainer.checkpoint_every and position.step % trainer.checkpoint_every == 0):
                checkpoint(study)
    if trainer.save_hf and (started < trainer.steps or not (study.folder.path / "hf").exists()):
        for path in export_hf(study.policies, study.folder.path / "hf"):
            reporter.say(f"policy exported: {path}")
    finish(study)


def step(study: Study) -> dict[str, float]:
    """One rollout and the optimizer steps on it. Returns the step's metrics, equal on every rank."""
    config, position, reporter = study.config, study.position, study.reporter
    begin = time.perf_counter()
    reporter.restart_clock()
    prompts = study.stream.take(position.prompts_taken, config.rollout.prompts_per_step)
    episodes, judgements = play_everywhere(
        starts_of(prompts, config.rollout.episodes_per_prompt),
        rules=study.rules,
        chat=study.chat,
        engines=study.engines,
        engine_tensor=config.engine.tensor,
        verifier=study.verifier,
        seed=config.seed,
        step=position.step,
        reporter=reporter,
    )
    for engine in study.engines.values():
        engine.sleep()
    assigned = assign(episodes, judgements, scheme=config.reward.scheme, mask_unfinished_reward=config.reward.mask_unfinished_reward)
    assign_advantages(assigned.scored, config.roles, config.algorithm)

    metrics: dict[str, float] = {}
    for policy in active_policies(study):
        metrics |= train_policy(study, policy, assigned.scored)
    position.step += 1
    position.prompts_taken += len(prompts)
    with reporter.phase("sync"):
        position.weight_version += 1
        for engine in study.engines.values():
            engine.wake()
        sync_weights(study.policies, study.engines, position.weight_version)

    if study.folder.writes:
        study.folder.episodes(position.step, (episode.to_json() for episode in episodes))
    sampled = sum(episode.num_sampled_tokens for episode in episodes)
    metrics |= reward_metrics(assigned, judgements)
    metrics |= behaviour_metrics(episodes, config.task.finish_marker)
    metrics |= {name: reporter.seconds.get(phase, 0.0) for phase, name in _PHASES.items()}
    metrics |= {
        "rollout/episodes": len(episodes),
        "rollout/sampled_tokens": sampled,
        "rollout/sampled_tokens_per_s": sampled / reporter.seconds["generate"],
        "rollout/prompts_taken": position.prompts_taken,
    }
    alarm(study, metrics)
    return {"step": position.step, "weight_version": position.weight_version, "time_s": time.perf_counter() - begin, **metrics}


def active_policies(study: Study) -> list[Policy]:
    """Whom this step updates: everyone, or one policy after the other every ``alternate_every`` steps."""
    agents, policies = study.config.agents, list(study.policies.values())
    if agents.schedule == "simultaneous":
        return policies
    return [policies[study.position.step // agents.alternate_every % len(policies)]]


def train_policy(study: Study, policy: Policy, episodes: Sequence[Episode]) -> dict[str, float]:
    """Optimizer steps of one policy on its roles' traces. With several policies, metric names carry the policy's."""
    config, reporter = study.config, study.reporter
    temperature = config.rollout.temperature
    rows = []
    dropped = 0
    for minibatch in minibatches(episodes, config.trainer.minibatches_per_step):
        traces = [trace for episode in minibatch for trace in traces_of(episode) if trace.role in policy.roles]
        kept = [trace for trace in traces if is_trainable(trace)]
        dropped += len(traces) - len(kept)
        if kept:
            rows.append(_packed(study, policy, kept))
    if config.trainer.minibatches_per_step > 1 or policy.reference is not None:
        with reporter.phase("score"):  # before the first update: all minibatches are scored by the policy that sampled them
            for batches in rows:
                _score_in_place(study, policy, batches, temperature)
    with reporter.phase("update", total=len(rows)):
        results = []
        for index, batches in enumerate(rows):
            results.append(update(policy.model, policy.optimizer, batches, algorithm=config.algorithm, temperature=temperature))
            reporter.advance(index + 1)
    if not results:
        raise RuntimeError(f"step {study.position.step}: policy {policy.name} has no trainable trace; every episode was excluded or empty.")
    merged = {name: sum(row[name] for row in results) / len(results) for name in results[0]}
    merged["sync/logprob_gap_max"] = max(row["sync/logprob_gap_max"] for row in results)
    merged["train/dropped_traces"] = float(dropped)
    if len(study.policies) == 1:
        return merged
    return {f"{name.split('/')[0]}/{policy.name}/{name.split('/', 1)[1]}": value for name, value in merged.items()}


def minibatches(episodes: Sequence[Episode], count: int) -> list[list[Episode]]:
    """Episodes split by whole prompts, dealt in turn, so that every minibatch holds whole groups."""
    order = {prompt_id: index for index, prompt_id in enumerate(dict.fromkeys(e.prompt.prompt_id for e in episodes))}
    parts: list[list[Episode]] = [[] for _ in range(count)]
    for episode in episodes:
        parts[order[episode.prompt.prompt_id] % count].append(episode)
    return parts


def _packed(study: Study, policy: Policy, traces: Sequence[Trace]):
    config = study.config
    return pack_for_rank(
        traces,
        aggregation=config.algorithm.aggregation,
        max_turns=config.rollout.max_rounds,
        microbatch_tokens=config.trainer.microbatch_tokens,
        groups=policy.model.groups,
    )


def _score_in_place(study: Study, policy: Policy, batches, temperature: float) -> None:
    if study.config.trainer.minibatches_per_step > 1:
        for batch, logprobs in zip(batches, score(policy.model, batches, temperature=temperature), strict=True):
            batch.old_logprobs = logprobs
    if policy.reference is not None:
        for batch, logprobs in zip(batches, score(policy.reference, batches, temperature=temperature), strict=True):
            batch.ref_logprobs = logprobs


def evaluate(study: Study) -> None:
    results = evaluate_sets(
        study.sets,
        study.config,
        rules=study.rules,
        chat=study.chat,
        engines=study.engines,
        verifier=study.verifier,
        reporter=study.reporter,
        step=study.position.step,
    )
    for result in results:
        study.folder.evaluation(asdict(result))
        study.reporter.say(
            f"evaluation at step {result.step}: {result.set} at temperature {result.temperature:g}: "
            f"accuracy {result.accuracy:.3f} [{result.low:.3f}, {result.high:.3f}]"
        )


def checkpoint(study: Study) -> None:
    keep = study.config.trainer.keep_checkpoints
    study.reporter.say(f"checkpoint: {state.save(study.folder.checkpoints, study.position, study.policies, keep=keep)}")


def explain(config: RunConfig, reporter: Reporter) -> None:
    """What the settings amount to, before the first token is sampled."""
    rollout, trainer, algorithm = config.rollout, config.trainer, config.algorithm
    updates = trainer.minibatches_per_step
    clip = (
        f"clip [{1 - algorithm.clip_low:g}, {1 + algorithm.clip_high:g}] on {algorithm.ratio_level} ratios"
        if updates > 1
        else "one update per rollout: the ratio is identically 1 and clipping never acts"
    )
    world = dist.get_world_size()
    replicas = world // (config.parallel.tensor * config.parallel.pipeline)
    reporter.say(
        f"{world} ranks: tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data {replicas}; "
        f"{world // config.engine.tensor} {config.engine.name} engines of {config.engine.tensor} rank(s) per policy"
    )
    reporter.say(
        f"{rollout.prompts_per_step} prompts x {rollout.episodes_per_prompt} episodes a step, {updates} update(s) per rollout; {clip}; "
        f"roles {', '.join(config.roles)}; policies {', '.join(config.agents.policies)} ({config.agents.schedule})"
    )


def alarm(study: Study, metrics: Mapping[str, float]) -> None:
    """Engine and trainer must agree on what was sampled: a gap means stale weights, another precision or a broken map."""
    threshold = study.config.engine.logprob_gap_alarm
    for name, value in metrics.items():
        if name.endswith("logprob_gap_max") and not value <= threshold:
            study.folder.alert(
                {"step": study.position.step, "alert": "logprob_gap", "metric": name, "value": value, "threshold": threshold}
            )
            study.reporter.say(
                f"ALERT step {study.position.step}: {name} is {value:.4g} nats, above engine.logprob_gap_alarm={threshold:g}"
            )


def finish(study: Study) -> None:
    """Rank 0 prints the evaluations side by side and writes the report."""
    if study.folder.writes:
        report = write_report(study.folder.path)
        rows = study.folder.read("evaluations.jsonl")
        study.reporter.console.print(table(rows, "evaluations (accuracy: answer right and dialogue finished)"))
        study.reporter.say(f"report: {Path(report)}")
    dist.barrier()


def _headline(metrics: Mapping[str, float]) -> str:
    return (
        f"reward {metrics.get('reward/mean', float('nan')):.3f}  finished {metrics.get('reward/finished_frac', float('nan')):.2f}  "
        f"{metrics['rollout/sampled_tokens_per_s']:.0f} tok/s  {metrics['time_s']:.1f} s"
    )
