"""Who shares the devices in one step, phase by phase, and what each device then holds.

Phases: generate (engines awake), score (reward model, old and reference log-probabilities, values), update (one learner after the other),
sync (weights from trainer to engines).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_rema.architecture import Architecture
from megatron_rema.config import ConfigError, LayoutConfig, ParallelConfig, RunConfig
from megatron_rema.planning import memory
from megatron_rema.planning.batch import BatchShape
from megatron_rema.planning.hardware import CPU, GIB, Assumptions, Runtime
from megatron_rema.planning.memory import Parts, Work, total
from megatron_rema.planning.shapes import Shard, whole_parameters

PHASES = ("generate", "score", "update", "sync")


@dataclass(frozen=True)
class Agent:
    """One set of weights and for how many roles it speaks."""

    arch: Architecture
    roles: int = 1
    trainable: bool = True


@dataclass(frozen=True)
class EngineShape:
    """The engine of each agent, on every rank."""

    tensor: int = 1
    element_bytes: int = 2
    kv_cache_gib: float = 8.0  # per rank and agent
    max_num_seqs: int = 256


@dataclass(frozen=True)
class Model:
    """A model that megatron-core holds."""

    name: str
    kind: str  # policy, critic, reference, reward_model
    arch: Architecture
    layout: LayoutConfig
    trainable: bool
    roles: int


@dataclass(frozen=True)
class Job:
    """Everything that decides on memory and time."""

    agents: Mapping[str, Agent]
    parallel: ParallelConfig
    engine: EngineShape
    batch: BatchShape
    element_bytes: int = 2
    logits_chunk_tokens: int = 0
    critic: bool = False
    reference: bool = False
    exact_kl: bool = False
    reward_model: Architecture | None = None
    fused_kernels: bool = True
    has_engines: bool = True
    has_models: bool = True  # false: an evaluation, which has engines alone
    assumptions: Assumptions = field(default_factory=Assumptions)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        architectures: Mapping[str, Architecture],
        reward_model: Architecture | None = None,
        agents: Mapping[str, Agent] | None = None,
    ) -> Job:
        """``agents``: instead of the configuration's policies."""
        algorithm, sizes = config.algorithm, {"float32": 4, "bfloat16": 2}
        engine = config.engine
        return cls(
            agents=agents
            or {n: Agent(architectures[n], len(policy.roles), policy.trainable) for n, policy in config.agents.policies.items()},
            parallel=config.parallel,
            engine=EngineShape(engine.tensor, sizes[engine.dtype], engine.kv_cache_mib / 1024, engine.max_num_seqs),
            batch=BatchShape.of(config),
            element_bytes=sizes[config.model.dtype],
            logits_chunk_tokens=config.trainer.logits_chunk_tokens,
            critic=algorithm.advantage == "gae",
            reference=algorithm.needs_reference,
            exact_kl=algorithm.needs_reference and algorithm.kl_estimator == "exact",
            reward_model=reward_model,
            fused_kernels=config.kernels != "reference",
        )

    @classmethod
    def of_reward_model(cls, config: RunConfig, arch: Architecture) -> Job:
        """What trains a reward model: nothing but it."""
        alone = cls.of(config, {}, None, agents={"reward model": Agent(arch, roles=2)})  # of a pair, both
        return replace(alone.policies_alone(), parallel=ParallelConfig(actor=config.parallel.layout("reward_model")))

    def policies_alone(self) -> Job:
        """As a cold start has them."""
        return replace(self, critic=False, reference=False, exact_kl=False, reward_model=None, has_engines=False)

    @property
    def models(self) -> list[Model]:
        """In the order in which they are built."""
        if not self.has_models:
            return []
        found = []
        for name, agent in self.agents.items():
            found.append(Model(name, "policy", agent.arch, self.parallel.actor, agent.trainable, agent.roles))
            if agent.trainable and self.reference:
                found.append(Model(f"{name} reference", "reference", agent.arch, self.parallel.layout("reference"), False, agent.roles))
            if agent.trainable and self.critic:
                critic = agent.arch.with_scalar_head(1)
                found.append(Model(f"{name} critic", "critic", critic, self.parallel.layout("critic"), True, agent.roles))
        if self.reward_model is not None:
            found.append(Model("reward model", "reward_model", self.reward_model, self.parallel.layout("reward_model"), False, 1))
        return found

    def work(self, model: Model, world: int, runtime: Runtime) -> Work:
        data = world // (model.layout.tensor * model.layout.pipeline)
        return Work(
            tokens=self.batch.longest_microbatch(data, roles=model.roles),
            microbatches=self.batch.microbatches(data, roles=model.roles),
            element_bytes=self.element_bytes,
            data=data,
            logits_chunk_tokens=self.logits_chunk_tokens,
            fused_kernels=self.fused_kernels,
            padding=self.assumptions.padding,
            runtime=runtime,
        )

    def check(self, world: int) -> None:
        """Raises ValueError naming the first rule that ``parallel`` or the engine breaks."""
        for model in self.models:
            layout = model.layout
            size = layout.tensor * layout.pipeline
            if world % size:
                raise ConfigError(
                    f"{model.name}: tensor ({layout.tensor}) * pipeline ({layout.pipeline}) must divide the number of GPUs ({world}); "
                    f"got remainder {world % size}: lower one."
                )
            if layout.sequence_parallel and layout.tensor == 1:
                raise ConfigError(f"{model.name}: sequence_parallel needs tensor >= 2: turn it off.")
            model.arch.check_layout(layout.tensor, layout.pipeline, layout.virtual_pipeline)
        actor, reference = self.parallel.actor, self.parallel.layout("reference")
        if self.exact_kl and (reference.tensor, reference.pipeline) != (actor.tensor, 1):
            raise ConfigError(
                f"the exact KL runs the reference where the loss is: it needs tensor {actor.tensor} and pipeline 1, got {reference.tensor} "
                f"and {reference.pipeline}: correct the reference's layout."
            )
        for agent in self.agents.values():
            heads, parts = agent.arch.num_heads, self.engine.tensor
            if heads % parts or world % parts:
                raise ConfigError(f"engine.tensor ({parts}) must divide the attention heads ({heads}) and the GPUs ({world}): lower it.")
        if self.batch.microbatch_tokens < self.batch.context_tokens:
            raise ConfigError(
                f"microbatch_tokens ({self.batch.microbatch_tokens}) must hold the longest trace ({self.batch.context_tokens}): raise it."
            )


# --- memory per phase -------------------------------------------------------------------------------------------------


def kv_bytes_per_token(arch: Architecture, engine: EngineShape) -> float:
    """On each of the engine's ranks; heads that are fewer than ranks are repeated."""
    return 2 * arch.num_layers * math.ceil(arch.num_kv_heads / engine.tensor) * arch.head_dim * engine.element_bytes


def engine_memory(job: Job, runtime: Runtime) -> Parts:
    """Of all agents' engines, awake."""
    if not job.has_engines:
        return {}
    engine, parts = job.engine, []
    for agent in job.agents.values():
        logits = engine.max_num_seqs * agent.arch.vocab_size * 4
        overhead = job.assumptions.engine_overhead_gib * GIB if runtime.engine_sleeps else 0.0
        parts.append(
            {
                "engine weights": whole_parameters(agent.arch) / engine.tensor * engine.element_bytes,
                "key-value cache": engine.kv_cache_gib * GIB,
                "engine work": logits + overhead,
            }
        )
    return memory.added(parts)


def phase_memory(job: Job, world: int, runtime: Runtime = CPU) -> dict[str, Parts]:
    """Phase -> what the fullest rank holds in it, by purpose, in bytes; ``overhead`` is the device's own."""
    pipelines = {model.layout.pipeline for model in job.models}
    slots = math.lcm(*pipelines)  # ranks of one slot have the same stage of every model
    # where all have as many stages the ends are fullest: the first has most in flight and the embedding, the last has the logits
    fullest: dict[str, Parts] = {}
    for slot in sorted({0, slots - 1}) if len(pipelines) == 1 else range(slots):
        for phase, parts in _of_rank(job, world, runtime, slot / slots).items():
            if phase not in fullest or total(parts) > total(fullest[phase]):
                fullest[phase] = parts
    for parts in fullest.values():
        if runtime.overhead_bytes or runtime.fragmentation:
            parts["overhead"] = runtime.overhead_bytes + runtime.fragmentation * total(parts)
    return fullest


def _of_rank(job: Job, world: int, runtime: Runtime, place: float) -> dict[str, Parts]:
    """``place``: the rank's position in the world, 0 to below 1; pipeline stages are its slowest axis."""
    shards = {m.name: Shard(m.arch, m.layout, int(place * m.layout.pipeline)) for m in job.models}
    works = {m.name: job.work(m, world, runtime) for m in job.models}
    by_name = {m.name: m for m in job.models}

    def at_rest(model: Model, *, has_weights: bool = True, has_state: bool = True) -> Parts:
        """What a model that is not at work holds."""
        parts: Parts = {}
        shard, work = shards[model.name], works[model.name]
        if has_weights and not model.layout.offload:
            parts |= {f"{model.kind} weights": total(memory.weights(shard, work))}
        if has_state and model.trainable and not model.layout.offload:
            parts |= {f"{model.kind} state": total(memory.optimizer_state(shard, work))}
        return parts

    resting = {m.name: at_rest(m) for m in job.models}
    awake = engine_memory(job, runtime)
    asleep = {} if runtime.engine_sleeps else awake

    def beside(*working: str) -> list[Parts]:
        return [asleep, *(parts for name, parts in resting.items() if name not in working)]

    idle = memory.added(beside())
    phases = {"generate": memory.added([awake, *resting.values()])}
    scores = [_score(job, by_name[name], shards[name], works[name], at_rest(by_name[name], has_weights=False)) for name in shards]
    names = list(shards)
    with_scores = [memory.added([*beside(name), parts]) for name, parts in zip(names, scores, strict=True) if parts is not None]
    phases["score"] = max(with_scores, key=total, default=idle)
    updates = []
    for model in job.models:
        if not model.trainable:
            continue
        exact = job.exact_kl and model.kind == "policy"
        own = memory.updating(shards[model.name], works[model.name], exact_kl=exact)
        reference = f"{model.name} reference"
        if exact:
            own = memory.added([own, {"reference weights": total(memory.weights(shards[reference], works[reference]))}])
        updates.append(memory.added([*beside(model.name, *([reference] if exact else [])), own]))
    phases["update"] = max(updates, key=total, default=idle)
    syncs = []
    for model in job.models:
        if model.kind == "policy":
            own = memory.added([memory.weights(shards[model.name], works[model.name]), at_rest(model, has_weights=False)])
            others = [parts for name, parts in resting.items() if name != model.name]
            syncs.append(memory.added([awake, *others, own, {"workspace": _largest_tensor(model.arch, job.element_bytes)}]))
    phases["sync"] = max(syncs, key=total, default=phases["generate"])
    return phases


def _score(job: Job, model: Model, shard: Shard, work: Work, state: Parts) -> Parts | None:
    """A model's forward pass in the score phase; None where it has none."""
    needed = {
        "policy": model.trainable and job.batch.minibatches > 1,
        "reference": not job.exact_kl,
        "critic": True,
        "reward_model": True,
    }
    return memory.added([memory.scoring(shard, work), state]) if needed[model.kind] else None


def _largest_tensor(arch: Architecture, element_bytes: int) -> float:
    """Of the bridge: the shards of all tensor ranks, and the whole that is put together from them."""
    return 2 * max(arch.vocab_size, 2 * arch.ffn_hidden_size) * arch.hidden_size * element_bytes


def host_memory(job: Job, world: int) -> float:
    """Pinned host memory of one rank for what is offloaded, and for the sleeping engines' weights: the fullest rank's."""
    kept = 0.0
    for model in job.models:
        if not model.layout.offload:
            continue
        stages = []
        for stage in range(model.layout.pipeline):
            shard, work = Shard(model.arch, model.layout, stage), job.work(model, world, CPU)
            state = memory.optimizer_state(shard, work)["optimizer"] if model.trainable else 0.0
            stages.append(total(memory.weights(shard, work)) + state)
        kept += max(stages)
    return kept + engine_memory(job, CPU).get("engine weights", 0.0)


def binding(phases: Mapping[str, Parts]) -> str:
    """The phase that needs most."""
    return max(phases, key=lambda phase: total(phases[phase]))
