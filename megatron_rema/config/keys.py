"""The keys of the configuration: frozen dataclasses, of which pydantic checks keys, types, choices and ranges."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megatron_rema.types import JUDGED_FIELDS, AnswerFormat, Role

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)  # NaN passes every comparison that a range makes

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# Whose alarm may have consequences (integrity/audits.py): those at oracle level, without which there is no verdict of hack
Audit = Literal[
    "default", "proxy_gold", "canaries", "isomorphic", "wrong_hint", "two_judges", "plan_leak", "forced_continuation", "paraphrase"
]


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
    second_judge: str | None = None  # "module:name" of a function Episode -> float that training does not hear: the audit two_judges
    paraphrase: str | None = None  # "module:name" of a function str -> str that says a plan otherwise: the audit of that name
    cross_play: bool = False  # either agent with the other as it was at the start: two more ways to play; needs a reference
    # guard: what follows when this audit alarms and the verdict is a hack; "default" for those not named
    ladder: dict[Audit, Literal["annotate", "shape", "quarantine", "roll_back"]] = field(default_factory=lambda: {"default": "annotate"})
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
