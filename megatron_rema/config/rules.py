"""Rules between keys, applied before any model is built. Each message names field, value, rule and remedy."""

from __future__ import annotations

from pathlib import Path

from megatron_rema.config.keys import ConfigError, RunConfig
from megatron_rema.reading import brief
from megatron_rema.types import Role


def check(config: RunConfig, world_size: int) -> None:
    """Rules between fields that need no model: raises ConfigError. Model rules are ``Architecture.check_layout``'s."""
    _check_layout(config, world_size)
    _check_agents(config)
    _check_templates(config)
    _check_objective(config)
    _check_credit(config)
    _check_mitigations(config)
    _check_plans(config)
    _check_budgets(config)
    _check_integrity(config)


def _check_layout(config: RunConfig, world_size: int) -> None:
    for model in ("actor", "critic", "reward_model", "reference"):
        layout = config.parallel.layout(model)
        tensor, pipeline = layout.tensor, layout.pipeline
        if world_size % (tensor * pipeline):
            raise ConfigError(
                f"parallel.{model}.tensor ({tensor}) * parallel.{model}.pipeline ({pipeline}) must divide world_size ({world_size}); "
                f"got remainder {world_size % (tensor * pipeline)}: launch with torchrun --nproc-per-node {tensor * pipeline} "
                "(or a multiple), or lower them."
            )
        if layout.sequence_parallel and tensor == 1:
            raise ConfigError(
                f"parallel.{model}.sequence_parallel is true with parallel.{model}.tensor 1; it needs at least 2: turn it off."
            )
    if world_size % config.engine.tensor:
        raise ConfigError(
            f"engine.tensor ({config.engine.tensor}) must divide world_size ({world_size}); "
            f"got remainder {world_size % config.engine.tensor}: lower it or start more ranks."
        )


def _check_agents(config: RunConfig) -> None:
    policies = config.agents.policies
    owner: dict[Role, str] = {}
    for name, policy in policies.items():
        for role in policy.roles:
            if role in owner:
                raise ConfigError(f"role {role} belongs to policies {owner[role]} and {name}; give each role to one policy.")
            owner[role] = name
    if Role.REASONING not in owner:
        raise ConfigError("no policy speaks for 'reasoning', which gives the answer; add it to one policy's roles.")
    for role in config.roles:
        if role not in config.task.system_prompts:
            raise ConfigError(f"task.system_prompts has no entry for role {role}; add task.system_prompts.{role}=TEXT.")
    if config.task.json_actions and Role.META_THINKING not in owner:
        raise ConfigError("task.json_actions is true where nobody speaks for 'meta_thinking', whose messages they are: set it to false.")
    if not any(policy.trainable for policy in policies.values()):
        raise ConfigError(f"no policy is trainable ({', '.join(policies)}); set agents.policies.NAME.trainable=true for at least one.")
    if config.agents.schedule == "alternating" and len(policies) < 2:
        raise ConfigError("agents.schedule is 'alternating' with one policy; use agents=separate or agents.schedule=simultaneous.")


def _check_templates(config: RunConfig) -> None:
    """Whoever judges must be shown what it judges."""
    name = "reasoner_template" if config.roles == tuple(Role) else "solo_template"
    template = getattr(config.task, name)
    for key in config.task.fields:
        if f"{{{key}}}" not in template:
            raise ConfigError(
                f"task.{name} is {template!r} with task.kind {config.task.kind}; it must hold {{{key}}}, or the reasoner never sees it: "
                "add it, or use a task of that kind (task=judge)."
            )


def _check_objective(config: RunConfig) -> None:
    algorithm = config.algorithm
    if algorithm.dual_clip <= 1 + algorithm.clip_high:
        raise ConfigError(
            f"algorithm.dual_clip ({algorithm.dual_clip}) must exceed 1 + algorithm.clip_high ({1 + algorithm.clip_high}), "
            "or it would clip what the first clip lets through: raise it."
        )
    if algorithm.reward_kl_coef > 0 and algorithm.advantage != "gae":
        raise ConfigError(
            f"algorithm.reward_kl_coef is {algorithm.reward_kl_coef} with algorithm.advantage={algorithm.advantage}; a reward per token "
            "needs algorithm.advantage=gae: use algorithm.kl_coef, a term of the loss, instead."
        )
    actor, reference = config.parallel.actor, config.parallel.layout("reference")
    if algorithm.needs_reference and algorithm.kl_estimator == "exact" and (reference.tensor, reference.pipeline) != (actor.tensor, 1):
        raise ConfigError(
            f"algorithm.kl_estimator is exact with parallel.reference.tensor {reference.tensor} and pipeline {reference.pipeline}; the "
            f"reference runs where the loss is computed, in one stage, its vocabulary cut over tensor {actor.tensor} as the actor's: set "
            f"parallel.reference={{tensor:{actor.tensor},pipeline:1}}, or use k3."
        )
    if config.reward_model.bootstrap and config.reward_model.heads < 2:
        raise ConfigError(
            f"reward_model.bootstrap is true with reward_model.heads {config.reward_model.heads}; resampling makes heads differ and needs "
            "at least 2: raise heads or turn it off."
        )
    if algorithm.kl_target_nats is not None and algorithm.kl_coef == 0:
        raise ConfigError(
            f"algorithm.kl_target_nats is {algorithm.kl_target_nats} with algorithm.kl_coef 0, which no factor changes: set kl_coef to "
            "where the controller begins."
        )
    if algorithm.kl_coef > 0 and algorithm.kl_estimator == "k1":
        raise ConfigError(
            f"algorithm.kl_estimator is k1 with algorithm.kl_coef {algorithm.kl_coef}; as a loss its expected gradient is 0 and it holds "
            "nothing back: use k2 or k3 (k1 is a metric at kl_coef=0)."
        )


def _check_credit(config: RunConfig) -> None:
    """Counterfactual credit is defined where a plan is all that the meta-thinker says, and one answer all that follows from it."""
    algorithm, rollout = config.algorithm, config.rollout
    if algorithm.credit == "outcome":
        return
    name = f"algorithm.credit is {algorithm.credit}"
    if config.roles != tuple(Role):
        raise ConfigError(f"{name} where nobody plans; it needs both roles: set algorithm.credit=outcome.")
    if rollout.max_rounds > 1 or config.task.finish_marker is not None:
        raise ConfigError(
            f"{name} with rollout.max_rounds {rollout.max_rounds} and task.finish_marker {config.task.finish_marker!r}; whoever takes a "
            "first plan away cannot say how later plans, or who says finish, would follow: set max_rounds=1 and task.finish_marker=null."
        )
    if algorithm.advantage == "gae":
        raise ConfigError(
            f"{name} with algorithm.advantage=gae; a critic is the baseline there, of both roles and token by token: use another advantage "
            "or algorithm.credit=outcome."
        )
    if rollout.samples_per_plan > 1:
        raise ConfigError(
            f"{name} with rollout.samples_per_plan {rollout.samples_per_plan}; the difference is taken between one answer and its "
            "counterfactuals: set samples_per_plan=1."
        )
    if config.reward.scheme == "consistency":
        raise ConfigError(
            f"{name} with reward.scheme=consistency; answers that follow no plan, or different ones, have no plan to agree on: "
            "use reward=outcome or base."
        )
    if algorithm.credit == "swapped" and algorithm.counterfactual_samples >= rollout.episodes_per_prompt:
        raise ConfigError(
            f"algorithm.counterfactual_samples ({algorithm.counterfactual_samples}) must be below rollout.episodes_per_prompt "
            f"({rollout.episodes_per_prompt}) with algorithm.credit=swapped; each takes the plan of another episode of the prompt: "
            "lower it."
        )


def _check_mitigations(config: RunConfig) -> None:
    if "plan_leak" in config.reward.gates and config.roles != tuple(Role):
        raise ConfigError("reward.gates holds plan_leak where nobody plans; it needs both roles: remove it.")
    if config.rollout.redact_plan_prob > 0 and config.roles != tuple(Role):
        raise ConfigError(
            f"rollout.redact_plan_prob is {config.rollout.redact_plan_prob} where nobody plans; it needs both roles: set it to 0."
        )
    if config.reward.component_dropout > 0 and config.reward.function is None:
        raise ConfigError(
            f"reward.component_dropout is {config.reward.component_dropout} without reward.function, whose components it drops: set 0."
        )
    if config.algorithm.advantage_components == "sum":
        return
    name = "algorithm.advantage_components is normalised"
    if config.algorithm.advantage != "grpo":
        raise ConfigError(f"{name} with algorithm.advantage={config.algorithm.advantage}; it is grpo by component: set advantage=grpo.")
    if config.reward.shaping == "par":
        raise ConfigError(f"{name} with reward.shaping=par, which shapes the sum that is not looked at then: use one of them.")
    if config.integrity.mode == "guard" and "shape" in config.integrity.ladder.values():
        raise ConfigError(f"{name} with shape in integrity.ladder, which shapes the sum that is not looked at then: use another action.")
    if config.rollout.samples_per_plan > 1 or config.reward.scheme == "consistency":
        raise ConfigError(
            f"{name} with rollout.samples_per_plan {config.rollout.samples_per_plan}; what a plan shares with other answers is no part "
            "of its own: set samples_per_plan=1, or advantage_components=sum."
        )


def _check_plans(config: RunConfig) -> None:
    rollout, answers = config.rollout, config.rollout.samples_per_plan
    if config.reward.scheme == "consistency" and answers == 1:
        raise ConfigError(
            "reward.scheme is consistency with rollout.samples_per_plan 1; agreement needs 2 answers to a plan: raise samples_per_plan."
        )
    if answers == 1:
        return
    if config.roles != tuple(Role):
        raise ConfigError(f"rollout.samples_per_plan is {answers} where nobody plans; it needs both roles: set it to 1.")
    if rollout.max_rounds > 1:
        raise ConfigError(
            f"rollout.samples_per_plan is {answers} with rollout.max_rounds {rollout.max_rounds}; a plan's worth is the mean over its "
            "answers where the plan is all that the meta-thinker says: set max_rounds=1."
        )
    if rollout.episodes_per_prompt % answers:
        raise ConfigError(
            f"rollout.samples_per_plan ({answers}) must divide rollout.episodes_per_prompt ({rollout.episodes_per_prompt}); "
            f"got remainder {rollout.episodes_per_prompt % answers}: change one."
        )
    if rollout.episodes_per_prompt == answers and config.algorithm.advantage in ("grpo", "dr_grpo", "rloo"):
        raise ConfigError(
            f"rollout.episodes_per_prompt ({rollout.episodes_per_prompt}) holds one plan of {answers} answers; algorithm.advantage="
            f"{config.algorithm.advantage} compares plans of one prompt and needs at least 2: raise episodes_per_prompt."
        )


def _check_integrity(config: RunConfig) -> None:
    integrity = config.integrity
    if integrity.paraphrase is not None and Role.META_THINKING not in config.roles:
        raise ConfigError(
            f"integrity.paraphrase is {integrity.paraphrase!r} where nobody plans; it says a plan otherwise: set it to null, or give both "
            "roles."
        )
    if integrity.cross_play and (len(config.agents.policies) < 2 or not config.algorithm.needs_reference):
        raise ConfigError(
            f"integrity.cross_play is true with policies {', '.join(config.agents.policies)} and algorithm.kl_coef "
            f"{config.algorithm.kl_coef}; one role speaks with its reference's weights while the other does not: it needs agents=separate "
            "and algorithm.kl_coef > 0, or turn it off."
        )


def _check_budgets(config: RunConfig) -> None:
    rollout, trainer = config.rollout, config.trainer
    if rollout.success_low > rollout.success_high:
        raise ConfigError(
            f"rollout.success_low ({rollout.success_low}) exceeds rollout.success_high ({rollout.success_high}); no prompt would be left: "
            "swap them."
        )
    if config.reward.overlong_buffer_tokens > rollout.max_episode_tokens:
        raise ConfigError(
            f"reward.overlong_buffer_tokens ({config.reward.overlong_buffer_tokens}) exceeds rollout.max_episode_tokens "
            f"({rollout.max_episode_tokens}), the budget whose end it softens: lower it."
        )
    if trainer.microbatch_tokens < rollout.max_context_tokens:
        raise ConfigError(
            f"trainer.microbatch_tokens ({trainer.microbatch_tokens}) must hold the longest trace, "
            f"rollout.max_context_tokens ({rollout.max_context_tokens}): raise the first or lower the second."
        )
    if rollout.top_p < 1 or rollout.temperature == 0:
        raise ConfigError(
            f"rollout.top_p ({rollout.top_p}) < 1 or rollout.temperature ({rollout.temperature}) = 0: the sampled distribution would not "
            "be the trained one; train with top_p=1 and temperature > 0 (trainer.evaluation_temperatures may hold 0)."
        )
    if rollout.episodes_per_prompt < 2 and config.algorithm.advantage in ("grpo", "dr_grpo", "rloo"):
        raise ConfigError(
            f"rollout.episodes_per_prompt is {rollout.episodes_per_prompt}; algorithm.advantage={config.algorithm.advantage} compares "
            "episodes of one prompt and needs at least 2."
        )
    if trainer.token_budget > 0 and config.optimizer.warmup_steps > 0:
        raise ConfigError(
            f"optimizer.warmup_steps is {config.optimizer.warmup_steps} with trainer.token_budget {trainer.token_budget}; the schedule "
            "then runs over sampled tokens and has no warm-up in steps: set warmup_steps=0."
        )
    if rollout.prompts_per_step < trainer.minibatches_per_step:
        raise ConfigError(
            f"trainer.minibatches_per_step ({trainer.minibatches_per_step}) must not exceed "
            f"rollout.prompts_per_step ({rollout.prompts_per_step}): a minibatch holds whole prompts."
        )


def check_run_dir(run_dir: str, resume: bool, resume_from: str | None = None) -> None:
    """Nothing that exists is overwritten: an existing run folder needs resume=true or another name."""
    if resume_from is not None:
        if not resume:
            raise ConfigError(f"resume_from is {resume_from} with resume=false; a resumed run begins there: set resume=true too.")
        check_file("resume_from", resume_from)
    try:
        exists = Path(run_dir).exists() and any(Path(run_dir).iterdir())
    except OSError as error:  # a file, a name that no folder can have, or one of somebody else
        raise ConfigError(f"run_dir is {brief(run_dir)}: {error.strerror}; give a folder that is yours, or a new name.") from None
    if exists and not resume:
        raise ConfigError(f"run_dir {run_dir} exists and is not empty; set resume=true to continue it, or choose another run_dir.")


def check_file(name: str, path: str | None) -> None:
    """A named input must exist before any model is built."""
    try:
        exists = path is not None and Path(path).exists()
    except OSError as error:
        raise ConfigError(f"{name} is {brief(path)}: {error.strerror}; correct the path.") from None
    if not exists:
        raise ConfigError(f"{name} is {path}; no such file or folder: create it or correct the path.")
