"""ReMA RL, one step told in order: prompts, episodes, rewards, advantages, updates, weight sync.

Every rank runs this same program. Variants are data: which roles speak, which policy speaks for them, which is updated when.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.integrity.verdict import Response
from megatron_rema.planning.explain import settings
from megatron_rema.report.page import write_report
from megatron_rema.reward.assign import counterfactual_metrics, reward_metrics, set_apart
from megatron_rema.reward.behaviour import behaviour_metrics
from megatron_rema.reward.math_verifier import Judgement, VerifierPool
from megatron_rema.rollout.dataset import PromptStream
from megatron_rema.rollout.redaction import is_redacted
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.trainer import state
from megatron_rema.trainer.alarms import Alarms
from megatron_rema.trainer.bench import bench_of
from megatron_rema.trainer.cast import (
    Layouts,
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
from megatron_rema.trainer.constraint import constraint_of
from megatron_rema.trainer.credit import (
    assign_advantages,
    chosen_for_training,
    component_weights,
    group_by_prompt,
    informative_frac,
    inside,
    share_plan_rewards,
)
from megatron_rema.trainer.evaluation import evaluate_sets, show
from megatron_rema.trainer.faults import SkippedUpdates
from megatron_rema.trainer.guard import Guard
from megatron_rema.trainer.inputs import Inputs, Source
from megatron_rema.trainer.integrity import Monitor, monitor_of
from megatron_rema.trainer.learning import active_policies, train_policy
from megatron_rema.trainer.payment import Payment
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.study import Study
from megatron_rema.trainer.whitebox import scorer
from megatron_rema.types import Episode, Prompt, Verdict

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
                payment=Payment(config, reward_model, reporter),
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
    if responded(study).ends:
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
    payment, response, ladder = study.payment, responded(study), config.integrity.ladder.values()
    assigned, reward_model_metrics = payment.score(
        played, judgements, step=position.step, component_dropout=config.reward.component_dropout
    )
    position.par_references, shaping_metrics = payment.shape(
        assigned.scored, position.par_references, now=response.shaped, later=study.guard is not None and "shape" in ladder
    )
    shaping_metrics |= payment.veto(assigned.scored, response.gates)
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


def responded(study: Study) -> Response:
    """What audits so far have led to, in force now."""
    return study.monitor.response if study.monitor is not None else Response()


def watch(study: Study, monitor: Monitor, scored: Sequence[Episode], metrics: Mapping[str, float]) -> dict[str, float]:
    """Signals of the step and, when one is due, an audit of the policies as they are after it."""
    step = study.position.step
    found = monitor.observe(step, scored, metrics, study.payment.members)

    def pay(episodes: Sequence[Episode], judgements: Mapping[str, Judgement]) -> list[Episode]:
        paid = study.payment.score(episodes, judgements, step=step)[0].scored
        study.payment.veto(paid, monitor.response.gates)
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
    """What the last audit led to, as far as it is done once: gates and shaping are `responded`'s, step by step."""
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
