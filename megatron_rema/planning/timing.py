"""Predicted seconds of one step, phase by phase: counted work over assumed speeds (planning/hardware.py). A ranking of layouts, not a
measurement: no figure here has been held against a GPU.

A multiplication by one parameter is two operations a token; backward takes two forwards, recomputing one more.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rema.planning import memory
from megatron_rema.planning.hardware import GIB, Cluster
from megatron_rema.planning.job import Agent, Job, Model, kv_bytes_per_token
from megatron_rema.planning.memory import Work
from megatron_rema.planning.shapes import Shard, whole_parameters

_FLOAT32 = 4


@dataclass(frozen=True)
class Speeds:
    """What is reached, per device: operations and bytes a second."""

    job: Job
    cluster: Cluster

    @property
    def training(self) -> float:
        return self._operations(self.job.element_bytes) * self.job.assumptions.training_efficiency

    @property
    def prefill(self) -> float:
        return self._operations(self.job.engine.element_bytes) * self.job.assumptions.prefill_efficiency

    def _operations(self, element_bytes: int) -> float:
        slowdown = self.job.assumptions.float32_slowdown if element_bytes == _FLOAT32 else 1.0
        return self.cluster.gpu.tflops * 1e12 / slowdown

    @property
    def memory(self) -> float:
        return self.cluster.gpu.memory_gb_per_s * 1e9 * self.job.assumptions.decode_efficiency

    @property
    def host(self) -> float:
        return self.job.assumptions.host_gb_per_s * 1e9

    def link(self, span: int) -> float:
        """Between ranks that lie within ``span`` of each other."""
        gpu = self.cluster.gpu
        inside = span <= self.cluster.per_node
        return (gpu.intra_node_gb_per_s if inside else gpu.inter_node_gb_per_s) * 1e9 * self.job.assumptions.link_efficiency


def step_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Phase -> seconds of one rollout step with its updates."""
    speeds, world = Speeds(job, cluster), cluster.gpus
    seconds = dict.fromkeys(("generate", "score", "update", "sync"), 0.0)
    for agent in job.agents.values():
        seconds["generate"] += generate_seconds(job, agent, speeds)
    for model in job.models:
        if model.kind == "policy":
            seconds["sync"] += sync_seconds(job, model, speeds)
        if model.trainable:
            seconds["update"] += job.batch.minibatches * update_seconds(job, model, speeds, world)
        is_scored = job.batch.minibatches > 1 and model.trainable if model.kind == "policy" else True
        if is_scored and not (model.kind == "reference" and job.exact_kl):
            seconds["score"] += score_seconds(job, model, speeds, world)
    return seconds


def _stage_seconds(job: Job, shard: Shard, work: Work, speeds: Speeds, *, passes: float, tokens: float) -> float:
    """Of one microbatch of ``tokens`` on one stage: ``passes`` forward passes' worth of operations, and the sums of tensor ranks."""
    arch, layout = shard.arch, shard.layout
    attended = min(job.batch.trace_tokens * job.assumptions.token_fill, tokens) / 2  # causal: half of the others on average
    operations = shard.num_layers * (2 * shard.layer_matrices + 4 * shard.query_size * attended)
    collectives = 0.0
    if layout.tensor > 1:  # two sums a layer and pass, of [T, H]
        travels = 2 * (layout.tensor - 1) / layout.tensor * tokens * arch.hidden_size * work.element_bytes
        rounds = 2 + (2 if passes >= 3 else 0) + (2 if passes >= 4 else 0)
        collectives = shard.num_layers * rounds * travels / speeds.link(layout.tensor)
    head = 2 * shard.head_parameters * tokens if shard.is_last else 0.0
    if passes >= 3:
        head *= 4 if work.logits_chunk_tokens else 3
    return (operations * tokens * passes + head) / speeds.training + collectives


def _pass_seconds(job: Job, model: Model, speeds: Speeds, world: int, *, passes: float, minibatches: int) -> float:
    """All microbatches of ``1 / minibatches`` of a step through the pipeline."""
    layout, work = model.layout, job.work(model, world, memory.CPU)
    fill = job.assumptions.token_fill
    microbatches = job.batch.microbatches(work.data, roles=model.roles, fill=fill)
    total = job.batch.episodes * model.roles * job.batch.trace_tokens * fill / job.batch.minibatches / work.data
    tokens = total / microbatches
    count = microbatches * job.batch.minibatches / minibatches
    stages = [
        _stage_seconds(job, Shard(model.arch, layout, stage), work, speeds, passes=passes, tokens=tokens)
        for stage in {0, layout.pipeline - 1}
    ]
    bubbles = (layout.pipeline - 1) / layout.virtual_pipeline
    messages = 0.0
    if layout.pipeline > 1:
        sent = tokens * model.arch.hidden_size * work.element_bytes / (layout.tensor if layout.sequence_parallel else 1)
        messages = (2 if passes >= 3 else 1) * layout.virtual_pipeline * sent / speeds.link(world)
    return (count + bubbles) * (max(stages) + messages)


def update_seconds(job: Job, model: Model, speeds: Speeds, world: int) -> float:
    """One optimizer step of one learner; with the exact KL, its reference's forward too."""
    layout, work = model.layout, job.work(model, world, memory.CPU)
    seconds = _pass_seconds(job, model, speeds, world, passes=4 if layout.recompute else 3, minibatches=job.batch.minibatches)
    if job.exact_kl and model.kind == "policy":
        reference = next(other for other in job.models if other.name == f"{model.name} reference")
        seconds += _pass_seconds(job, reference, speeds, world, passes=1, minibatches=job.batch.minibatches)
    parameters = max(Shard(model.arch, layout, stage).num_parameters for stage in {0, layout.pipeline - 1})
    if work.data > 1:
        share = (work.data - 1) / work.data
        each = _FLOAT32 + work.element_bytes if layout.distributed_optimizer else 2 * _FLOAT32
        seconds += share * parameters * each / speeds.link(layout.tensor * work.data)
    state = sum(memory.optimizer_state(Shard(model.arch, layout), work).values())
    seconds += 2 * state / speeds.memory
    if layout.offload:
        shard = Shard(model.arch, layout)
        moved = memory.optimizer_state(shard, work)["optimizer"] + memory.weights(shard, work)["weights"]
        seconds += 2 * moved / speeds.host
    return seconds


def score_seconds(job: Job, model: Model, speeds: Speeds, world: int) -> float:
    """One forward pass over all of a step's traces."""
    seconds = _pass_seconds(job, model, speeds, world, passes=1, minibatches=1)
    if model.layout.offload:
        seconds += 2 * memory.weights(Shard(model.arch, model.layout), job.work(model, world, memory.CPU))["weights"] / speeds.host
    return seconds


def sync_seconds(job: Job, model: Model, speeds: Speeds) -> float:
    """Every tensor from its stage to all stages and from tensor ranks to all, then into the engine; engines come back from host memory."""
    layout, world = model.layout, speeds.cluster.gpus
    number = whole_parameters(model.arch) * job.element_bytes
    seconds = number / speeds.memory
    if layout.pipeline > 1:
        seconds += number / layout.tensor / speeds.link(world)
    if layout.tensor > 1:
        seconds += (layout.tensor - 1) / layout.tensor * number / speeds.link(layout.tensor)
    offloaded = number / (layout.tensor * layout.pipeline) if layout.offload else 0.0
    engine = whole_parameters(model.arch) / job.engine.tensor * job.engine.element_bytes
    return seconds + 2 * (offloaded + engine) / speeds.host


def concurrent_sequences(job: Job, agent: Agent, world: int) -> float:
    """That one engine runs at a time: as many as it takes, as its cache holds, as there are."""
    fill = job.assumptions.token_fill
    cache = job.engine.kv_cache_gib * GIB / kv_bytes_per_token(agent.arch, job.engine)
    fitting = cache / max(job.batch.trace_tokens * fill, 1)
    there_are = job.batch.played_episodes / job.batch.draws * job.engine.tensor / world
    return max(1.0, min(job.engine.max_num_seqs, fitting, there_are))


def generate_seconds(job: Job, agent: Agent, speeds: Speeds) -> float:
    """One agent's share of a rollout: prefill of what it has not read yet, and one token of every running sequence at a time."""
    batch, engine, assumptions, world = job.batch, job.engine, job.assumptions, speeds.cluster.gpus
    replicas = world / engine.tensor
    sampled = batch.sampled_tokens * assumptions.token_fill * agent.roles / batch.roles / replicas
    read = (
        batch.played_episodes * agent.roles * (batch.prompt_tokens + batch.sampled_tokens_per_episode * assumptions.token_fill) / replicas
    )
    parameters = whole_parameters(agent.arch) / engine.tensor
    running = max(1.0, concurrent_sequences(job, agent, world) * assumptions.engine_occupancy)
    context = batch.trace_tokens * assumptions.token_fill / 2
    traffic = parameters * engine.element_bytes + running * context * kv_bytes_per_token(agent.arch, engine)
    per_token = max(traffic / speeds.memory, 2 * parameters * running / speeds.prefill) + assumptions.decode_step_overhead_ms / 1e3
    if engine.tensor > 1:
        travels = 2 * (engine.tensor - 1) / engine.tensor * running * agent.arch.hidden_size * engine.element_bytes
        per_token += 2 * agent.arch.num_layers * travels / speeds.link(engine.tensor)
    return 2 * parameters * read / speeds.prefill + sampled / running * per_token
