"""What the settings of a run amount to, in sentences: said by a run before its first token, and alone by ``explain=true`` on any laptop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_rema.config import RunConfig
from megatron_rema.planning.hardware import CPU, GIB, Assumptions, Runtime
from megatron_rema.planning.job import PHASES, Job, binding, kv_bytes_per_token, phase_memory
from megatron_rema.planning.memory import total
from megatron_rema.planning.shapes import architecture

PHASES_OF = {"train": PHASES, "sft": ("update",), "evaluate": ("generate",), "train_reward_model": ("update",)}  # by front door


def settings(config: RunConfig, world: int) -> list[str]:
    """Who trains where, on how much, and whether the clip can act: what every training run says first."""
    rollout, trainer, algorithm = config.rollout, config.trainer, config.algorithm
    updates = trainer.minibatches_per_step
    clip = (
        f"clip [{1 - algorithm.clip_low:g}, {1 + algorithm.clip_high:g}] on {algorithm.ratio_level} ratios"
        if updates > 1
        else "one update per rollout: the ratio is identically 1 and clipping never acts"
    )
    models = ["actor"] + ["critic"] * (algorithm.advantage == "gae") + ["reference"] * algorithm.needs_reference
    models += ["reward_model"] * (config.reward.model_path is not None)
    return [
        f"{world} ranks: {', '.join(_cut(config, model, world) for model in models)}; "
        f"{world // config.engine.tensor} {config.engine.name} engines of {config.engine.tensor} rank(s) per policy",
        f"{rollout.prompts_per_step} prompts x {rollout.episodes_per_prompt} episodes a step, {updates} update(s) per rollout; {clip}; "
        f"credit by {algorithm.credit}; roles {', '.join(config.roles)}; policies {', '.join(config.agents.policies)} "
        f"({config.agents.schedule})",
    ]


def everything(config: RunConfig, world: int, door: str) -> list[str]:
    """Every derived number of the front door ``door``. Reads each model's config.json, or takes a built-in shape's name for its path.

    Raises ValueError where a model cannot be read or cut so.
    """
    job = job_of(config, door)
    job.check(world)
    if door == "train":
        lines = [*settings(config, world), *_rollout(config, job, world), *_updates(config, job, world), *_clip(config)]
    elif door == "evaluate":
        lines = [*_evaluation(config, world)]
    else:
        lines = _supervised(config, job, world, door)
    return lines + memory(job, world, PHASES_OF[door])


def job_of(config: RunConfig, door: str) -> Job:
    """The models that ``door`` builds, and their shapes."""
    if door == "train_reward_model":
        job = Job.of_reward_model(config, architecture(config.model.path).with_scalar_head(config.reward_model.heads))
        return _one_batch(job, config)
    archs = {name: architecture(config.model_path(name)) for name in config.agents.policies}
    reward_model = None
    if door == "train" and config.reward.model_path is not None:
        reward_model = architecture(config.reward.model_path)
    job = Job.of(config, archs, reward_model)
    if door == "evaluate":
        return replace(job, has_models=False)
    return job if door == "train" else _one_batch(job.policies_alone(), config)


def _one_batch(job: Job, config: RunConfig) -> Job:
    """Supervised steps: each dialogue, or pair, once."""
    batch = replace(job.batch, prompts=config.trainer.global_batch_dialogues, episodes_per_prompt=1, minibatches=1)
    return replace(job, batch=batch)


def memory(job: Job, world: int, phases: Sequence[str] = PHASES) -> list[str]:
    """GiB of the fullest rank, phase by phase, under both kinds of runtime; all token budgets used up."""
    lines = []
    kinds = {"GPU (vLLM asleep outside its phase, fused Adam, allowances included)": Runtime.cuda(Assumptions()), "CPU": CPU}
    for kind, runtime in kinds.items():
        held = {phase: parts for phase, parts in phase_memory(job, world, runtime).items() if phase in phases}
        shown = ", ".join(f"{phase} {_gib(total(held[phase]))}" for phase in phases)
        most = binding(held)
        parts = sorted(held[most].items(), key=lambda item: -item[1])
        purposes = ", ".join(f"{name} {_gib(value)}" for name, value in parts if value >= 0.005 * total(held[most]))
        lines.append(f"memory of the fullest rank, GiB, {kind}: {shown}; most in {most}: {purposes}")
    return lines


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}" if value >= GIB / 10 else f"{value / GIB:.4f}"


def _cut(config: RunConfig, model: str, world: int) -> str:
    layout = config.parallel.layout(model)
    return f"{model} tensor {layout.tensor} x pipeline {layout.pipeline} x data {world // (layout.tensor * layout.pipeline)}"


def _rollout(config: RunConfig, job: Job, world: int) -> list[str]:
    batch, engine = job.batch, config.engine
    replicas = world // engine.tensor
    context_bytes = {name: kv_bytes_per_token(agent.arch, job.engine) * batch.context_tokens for name, agent in job.agents.items()}
    held = ", ".join(f"{int(job.engine.kv_cache_gib * GIB / one)} whole contexts of {name}" for name, one in context_bytes.items())
    least = math.ceil(max(context_bytes.values()) / (1 << 20))
    if least > engine.kv_cache_mib:
        held += f": raise engine.kv_cache_mib ({engine.kv_cache_mib}) to at least {least}"
    played = f"{batch.prompts} prompts x {batch.episodes_per_prompt} episodes"
    if batch.counterfactuals_per_prompt:
        played += f" and {batch.counterfactuals_per_prompt} counterfactual ones"
    if batch.draws > 1:
        played += f", at most {batch.draws} draws"
    steps, budget = config.trainer.steps, config.trainer.token_budget
    end = f", ended by token_budget {budget:,}" if budget else ""
    return [
        f"rollout: {played} = at most {batch.played_episodes:,} episodes a step; at most {batch.turns_per_episode} turns each "
        f"({batch.rounds} rounds x {batch.roles} role(s)) of {batch.turn_tokens:,} tokens, {batch.sampled_tokens_per_episode:,} in all",
        f"tokens: at most {batch.sampled_tokens:,} sampled a step, {batch.sampled_tokens * steps:,} in {steps:,} steps{end}",
        f"engines: each of {replicas} plays about {-(-batch.played_episodes // (batch.draws * replicas)):,} episodes of a draw, at most "
        f"{engine.max_num_seqs} turns at a time; its cache holds {held}",
    ]


def _updates(config: RunConfig, job: Job, world: int) -> list[str]:
    lines = []
    batch, alternating = job.batch, config.agents.schedule == "alternating"
    learners = [model for model in job.models if model.trainable]
    for model in learners:
        data = world // (model.layout.tensor * model.layout.pipeline)
        traces = batch.episodes * model.roles
        an_update = traces / batch.minibatches
        number, tokens = batch.microbatches(data, roles=model.roles), batch.longest_microbatch(data, roles=model.roles)
        lines.append(
            f"{model.kind} {model.name.removesuffix(' critic')}: at most {traces:,} traces of {batch.trace_tokens:,} tokens a step, "
            f"{an_update:,.10g} an update, {an_update / data:,.10g} on each of {data} data-parallel rank(s): {number:,} microbatch(es) of "
            f"{tokens:,} tokens"
        )
    policies = sum(model.kind == "policy" for model in learners)
    share = policies if alternating else 1
    each = config.trainer.steps * batch.minibatches // share
    turn = f", one policy for {config.agents.alternate_every} steps at a time" if alternating else ""
    return [*lines, f"updates: {batch.minibatches} per rollout, {each:,} of each policy in {config.trainer.steps:,} steps{turn}"]


def _clip(config: RunConfig) -> list[str]:
    algorithm, updates = config.algorithm, config.trainer.minibatches_per_step
    if updates == 1:
        return ["clip: cannot act, at any setting: raise trainer.minibatches_per_step above 1 for it to matter"]
    return [
        f"clip: cannot act in the first of {updates} updates of a rollout, whose ratio is 1; in the others a {algorithm.ratio_level} ratio "
        f"above {1 + algorithm.clip_high:g} with a positive advantage, or below {1 - algorithm.clip_low:g} with a negative one, gives no "
        f"gradient, and one above {algorithm.dual_clip:g} with a negative one neither; log-ratios stop at +-{algorithm.log_ratio_cap:g}"
    ]


def _evaluation(config: RunConfig, world: int) -> list[str]:
    trainer = config.trainer
    samples = sum(trainer.evaluation_samples if temperature > 0 else 1 for temperature in trainer.evaluation_temperatures)
    problems = f"at most {trainer.evaluation_problems:,}" if trainer.evaluation_problems else "all"
    return [
        f"{world} ranks: {world // config.engine.tensor} {config.engine.name} engines of {config.engine.tensor} rank(s) per policy",
        f"evaluation: {problems} problems of each of {len(config.task.evaluation_files)} set(s), {samples} dialogue(s) a problem over "
        f"temperatures {', '.join(f'{t:g}' for t in trainer.evaluation_temperatures)}",
    ]


def _supervised(config: RunConfig, job: Job, world: int, door: str) -> list[str]:
    trainer = config.trainer
    kind, what = ("actor", "dialogues") if door == "sft" else ("reward_model", "pairs")
    layout = config.parallel.layout(kind)
    data = world // (layout.tensor * layout.pipeline)
    views = len(config.roles) if door == "sft" else 2
    return [
        f"{world} ranks: {_cut(config, kind, world)}",
        f"batch: {trainer.global_batch_dialogues:,} {what} an optimizer step, {views} view(s) each: "
        f"{trainer.global_batch_dialogues * views / data:,.10g} views on each of {data} data-parallel rank(s), in microbatches of at most "
        f"{trainer.microbatch_tokens:,} tokens",
        f"updates: {trainer.steps:,} steps, {trainer.steps * trainer.global_batch_dialogues:,} {what}",
    ]
