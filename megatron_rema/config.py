"""The frozen, typed configuration of every front door, and its cross-checks.

Hydra composes ``conf/`` into a DictConfig; ``load`` turns that into these dataclasses once (pydantic checks keys, types,
choices and ranges), and ``check`` applies the rules between fields before any model is built. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_rema.reading import brief
from megatron_rema.types import JUDGED_FIELDS, AnswerFormat, Role

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)  # NaN passes every comparison that a range makes

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A setting that breaks a rule. The message names field, value, rule and remedy; front doors exit with code 2."""


@dataclass(frozen=True, config=_STRICT)
class TaskConfig:
    """Problems, and what each role is told. Files are JSONL or parquet with one problem a row."""

    name: str
    train_file: str
    evaluation_files: dict[str, str]  # set name -> file
    system_prompts: dict[Role, str]  # role -> system prompt
    reasoner_template: str  # {question} and {instruction}: the reasoner's first user message. kind judge: {answer_a} and {answer_b} too
    solo_template: str = "{question}"  # the same where the reasoner is alone and nobody instructs it
    # solve: an answer in \boxed{}; judge: rows hold answer_a and answer_b, answer_key the better one's letter, answered by [[A]] or [[B]]
    kind: Literal["solve", "judge"] = "solve"
    both_orders: bool = True  # judge: train on every row in both orders of its answers (evaluations always do)
    question_key: str = "question"
    answer_key: str = "answer"
    finish_marker: str | None = "[FINISH]"  # None: no marker, every dialogue finishes after rollout.max_rounds (single-turn ReMA)
    json_actions: bool = False  # the meta-thinker's messages are actions in JSON, sampled under their grammar (needs xgrammar)
    cold_start_file: str | None = None  # dialogues for sft: {question, answer, turns: [{role, text}]}
    preference_file: str | None = None  # pairs for train_reward_model: {question, chosen: [turns], rejected: [turns]}
    preference_heldout_file: str | None = None

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat.LETTER if self.kind == "judge" else AnswerFormat.BOXED

    @property
    def fields(self) -> tuple[str, ...]:
        """Columns that only the reasoner reads, by their names in the templates."""
        return JUDGED_FIELDS if self.kind == "judge" else ()


@dataclass(frozen=True, config=_STRICT)
class PolicyConfig:
    """One set of weights and the roles it speaks for. ``path`` overrides ``model.path``."""

    roles: Annotated[list[Role], Field(min_length=1)]
    path: str | None = None
    trainable: bool = True  # false: a frozen partner, which speaks and is never updated


@dataclass(frozen=True, config=_STRICT)
class AgentsConfig:
    """Which weights speak for which role, and which are updated when."""

    policies: Annotated[dict[str, PolicyConfig], Field(min_length=1)]
    schedule: Literal["simultaneous", "alternating"] = "simultaneous"
    alternate_every: Count = 10  # optimizer-step blocks per policy when alternating; the first policy listed goes first


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Where the weights come from: a Hugging Face checkpoint folder."""

    path: str
    init: Literal["pretrained", "random"] = "pretrained"  # random: weights drawn from seed; config and tokenizer read from path
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 keeps fp32 master weights in the optimizer


@dataclass(frozen=True, config=_STRICT)
class LayoutConfig:
    """How one model is cut over the world's ranks; data parallel takes what is left."""

    tensor: Count = 1
    pipeline: Count = 1
    virtual_pipeline: Count = 1  # chunks of layers per pipeline stage, run interleaved: smaller bubbles, more messages
    sequence_parallel: bool = False
    distributed_optimizer: bool = False  # ZeRO-1
    recompute: bool = False  # recompute activations in the backward pass
    offload: bool = False  # weights, gradients and optimizer state wait in host memory while the model is not at work


@dataclass(frozen=True, config=_STRICT)
class ParallelConfig:
    """Every model at its own layout over the same ranks. None: as the actor."""

    actor: LayoutConfig  # the trained policies
    critic: LayoutConfig | None = None
    reward_model: LayoutConfig | None = None
    reference: LayoutConfig | None = None

    def layout(self, model: str) -> LayoutConfig:
        """``actor``, ``critic``, ``reward_model`` or ``reference``."""
        return getattr(self, model) or self.actor


@dataclass(frozen=True, config=_STRICT)
class EngineConfig:
    """The inference engine colocated in every rank."""

    name: Literal["vllm", "transformers"] = "vllm"
    tensor: Count = 1  # ranks per engine replica
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_num_seqs: Count = 256
    block_size: Count = 32
    kv_cache_mib: Count = 64
    logprob_gap_alarm: NonNegative = 0.05  # nats; a larger max gap between engine and trainer raises an alert


@dataclass(frozen=True, config=_STRICT)
class RolloutConfig:
    """How episodes are played. Budgets are in tokens."""

    prompts_per_step: Count = 32
    episodes_per_prompt: Count = 8
    samples_per_plan: Count = 1  # episodes of a prompt that answer one and the same plan; the plan earns the mean of their rewards
    success_low: Fraction = 0.0  # prompts whose fraction of right answers lies outside are not trained on (ReMA algorithm 1: 0.2 to 0.8)
    success_high: Fraction = 1.0
    max_draws: Count = 1  # > 1: draw prompts again until prompts_per_step of them are inside (dynamic sampling)
    redact_plan_prob: Fraction = 0.0  # of training episodes, whose reasoner hears plans without their numbers and boxed answers
    max_rounds: Count = 8
    max_turn_tokens: Count = 32
    max_episode_tokens: Count = 1024
    max_context_tokens: Annotated[int, Field(ge=8)] = 1024
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


@dataclass(frozen=True, config=_STRICT)
class RewardConfig:
    """From the verifier's verdict to per-role, per-turn rewards."""

    # base: +1 / -0.5 / -1 of the paper, planner penalised for answering; consistency: the planner earns how often its samples agree
    scheme: Literal["outcome", "base", "consistency"] = "outcome"
    overlong_buffer_tokens: NonNegativeInt = 0  # > 0: in the last tokens before rollout.max_episode_tokens a penalty grows from 0 to 1
    mask_unfinished_reward: bool = True  # an episode that did not finish earns 0
    verifier_processes: Count = 1  # per rank
    verifier_timeout_s: Positive = 5.0
    # "module:name" of a function of the user's: Episode (verdict and score filled) -> {component: amount, or {role: amount}}; each is
    # added to the last turn of whom it names. Must give the same on every rank.
    function: str | None = None
    weights: dict[str, float] = field(default_factory=dict)  # of components by name, ``outcome`` (the scheme's) among them; 1 otherwise
    # Vetoes: ambiguous_answer, plan_leak, phrase:TEXT, or module:name of a function Episode -> bool. Whoever one concerns earns at most 0
    gates: list[str] = field(default_factory=list)
    model_path: str | None = None  # a reward model (sequence-classification folder) that scores the reasoner's view of each episode
    model_weight: float = 1.0  # added to both roles' rewards: model_weight * score
    model_ensemble: Literal["mean", "min", "uwo", "entropic"] = "mean"  # over the reward model's heads
    model_ensemble_coef: Positive = 1.0  # uwo: lambda in mean - lambda variance; entropic: beta in -beta log mean exp(-r / beta)
    component_dropout: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # fraction of function's components that a prompt is not paid for in a step
    )
    length_debias: NonNegative = 0.0  # reward per token: this times what a role's tokens exceed the group's mean by is taken off
    shaping: Literal["none", "par"] = "none"  # par: what a role earns in all becomes the mean of sigmoid(R - reference)
    par_references: Count = 8  # taken from the rewards of the run's first step


@dataclass(frozen=True, config=_STRICT)
class RewardModelConfig:
    """What train_reward_model trains: K heads on a shared trunk, by Bradley-Terry. One of K heads at model.path is trained on."""

    heads: Count = 1
    bootstrap: bool = False  # each head sees its own resample of the pairs
    margin: bool = False  # use the pairs' margins
    centering: NonNegative = 0.0  # weight of (chosen + rejected)^2, which keeps scores around 0


@dataclass(frozen=True, config=_STRICT)
class AlgorithmConfig:
    """The objective of one policy update (rema.md 2 and 3)."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "ema", "reinforce_plus_plus", "gae"] = "grpo"  # gae builds a critic
    # normalised: each component of the reward by its own mean and deviation inside the group, then summed (GDPO); needs grpo
    advantage_components: Literal["sum", "normalised"] = "sum"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9  # ema: of the running mean of each role's rewards, from step to step
    # Of the meta-thinker. ablated, swapped: reward with its plan - mean reward of counterfactual answers, whatever ``advantage`` is
    credit: Literal["outcome", "ablated", "swapped"] = "outcome"
    counterfactual_samples: Count = 2  # ablated: answers without a plan for each prompt; swapped: answers to others' plans for each episode
    turn_discount: Annotated[float, Field(ge=0, le=1)] = 1.0  # reinforce_plus_plus, gae: from a turn to the role's next one
    turn_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0  # gae: across turns
    discount: Annotated[float, Field(ge=0, le=1)] = 1.0  # gae: inside a turn
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0  # gae: inside a turn
    ratio_level: Literal["token", "turn", "trace"] = "turn"
    ratio_mean: Literal["geometric", "arithmetic"] = "geometric"  # inside a turn or trace
    aggregation: Literal["token", "turn", "episode", "constant"] = "turn"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.2
    dual_clip: Annotated[float, Field(ge=1)] = 3.0
    log_ratio_cap: NonNegative = 3.0
    kl_coef: NonNegative = 0.0  # > 0 keeps a frozen reference copy of each policy
    # k2, k3 (k1: metric only) of sampled tokens; exact: of whole distributions, the reference runs beside the policy in every update
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k3"
    kl_target_nats: Positive | None = None  # per token, of train/kl_ref_nats: kl_coef is where a controller starts that aims at it
    kl_horizon: Positive = 10000.0  # traces; the larger, the slower that controller
    reward_kl_coef: NonNegative = 0.0  # gae: takes this times the KL to the reference off the reward of every token
    reward_kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # of that KL
    entropy_coef: float = 0.0
    chi2_coef: NonNegative = 0.0  # takes this times sqrt(chi-squared of the policy from the reference) off the objective
    chi2_log_ratio_cap: Positive = 5.0  # nats of a whole trace, beyond which a log-ratio counts as this

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.reward_kl_coef > 0 or self.chi2_coef > 0

    @property
    def needs_ref_logprobs(self) -> bool:
        """The reference's log-probabilities of sampled tokens; with the exact KL no loss reads them, a KL in the reward still does."""
        return self.reward_kl_coef > 0 or self.chi2_coef > 0 or (self.kl_coef > 0 and self.kl_estimator != "exact")


@dataclass(frozen=True, config=_STRICT)
class CriticConfig:
    """Value models, one a policy, used when algorithm.advantage is gae. Other optimizer settings are the actor's."""

    path: str | None = None  # Hugging Face folder of the trunk; None: the policy's own
    lr: NonNegative = 1.0e-5
    value_clip: NonNegative = 0.2  # 0 turns value clipping off
    warmup_steps: NonNegativeInt = 0  # first steps in which only the critic learns


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """Adam of megatron-core and its schedule. Units: steps are optimizer steps; with trainer.token_budget the schedule runs over tokens."""

    lr: NonNegative = 1e-6
    min_lr: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 1.0  # global norm; 0 turns clipping off


@dataclass(frozen=True, config=_STRICT)
class IntegrityConfig:
    """Signals every step, audits on a budget, and what follows from them (docs/integrity.md)."""

    mode: Literal["off", "monitor", "guard"] = "off"
    # Gold of an episode: verdict (right and finished, strictly read), or "module:name" of a function Episode -> float
    oracle: str = "verdict"
    audit_every: Count = 25  # steps; a signal that fires asks for an earlier one
    audit_problems: Count = 64  # at most; the first so many training problems of a shuffle of their own
    budget_frac: Annotated[float, Field(gt=0, le=1)] = 0.03  # audits sample at most this times what training samples
    start_steps: Count = 5  # first steps that signals compare with
    # Problems drawn anew, for the audit isomorphic: arith, or "module:name" of a function (Prompt, random.Random) -> Prompt; null: not run
    renewal: str | None = None
    hints: bool = False  # the audit wrong_hint: two more ways to play every problem
    # "module:name" of a function Episode -> float, a judge that training does not hear: the audit two_judges
    second_judge: str | None = None
    paraphrase: str | None = None  # "module:name" of a function str -> str that says a plan otherwise: the audit of that name
    cross_play: bool = False  # either agent with the other as it was at the start: two more ways to play; needs a reference
    # guard: what follows when this audit alarms and the verdict is a hack; "default" for those not named
    ladder: dict[str, Literal["annotate", "shape", "quarantine", "roll_back"]] = field(default_factory=lambda: {"default": "annotate"})
    max_roll_backs: Count = 2  # the next one ends the run
    keep_clean_checkpoints: Count = 2  # of steps at which nothing pointed to a hack: what a roll-back returns to


@dataclass(frozen=True, config=_STRICT)
class PreflightConfig:
    """What is looked at before the first collective (trainer/preflight.py)."""

    enabled: bool = True
    wait_s: Positive = 300.0  # for the slowest rank to report
    connect_s: Positive = 10.0  # for one rank to answer another
    min_free_memory_gib: NonNegative = 0.5  # of host memory, per rank
    min_free_disk_gib: NonNegative = 1.0  # where run_dir is
    max_clock_skew_s: NonNegative = 5.0  # from rank 0's clock


@dataclass(frozen=True, config=_STRICT)
class TrainerConfig:
    """Length and rhythm of a run."""

    steps: NonNegativeInt = 100  # rollout steps (train) or optimizer steps (sft)
    token_budget: NonNegativeInt = 0  # > 0: train also ends after the step that has brought the sampled tokens to this number
    minibatches_per_step: Count = 1  # optimizer steps per rollout
    microbatch_tokens: Count = 4096  # packed tokens per forward; at least the longest trace
    logits_chunk_tokens: NonNegativeInt = 0  # > 0: logits exist for so many of them at a time, and are computed again in backward; 0: whole
    global_batch_dialogues: Count = 64  # sft: dialogues per optimizer step
    evaluate_every: NonNegativeInt = 0  # 0: only before the first and after the last step
    evaluation_problems: NonNegativeInt = 200  # per set, the first ones of the file; 0: all
    evaluation_samples: Count = 4  # dialogues per problem
    evaluation_temperatures: Annotated[list[NonNegative], Field(min_length=1)] = field(default_factory=lambda: [1.0])  # 0: greedy
    checkpoint_every: NonNegativeInt = 0  # 0: only after the last step
    keep_checkpoints: Count = 2
    max_skipped_updates: NonNegativeInt = 5  # so many updates of a model in a row without finite gradients end the run; 0: none do
    asynchronous_checkpoints: bool = False  # write in a thread while training goes on, from a copy of the state in host memory
    save_hf: bool = True  # export each policy as a Hugging Face checkpoint at the end
    # > 0: when no rank has got on for so long, name where each waits, and end with exit code 75 (trainer/watchdog.py)
    watchdog_seconds: NonNegative = 1800.0
    preflight: PreflightConfig = field(default_factory=PreflightConfig)


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything one run needs."""

    run_dir: str
    task: TaskConfig
    agents: AgentsConfig
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    rollout: RolloutConfig
    reward: RewardConfig
    reward_model: RewardModelConfig
    algorithm: AlgorithmConfig
    critic: CriticConfig
    optimizer: OptimizerConfig
    integrity: IntegrityConfig
    trainer: TrainerConfig
    kernels: Literal["auto", "fused", "reference"] = "auto"  # compiled kernels, or plain torch
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what every library takes
    private_run_dir: bool = True  # a new run folder is for its owner only (mode 0700); false: as the umask says
    resume: bool = False  # continue run_dir from its latest checkpoint; what the launcher starts again does so by itself
    resume_from: str | None = None  # with resume: this checkpoint instead of the latest
    explain: bool = False  # print every derived number and end, without a device or a process group
    world_size: Count | None = None  # ranks that explain counts with; None: those of the launcher
    score_file: str | None = None  # evaluate: score saved responses instead of playing dialogues

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles that speak, META_THINKING first."""
        spoken = {role for policy in self.agents.policies.values() for role in policy.roles}
        return tuple(role for role in Role if role in spoken)

    @property
    def policy_of_role(self) -> dict[Role, str]:
        return {role: name for name, policy in self.agents.policies.items() for role in policy.roles}

    def model_path(self, policy: str) -> str:
        return self.agents.policies[policy].path or self.model.path


def load(cfg: DictConfig) -> RunConfig:
    """DictConfig -> frozen dataclasses. Unknown keys, missing values, wrong types, choices and ranges raise ConfigError naming the key."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{missing[0]} is not set and has no default: give {missing[0]}=VALUE on the command line.")
        given = OmegaConf.to_container(cfg, resolve=True)
        _check_texts(given)
        return TypeAdapter(RunConfig).validate_python(given)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise ConfigError(" | ".join(_explain(detail) for detail in error.errors())) from error


def _check_texts(tree: Any, key: str = "") -> None:
    """Bytes of the command line that are no UTF-8 reach us as halves of characters, which no file of the run could hold."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _check_texts(str(name), f"{key}{ascii(name)[1:-1]}")
            _check_texts(value, f"{key}{name}.")
    elif isinstance(tree, list):
        for value in tree:
            _check_texts(value, key)
    elif isinstance(tree, str) and any("\ud800" <= character <= "\udfff" for character in tree):
        raise ConfigError(f"{key.rstrip('.')} is {tree!a}; it must be valid Unicode: give it as UTF-8.")


def _explain(detail: Any) -> str:
    key = ".".join(str(part) if str(part).isprintable() and str(part).split() == [str(part)] else brief(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key} is {brief(detail['input'])}; there is no such key: see --help for the keys, or remove it."
    return f"{key} is {brief(detail['input'])}; {detail['msg'][0].lower()}{detail['msg'][1:]}."


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers (what ``config.yaml`` holds)."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


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
