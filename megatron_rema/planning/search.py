"""Which layouts fit, and how fast each would be."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_rema.config import LayoutConfig, ParallelConfig
from megatron_rema.planning.hardware import GIB, Cluster, Runtime
from megatron_rema.planning.job import Job, binding, host_memory, kv_bytes_per_token, phase_memory
from megatron_rema.planning.memory import Parts, total
from megatron_rema.planning.timing import step_seconds

LOGITS_CHUNK = 1024  # logits_chunk_tokens that is tried
_LARGEST_PIPELINE = 16


@dataclass(frozen=True)
class Plan:
    """One layout of all models on one cluster, priced."""

    job: Job
    cluster: Cluster
    phases: dict[str, Parts]
    seconds: dict[str, float]
    host_bytes: float  # of one node

    @property
    def capacity(self) -> float:
        return self.cluster.gpu.memory_gib * GIB

    @property
    def peak(self) -> float:
        return max(map(total, self.phases.values()))

    @property
    def binding(self) -> str:
        return binding(self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and self.host_bytes <= self.cluster.node_memory_gib * GIB

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def label(self) -> str:
        """What `with_label` reads."""
        return label(self.job)

    @property
    def overrides(self) -> list[str]:
        """The plan on a command line."""
        job, found = self.job, []
        for name in ("actor", "critic", "reward_model", "reference"):
            layout = getattr(job.parallel, name)
            if layout is not None and (name == "actor" or layout != job.parallel.actor):
                found += [f"parallel.{name}={{{','.join(f'{key}:{str(value).lower()}' for key, value in asdict(layout).items())}}}"]
        return [
            *found,
            f"trainer.microbatch_tokens={job.batch.microbatch_tokens}",
            f"trainer.logits_chunk_tokens={job.logits_chunk_tokens}",
            f"engine.tensor={job.engine.tensor}",
            f"engine.kv_cache_mib={int(job.engine.kv_cache_gib * 1024)}",
            f"engine.max_num_seqs={job.engine.max_num_seqs}",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.label,
            "gpus": self.cluster.gpus,
            "gpu": self.cluster.gpu.name,
            "fits": self.fits,
            "binding": self.binding,
            "memory_gib": {phase: round(total(parts) / GIB, 2) for phase, parts in self.phases.items()},
            "memory_by_purpose_gib": {
                phase: {name: round(value / GIB, 2) for name, value in parts.items() if value} for phase, parts in self.phases.items()
            },
            "host_memory_per_node_gib": round(self.host_bytes / GIB, 1),
            "seconds": {phase: round(value, 2) for phase, value in self.seconds.items()},
            "step_seconds": round(self.step_seconds, 2),
            "overrides": self.overrides,
        }


def price(job: Job, cluster: Cluster) -> Plan:
    """Raises ValueError where the layout breaks a rule that no memory mends."""
    job.check(cluster.gpus)
    phases = phase_memory(job, cluster.gpus, Runtime.cuda(job.assumptions))
    in_node = min(cluster.per_node, cluster.gpus)
    return Plan(job, cluster, phases, step_seconds(job, cluster), host_memory(job, cluster.gpus) * in_node)


def with_largest_cache(job: Job, cluster: Cluster) -> Job:
    """Key-value cache from what the other tenants leave: no more than all sequences need, no less than one context."""
    empty = replace(job, engine=replace(job.engine, kv_cache_gib=0.0))
    runtime = Runtime.cuda(job.assumptions)
    phases = phase_memory(empty, cluster.gpus, runtime)
    left = cluster.gpu.memory_gib * GIB - max(total(phases[phase]) for phase in ("generate", "sync"))
    per_token = max(kv_bytes_per_token(agent.arch, job.engine) for agent in job.agents.values())
    least, most = job.batch.context_tokens * per_token, job.engine.max_num_seqs * job.batch.trace_tokens * per_token
    cache = min(max(left / (1 + runtime.fragmentation) / len(job.agents), least), most)
    return replace(job, engine=replace(job.engine, kv_cache_gib=math.floor(cache / GIB * 8) / 8 or cache / GIB))


def candidates(job: Job, cluster: Cluster) -> Iterator[Job]:
    """The job at every layout that its models can be cut into. Tensor ranks stay in a node; ZeRO-1 wherever there is data parallelism."""
    world, archs = cluster.gpus, [model.arch for model in job.models]
    tensors = [size for size in _powers(min(cluster.per_node, world)) if all(_cuts(arch, size) for arch in archs)]
    pipelines = [
        size for size in range(1, min(_LARGEST_PIPELINE, world) + 1) if world % size == 0 and all(a.num_layers % size == 0 for a in archs)
    ]
    engines = [
        size for size in _powers(min(cluster.per_node, world)) if all(agent.arch.num_heads % size == 0 for agent in job.agents.values())
    ]
    microbatches = [job.batch.microbatch_tokens * factor for factor in (1, 2, 4)]
    frozen = [False, True] if job.reference or job.reward_model is not None else [False]  # rest in host memory whatever the actor does
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if world % (tensor * pipeline):
            continue
        virtuals = [size for size in (1, 2) if size == 1 or (pipeline > 1 and all(a.num_layers % (pipeline * 2) == 0 for a in archs))]
        for virtual, recompute, offload, frozen_offload in itertools.product(virtuals, (False, True), (False, True), frozen):
            if offload and frozen_offload:
                continue
            actor = LayoutConfig(
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                sequence_parallel=tensor > 1,
                distributed_optimizer=world > tensor * pipeline,
                recompute=recompute,
                offload=offload,
            )
            parallel = _parallel(job, actor, frozen_offload)
            for tokens, chunk, engine in itertools.product(microbatches, (0, LOGITS_CHUNK), engines):
                batch = replace(job.batch, microbatch_tokens=tokens)
                yield replace(job, parallel=parallel, batch=batch, logits_chunk_tokens=chunk, engine=replace(job.engine, tensor=engine))


def _parallel(job: Job, actor: LayoutConfig, frozen_offload: bool) -> ParallelConfig:
    """Everyone as the actor, but for what must or may differ: the exact KL's reference is of one stage, frozen models may rest."""
    offload = actor.offload or frozen_offload
    frozen = replace(actor, distributed_optimizer=False, recompute=False, offload=offload)
    reference = replace(frozen, pipeline=1, virtual_pipeline=1) if job.exact_kl else frozen
    return ParallelConfig(
        actor=actor,
        reference=reference if job.reference else None,
        reward_model=frozen if job.reward_model is not None else None,
    )


def _powers(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length()) if 1 << power <= largest]


def _cuts(arch: Any, tensor: int) -> bool:
    return all(value % tensor == 0 for value in (arch.num_heads, arch.num_kv_heads, arch.ffn_hidden_size))


def is_allowed(job: Job, cluster: Cluster) -> bool:
    """Can these models and this number of GPUs be cut so?"""
    try:
        job.check(cluster.gpus)
    except ValueError:
        return False
    return True


def search(job: Job, cluster: Cluster) -> tuple[list[Plan], Plan | None]:
    """Plans that fit, fastest first; and, where none does, the one that is nearest to it."""
    fitting, nearest = [], None
    for candidate in candidates(job, cluster):
        plan = price(with_largest_cache(candidate, cluster), cluster)
        if plan.fits:
            fitting.append(plan)
        elif nearest is None or plan.peak < nearest.peak:
            nearest = plan
    return sorted(fitting, key=lambda plan: plan.step_seconds), None if fitting else nearest


# --- a layout in one line ---------------------------------------------------------------------------------------------

_FLAGS = {"sp": "sequence_parallel", "zero1": "distributed_optimizer", "recompute": "recompute", "offload": "offload"}
_NUMBERS = {"t": "tensor", "p": "pipeline", "v": "virtual_pipeline"}


def label(job: Job) -> str:
    """``t4 p2 v2 sp zero1 recompute offload mb8192 chunk1024 e4 kv16``: the actor's layout, then microbatch, chunk and engine."""
    layout = job.parallel.actor
    words = [f"t{layout.tensor}", f"p{layout.pipeline}"] + [f"v{layout.virtual_pipeline}"] * (layout.virtual_pipeline > 1)
    words += [word for word, name in _FLAGS.items() if getattr(layout, name)]
    frozen = [own for own in (job.parallel.reference, job.parallel.reward_model) if own is not None]
    words += ["frozen-offload"] * (not layout.offload and any(own.offload for own in frozen))
    words += [f"mb{job.batch.microbatch_tokens}"] + [f"chunk{job.logits_chunk_tokens}"] * (job.logits_chunk_tokens > 0)
    return " ".join([*words, f"e{job.engine.tensor}", f"kv{job.engine.kv_cache_gib:g}"])


def with_label(job: Job, text: str, cluster: Cluster) -> Job:
    """``job`` at the layout that ``text`` names; without ``kv`` the cache takes what is left. Raises ValueError naming the word."""
    numbers: dict[str, float] = {}
    flags = set()
    for word in text.split():
        match = re.fullmatch(r"(t|p|v|mb|chunk|e|kv)(\d+(?:\.\d+)?)", word)
        if match is None and word not in (*_FLAGS, "frozen-offload"):
            raise ValueError(
                f"layout word {word!r} is unknown; words are like t4 p2 v2 sp zero1 recompute offload frozen-offload mb8192 "
                "chunk1024 e4 kv16: correct it."
            )
        if match is None:
            flags.add(word)
        else:
            numbers[match[1]] = float(match[2])
    actor = LayoutConfig(
        **{name: int(numbers.get(letter, 1)) for letter, name in _NUMBERS.items()}, **{name: word in flags for word, name in _FLAGS.items()}
    )
    batch = replace(job.batch, microbatch_tokens=int(numbers.get("mb", job.batch.microbatch_tokens)))
    engine = replace(job.engine, tensor=int(numbers.get("e", job.engine.tensor)), kv_cache_gib=numbers.get("kv", job.engine.kv_cache_gib))
    parallel = _parallel(job, actor, "frozen-offload" in flags)
    result = replace(job, parallel=parallel, batch=batch, logits_chunk_tokens=int(numbers.get("chunk", 0)), engine=engine)
    result.check(cluster.gpus)
    return result if "kv" in numbers else with_largest_cache(result, cluster)
