"""Why a layout does not fit, and which single change helps most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_rema.config import LayoutConfig, ParallelConfig
from megatron_rema.planning.hardware import GIB, Cluster
from megatron_rema.planning.job import PHASES, Job
from megatron_rema.planning.memory import total
from megatron_rema.planning.search import LOGITS_CHUNK, Plan, is_allowed, price


def changes(job: Job, cluster: Cluster) -> Iterator[tuple[str, Job]]:
    """Every single change that may give memory back, in the words of the configuration."""
    actor, batch, engine = job.parallel.actor, job.batch, job.engine

    if actor.tensor * 2 <= cluster.per_node:
        yield (
            f"parallel.actor.tensor {actor.tensor} -> {actor.tensor * 2}",
            with_actor(job, tensor=actor.tensor * 2, sequence_parallel=True),
        )
    yield f"parallel.actor.pipeline {actor.pipeline} -> {actor.pipeline * 2}", with_actor(job, pipeline=actor.pipeline * 2)
    for name in ("recompute", "distributed_optimizer", "offload"):
        if not getattr(actor, name):
            yield f"parallel.actor.{name}=true", with_actor(job, **{name: True})
    if actor.tensor > 1 and not actor.sequence_parallel:
        yield "parallel.actor.sequence_parallel=true", with_actor(job, sequence_parallel=True)
    if batch.microbatch_tokens // 2 >= batch.context_tokens:
        yield (
            f"trainer.microbatch_tokens {batch.microbatch_tokens} -> {batch.microbatch_tokens // 2}",
            replace(job, batch=replace(batch, microbatch_tokens=batch.microbatch_tokens // 2)),
        )
    if job.logits_chunk_tokens == 0:
        yield f"trainer.logits_chunk_tokens={LOGITS_CHUNK}", replace(job, logits_chunk_tokens=LOGITS_CHUNK)
    if engine.kv_cache_gib > 1:
        half = engine.kv_cache_gib / 2
        yield (
            f"engine.kv_cache_mib {engine.kv_cache_gib * 1024:.0f} -> {half * 1024:.0f}",
            replace(job, engine=replace(engine, kv_cache_gib=half)),
        )
    if engine.tensor * 2 <= cluster.per_node:
        yield f"engine.tensor {engine.tensor} -> {engine.tensor * 2}", replace(job, engine=replace(engine, tensor=engine.tensor * 2))


def with_actor(job: Job, **settings: Any) -> Job:
    """The job with settings of the actor's layout replaced, and of every other model's that they mean something for."""
    frozen = {key: value for key, value in settings.items() if key in ("tensor", "pipeline", "sequence_parallel", "offload")}
    reference = {key: value for key, value in frozen.items() if key != "pipeline" or not job.exact_kl}

    def changed(own: LayoutConfig | None, changes: dict[str, Any]) -> LayoutConfig | None:
        return None if own is None else replace(own, **changes)

    own = job.parallel
    parallel = ParallelConfig(
        actor=replace(own.actor, **settings),
        critic=changed(own.critic, settings),
        reward_model=changed(own.reward_model, frozen),
        reference=changed(own.reference, reference),
    )
    return replace(job, parallel=parallel)


def advice(plan: Plan) -> list[tuple[str, Plan]]:
    """(change, what becomes of the plan) of every change that helps, the most helpful first: those that make it fit by time, then by how
    much is still over; what needs more GPUs last of either kind."""
    priced = []
    for words, job in changes(plan.job, plan.cluster):
        if is_allowed(job, plan.cluster):
            priced.append((words, price(job, plan.cluster)))
    if plan.cluster.gpus % plan.cluster.per_node == 0:
        twice = replace(plan.cluster, gpus=2 * plan.cluster.gpus)
        job = with_actor(plan.job, distributed_optimizer=True)
        priced.append((f"{twice.gpus} GPUs, half of them another data-parallel copy with distributed_optimizer=true", price(job, twice)))

    def rank(pair: tuple[str, Plan]) -> tuple[bool, bool, float]:
        after = pair[1]
        return not after.fits, after.cluster.gpus > plan.cluster.gpus, after.step_seconds if after.fits else after.peak

    helping = [(words, after) for words, after in priced if after.fits or after.peak < plan.peak]
    return sorted(helping, key=rank)


def explain_why(plan: Plan) -> list[str]:
    """Lines: each phase with what fills it, what is too much, and the single changes that help."""
    lines = [f"{plan.label} on {plan.cluster.gpus} x {plan.cluster.gpu.name}: {'fits' if plan.fits else 'does not fit'}"]
    for phase in PHASES:
        parts = sorted(plan.phases[phase].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts if value >= 0.05 * GIB)
        over = total(plan.phases[phase]) - plan.capacity
        verdict = f"{over / GIB:.1f} GiB too much" if over > 0 else f"{-over / GIB:.1f} GiB left"
        lines.append(f"  {phase}: {total(plan.phases[phase]) / GIB:.1f} of {plan.cluster.gpu.memory_gib:g} GiB ({verdict}): {shown}")
    host, limit = plan.host_bytes / GIB, plan.cluster.node_memory_gib
    lines.append(f"  host memory of a node: {host:.0f} of {limit:g} GiB{'' if host <= limit else ', too much'}")
    lines.append(f"  binding phase: {plan.binding}; predicted step {plan.step_seconds:.0f} s")
    if not plan.fits:
        helping = advice(plan)
        lines.append("  the single change that helps most:" if helping else "  none of the single changes helps: take more GPUs.")
        for words, other in helping[:3]:
            verdict = "fits" if other.fits else f"still {(other.peak - plan.capacity) / GIB:.1f} GiB too much"
            lines.append(f"    {words}: {other.binding} {other.peak / GIB:.1f} GiB, {verdict}, step {other.step_seconds:.0f} s")
    return lines
