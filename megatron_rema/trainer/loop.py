"""ReMA RL, one step told in order: prompts, episodes, rewards, advantages, updates, weight sync.

Every rank runs this same program. Variants are data: which roles speak, which policy speaks for them, which is updated when.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_rema.algorithm.control import adapted_kl_coef
from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.models.policy import ParallelModel
from megatron_rema.planning.explain import settings
from megatron_rema.report.page import write_report
from megatron_rema.reward.assign import Assigned, assign, counterfactual_metrics, reward_metrics, set_apart
from megatron_rema.reward.behaviour import behaviour_metrics
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.gates import Gate, apply_gates, gates_of
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.reward.model_scorer import add_model_scores
from megatron_rema.reward.shaping import debias_length, noted_references, shape_by_references
from megatron_rema.rollout.dataset import PromptStream
from megatron_rema.rollout.dialogue import Chats, DialogueRules
from megatron_rema.rollout.redaction import is_redacted
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.rollout.traces import traces_of
from megatron_rema.trainer import state
from megatron_rema.trainer.alarms import Alarms
from megatron_rema.trainer.bench import bench_of
from megatron_rema.trainer.cast import (
    Layouts,
    Policy,
    build_engines,
    build_model,
    build_policies,
    chat_formats,
    choose_kernels,
    dialogue_rules,
    export_hf,
    process_group,
    rest,
    sync_weights,
    trained,
)
from megatron_rema.trainer.collect import play_everywhere
from megatron_rema.trainer.constraint import Constrain, constraint_of
from megatron_rema.trainer.credit import (
    assign_advantages,
    chosen_for_training,
    component_weights,
    generalized_advantages,
    group_by_prompt,
    informative_frac,
    inside,
    penalise_divergence,
    penalise_overlong,
    share_plan_rewards,
)
from megatron_rema.trainer.diagnosis import find_non_finite, tell_skipped
from megatron_rema.trainer.evaluation import evaluate_sets, show
from megatron_rema.trainer.experience import is_trainable, pack_for_rank
from megatron_rema.trainer.faults import SkippedUpdates
from megatron_rema.trainer.guard import Guard
from megatron_rema.trainer.inputs import Inputs, Source
from megatron_rema.trainer.integrity import Monitor, monitor_of
from megatron_rema.trainer.preference import episode_scores
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.scoring import label_logprobs, scalars
from megatron_rema.trainer.update import update_critic, update_policy
from megatron_rema.trainer.whitebox import heavy_tail, scorer
from megatron_rema.types import Engine, Episode, Prompt, Role, Trace, Verdict

# phase of a step -> its metric
_PHASES = {
    "generate": "rollout/generate_s",
    "verify": "reward/verify_s",
    "reward_model": "reward/model_s",
    "score": "experience/score_s",
    "update": "train/update_s",
    "sync": "sync/sync_s",
    "audit": "integrity/audit_s",
}


@dataclass
class Study:
    """One assembled run."""

    config: RunConfig
    policies: dict[str, Policy]
    reward_model: ParallelModel | None
    engines: dict[str, Engine]
    rules: DialogueRules
    constrain: Constrain
    chat: Chats
    stream: PromptStream
    sets: dict[str, list[Prompt]]
    verifier: VerifierPool
    folder: RunFolder
    checkpoints: state.Checkpoints
    reporter: Reporter
    position: state.Position
    skipped: SkippedUpdates
    alarms: Alarms
    monitor: Monitor | None = None
    guard: Guard | None = None
    members: dict[str, list[float]] = field(default_factory=dict)  # what each head of the reward model says of the step's episodes


def train(config: RunConfig, inputs: Inputs) -> None:
    """The ``train`` front door, its inputs read."""
    chat, rules = chat_formats(config), dialogue_rules(config)
    constrain = constraint_of(config, rules, chat, {name: arch.vocab_size for name, arch in inputs.architectures.items()})
    with process_group(config):
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        reporter, folder = Reporter(speaks=first), RunFolder(config.run_dir, writes=first, private=config.private_run_dir)
        explain(config, reporter)
        reporter.say(choose_kernels(config))
        total_steps = config.trainer.token_budget or config.trainer.steps * config.trainer.minibatches_per_step
        layouts = Layouts()
        with reporter.phase("build models"):
            policies = build_policies(config, inputs.architectures, layouts, total_steps=max(total_steps, 1), with_others=True)
            reward_model = None
            if inputs.reward_model is not None:
                layout = config.parallel.layout("reward_model")
                reward_model = build_model(config, inputs.reward_model, config.reward.model_path, layout, layouts, trainable=False)
        with reporter.phase("restore"):
            position = state.restore(
                config, trained(policies), folder, Source.of("task.train_file", config.task.train_file, inputs.prompts)
            )
            rest(policies, reward_model)
        if position.step:
            reporter.say(f"resumed at step {position.step}")
        folder.write_config(as_mapping(config))
        reporter.say("starting engines")
        with reporter.phase("start engines"):
            engines = build_engines(config)
        with VerifierPool(config.reward.verifier_processes, config.reward.verifier_timeout_s) as verifier:
            study = Study(
                config=config,
                policies=policies,
                reward_model=reward_model,
                engines=engines,
                rules=rules,
                constrain=constrain,
                chat=chat,
                stream=PromptStream(inputs.prompts, config.seed),
                sets=inputs.evaluation_sets or {},
                verifier=verifier,
                folder=folder,
                checkpoints=state.checkpoints_of(config, folder),
                reporter=reporter,
                position=position,
                skipped=SkippedUpdates(config.trainer.max_skipped_updates),
                alarms=Alarms(config, folder, reporter),
                monitor=monitor_of(config, inputs.prompts, folder, reporter, position.step),
                guard=Guard(config.integrity, folder, step=position.step) if config.integrity.mode == "guard" else None,
            )
            run(study)
        for engine in engines.values():
            engine.close()


def run(study: Study) -> None:
    """All steps that are left, with evaluations and checkpoints in between, and the report."""
    config, position, reporter = study.config, study.position, study.reporter
    trainer = config.trainer
    with reporter.phase("sync"):
        sync_weights(study.policies, study.engines, position.weight_version)
    if position.step == 0:
        evaluate(study)
    with reporter.run("train", total=trainer.steps, done=position.step), study.checkpoints.finished():
        while not is_over(study):
            metrics = step(study)
            study.folder.metrics(metrics)
            reporter.step_done(position.step, _headline(metrics))
            last = is_over(study)
            if last or (trainer.evaluate_every and position.step % trainer.evaluate_every == 0):
                evaluate(study)
            if last or (trainer.checkpoint_every and position.step % trainer.checkpoint_every == 0):
                checkpoint(study)
            else:
                study.checkpoints.finish_pending(wait=False)
        with reporter.phase("checkpoint"):
            study.checkpoints.finish_pending()
    if trainer.save_hf:  # by a run that has no step left too: the one before it may have ended half-way through
        with reporter.phase("export"):
            paths = export_hf(study.policies, study.folder.path / "hf")
        for path in paths:
            reporter.say(f"policy exported: {path}")
    finish(study)


def is_over(study: Study) -> bool:
    position, trainer = study.position, study.config.trainer
    if study.monitor is not None and study.monitor.response.ends:
        return True
    return position.step >= trainer.steps or 0 < trainer.token_budget <= position.sampled_tokens


def step(study: Study) -> dict[str, float]:
    """One rollout and the optimizer steps on it. Returns the step's metrics, equal on every rank."""
    config, position, reporter = study.config, study.position, study.reporter
    begin = time.perf_counter()
    reporter.begin_step(position.step + 1)
    prompts, played, judgements = draw(study)
    sampled = sampled_tokens(played)
    position.sampled_tokens += sampled
    for engine in study.engines.values():
        engine.sleep()
    assigned = reward(study, played, judgements, component_dropout=config.reward.component_dropout)
    reward_model_metrics = score_with_reward_model(study, assigned.scored)
    shaping_metrics = shape(study, assigned.scored) | apply_gates(assigned.scored, gates_in_force(study))
    assigned, counterfactual = set_apart(assigned)
    share_plan_rewards(assigned.scored, scheme=config.reward.scheme)
    chosen = chosen_for_training(assigned.scored, config.rollout)
    if config.algorithm.advantage != "gae":  # a critic's advantages are per token: see score
        position.baselines = assign_advantages(
            chosen,
            config.roles,
            config.algorithm,
            position.baselines,
            counterfactuals=counterfactual.scored,
            weights=component_weights(config.reward),
        )

    metrics: dict[str, float] = {
        "rollout/prompts_chosen_frac": len(group_by_prompt(chosen)) / len(prompts),
        "rollout/prompts_informative_frac": informative_frac(chosen),
    }
    for policy in active_policies(study) if chosen else []:
        metrics |= train_policy(study, policy, chosen)
    position.step += 1
    position.prompts_taken += len(prompts)
    with reporter.phase("sync"):
        position.weight_version += 1
        for engine in study.engines.values():
            engine.wake()
        sync_weights(study.policies, study.engines, position.weight_version)

    if study.folder.writes:
        study.folder.episodes(position.step, (episode.to_json() for episode in played))
    episodes = [episode for episode in played if not episode.is_counterfactual]
    metrics |= (
        reward_metrics(assigned, judgements) | reward_model_metrics | shaping_metrics | counterfactual_metrics(assigned, counterfactual)
    )
    metrics |= behaviour_metrics(episodes, config.task.finish_marker, json_actions=config.task.json_actions)
    metrics |= {name: reporter.seconds.get(phase, 0.0) for phase, name in _PHASES.items()}
    metrics |= {
        "rollout/episodes": len(episodes),
        "rollout/sampled_tokens": sampled,
        "rollout/sampled_tokens_total": position.sampled_tokens,
        "rollout/sampled_tokens_per_s": sampled / reporter.seconds["generate"],
        "rollout/prompts_taken": position.prompts_taken,
    }
    if config.rollout.redact_plan_prob:
        hidden = [is_redacted(config.seed, episode.episode_id, config.rollout.redact_plan_prob) for episode in episodes]
        metrics["rollout/plan_redacted_frac"] = sum(hidden) / max(len(hidden), 1)
    study.alarms.look(position.step, metrics)
    if study.monitor is not None:
        metrics |= watch(study, study.monitor, assigned.scored, metrics)
    return {"step": position.step, "weight_version": position.weight_version, "time_s": time.perf_counter() - begin, **metrics}


def reward(study: Study, episodes: Sequence[Episode], judgements: Mapping[str, Judgement], *, component_dropout: float = 0.0) -> Assigned:
    """What training pays for episodes, but for a reward model's score, shaping and the gates, which come after it."""
    settings, rollout = study.config.reward, study.config.rollout
    assigned = assign(
        episodes,
        judgements,
        scheme=settings.scheme,
        mask_unfinished_reward=settings.mask_unfinished_reward,
        function=named_function("reward.function", settings.function) if settings.function else None,
        weights=settings.weights,
        component_dropout=component_dropout,
        step=study.position.step,
    )
    penalise_overlong(assigned.scored, buffer_tokens=settings.overlong_buffer_tokens, max_tokens=rollout.max_episode_tokens)
    return assigned


def gates_in_force(study: Study) -> list[Gate]:
    """The configured ones, and those that audits have led to."""
    found = study.monitor.response.gates if study.monitor is not None else ()
    return gates_of([*dict.fromkeys((*study.config.reward.gates, *found))])


def shape(study: Study, episodes: Sequence[Episode]) -> dict[str, float]:
    """What is done to whole rewards before episodes are compared. Audits see rewards without it: they play one episode a problem."""
    settings, integrity, position = study.config.reward, study.config.integrity, study.position
    debias_length(episodes, coefficient=settings.length_debias)
    shaped = settings.shaping == "par" or (study.monitor is not None and study.monitor.response.shaped)
    if shaped or (integrity.mode == "guard" and "shape" in integrity.ladder.values()):  # which may ask for them later
        position.par_references = noted_references(episodes, position.par_references, count=settings.par_references)
    return shape_by_references(episodes, position.par_references) if shaped else {}


def watch(study: Study, monitor: Monitor, scored: Sequence[Episode], metrics: Mapping[str, float]) -> dict[str, float]:
    """Signals of the step and, when one is due, an audit of the policies as they are after it."""
    step = study.position.step
    found = monitor.observe(step, scored, metrics, study.members)

    def pay(episodes: Sequence[Episode], judgements: Mapping[str, Judgement]) -> list[Episode]:
        paid = reward(study, episodes, judgements).scored
        score_with_reward_model(study, paid)
        apply_gates(paid, gates_in_force(study))
        return paid

    tokens = study.config.trainer.microbatch_tokens
    score = scorer(study.policies, study.engines, study.rules, study.constrain, microbatch_tokens=tokens)
    bench = bench_of(study.config, study.rules, study.chat, study.policies, study.engines, study.verifier, pay, score)
    if monitor.is_due(step, bench):
        with study.reporter.phase("audit"):
            found |= monitor.audit(step, bench, study.guard.steps() if study.guard is not None else ())
            if study.guard is not None:
                obey(study, study.guard, monitor)
        found["integrity/audit_s"] = study.reporter.seconds["audit"]
    return found


def obey(study: Study, guard: Guard, monitor: Monitor) -> None:
    """What the last audit led to, as far as it is done once: gates and shaping are `reward`'s business."""
    back_to, position = monitor.response.back_to, study.position
    if monitor.is_clean:
        guard.keep(position, trained(study.policies))
    elif back_to is not None:
        guard.roll_back(back_to, position, trained(study.policies))
        position.weight_version += 1
        sync_weights(study.policies, study.engines, position.weight_version)


def sampled_tokens(episodes: Sequence[Episode]) -> int:
    """A plan that several episodes share was sampled once, by the episode that has no ``plan_of`` (as played: credit may name another)."""
    shared = sum(len(episode.turns[0].completion.token_ids) for episode in episodes if episode.plan_of is not None and episode.turns)
    return sum(episode.num_sampled_tokens for episode in episodes) - shared


def draw(study: Study) -> tuple[list[Prompt], list[Episode], dict[str, Judgement]]:
    """Play the step's prompts; with ``rollout.max_draws`` > 1 draw more until ``prompts_per_step`` of them are worth training on.

    Counterfactual episodes are played with them and have no say in what is worth it.
    """
    config, position = study.config, study.position
    rollout = config.rollout
    per_prompt = rollout.episodes_per_prompt + study.rules.num_counterfactuals
    rules = replace(study.rules, redact_plan_prob=rollout.redact_plan_prob)  # evaluations and audits hear what was said
    prompts: list[Prompt] = []
    episodes: list[Episode] = []
    judgements: dict[str, Judgement] = {}
    for _ in range(rollout.max_draws):
        prompts += study.stream.take(position.prompts_taken + len(prompts), rollout.prompts_per_step)
        played, judged = play_everywhere(
            starts_of(prompts, per_prompt)[len(episodes) :],  # a prompt drawn twice gets episodes of other numbers
            rules=rules,
            chat=study.chat,
            engines=study.engines,
            engine_tensor=config.engine.tensor,
            verifier=study.verifier,
            seed=config.seed,
            step=position.step,
            reporter=study.reporter,
        )
        episodes += played
        judgements |= judged
        known = [e for e in episodes if not e.is_counterfactual and judgements[e.episode_id].verdict is not Verdict.UNKNOWN]
        right = {episode.episode_id: float(judgements[episode.episode_id].verdict is Verdict.CORRECT) for episode in known}
        if len(inside(known, right, rollout)) >= rollout.prompts_per_step:
            break
    return prompts, episodes, judgements


def score_with_reward_model(study: Study, episodes: Sequence[Episode]) -> dict[str, float]:
    """Add the reward model's scores to the episodes' rewards, where there is one."""
    reward = study.config.reward
    if study.reward_model is None:
        return {}
    with study.reporter.phase("reward_model"):
        views = {e.episode_id: trace for e in episodes for trace in traces_of(e) if trace.role is Role.REASONING}
        scores = episode_scores(study.reward_model, list(views.values()), microbatch_tokens=study.config.trainer.microbatch_tokens)
    study.members = dict(zip(views, scores, strict=True))
    return add_model_scores(
        episodes,
        study.members,
        weight=reward.model_weight,
        ensemble=reward.model_ensemble,
        coefficient=reward.model_ensemble_coef,
        mask_unfinished_reward=reward.mask_unfinished_reward,
    )


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


def evaluate(study: Study) -> None:
    with study.reporter.phase("evaluate"):
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
    with study.reporter.phase("checkpoint"):
        target = study.checkpoints.save(study.position, trained(study.policies))
    study.reporter.say(f"checkpoint: {target}")


def explain(config: RunConfig, reporter: Reporter) -> None:
    """What the settings amount to, before the first token is sampled; ``explain=true`` says more and starts nothing."""
    for line in settings(config, dist.get_world_size()):
        reporter.say(line)


def finish(study: Study) -> None:
    """Rank 0 prints the evaluations side by side and writes the report."""
    with study.reporter.phase("report"):
        if study.folder.writes:
            report = write_report(study.folder.path)
            rows = study.folder.read("evaluations.jsonl")
            show(study.reporter.console, rows, "evaluations (accuracy: answer right and dialogue finished)")
            study.reporter.say(f"report: {Path(report)}")
        dist.barrier()


def _headline(metrics: Mapping[str, float]) -> str:
    return (
        f"reward {metrics.get('reward/mean', float('nan')):.3f}  finished {metrics.get('reward/finished_frac', float('nan')):.2f}  "
        f"{metrics['rollout/sampled_tokens_per_s']:.0f} tok/s  {metrics['time_s']:.1f} s"
    )
