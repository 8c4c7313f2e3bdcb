"""What the machines are, by name, and every assumption that a prediction rests on, with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields

GIB = float(1 << 30)


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one device; what of them is reached is in `Assumptions`."""

    name: str
    memory_gib: float  # that a process sees
    tflops: float  # bfloat16, dense
    memory_gb_per_s: float
    intra_node_gb_per_s: float  # to another device of the node, one direction
    inter_node_gb_per_s: float  # to another node, one direction, this device's share of the network
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 79, 312, 2039, 300, 25, "NVIDIA A100 80GB SXM datasheet; NVLink 600 GB/s both ways; one HDR 200 Gb/s port a GPU"),
        Gpu("h100", 79, 989, 3350, 450, 50, "NVIDIA H100 SXM datasheet; NVLink 900 GB/s both ways; one NDR 400 Gb/s port a GPU"),
        Gpu("h200", 139, 989, 4800, 450, 50, "NVIDIA H200 SXM datasheet; NVLink 900 GB/s both ways; one NDR 400 Gb/s port a GPU"),
    )
}


@dataclass(frozen=True)
class Cluster:
    """``gpus`` devices of one kind, ``per_node`` of them in each node."""

    gpu: Gpu
    gpus: int
    per_node: int = 8
    node_memory_gib: float = 2048.0  # of host memory, for what is offloaded

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise ValueError(f"gpus ({self.gpus}) and gpus_per_node ({self.per_node}) must be at least 1.")
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"gpus ({self.gpus}) must be a multiple of gpus_per_node ({self.per_node}); got remainder {self.gpus % self.per_node}: "
                "nodes are taken whole."
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


@dataclass(frozen=True)
class Assumptions:
    """Everything that is not counted but assumed; each may be set. ``Where`` says what stands behind each figure."""

    training_efficiency: float = 0.40  # of tflops, in forward and backward
    float32_slowdown: float = 15.0  # of float32 models
    prefill_efficiency: float = 0.45  # of tflops, in the engine's prefill
    decode_efficiency: float = 0.60  # of memory_gb_per_s, in the engine's decoding
    link_efficiency: float = 0.75  # of either link
    host_gb_per_s: float = 50.0  # between device and host memory
    decode_step_overhead_ms: float = 4.0  # of the engine, once per token of a batch
    engine_occupancy: float = 0.7  # of the sequences that fit are running, averaged over a rollout with its tail
    token_fill: float = 0.6  # of the token budgets that episodes use, averaged; memory is planned for all of them
    padding: float = 1.1  # cells of attention for each token, where lengths differ
    device_overhead_gib: float = 3.0  # context, communicators, compiled code
    fragmentation: float = 0.05  # of what is allocated, in the allocator's gaps
    engine_overhead_gib: float = 2.5  # of each engine: CUDA graphs and work space


WHERE = {
    "training_efficiency": "assumed; megatron-core's README states up to 47% of peak on H100 for GPT models, packed RL batches reach less",
    "float32_slowdown": "NVIDIA H100 SXM datasheet: 989 TFLOPS in bfloat16, 67 in float32",
    "prefill_efficiency": "assumed",
    "decode_efficiency": "assumed",
    "link_efficiency": "assumed",
    "host_gb_per_s": "assumed; PCIe 5.0 x16 has 64 GB/s",
    "decode_step_overhead_ms": "assumed; vLLM's scheduler and sampler",
    "engine_occupancy": "assumed",
    "token_fill": "assumed",
    "padding": "bounded by parallel/pipeline.py: at most 1 / 0.75",
    "device_overhead_gib": "assumed",
    "fragmentation": "assumed",
    "engine_overhead_gib": "assumed",
}


def with_settings(assumptions: Assumptions, settings: dict[str, float]) -> Assumptions:
    """``assumptions`` with some of its figures replaced. Raises ValueError naming one that does not exist or is not positive."""
    known = {field.name for field in fields(Assumptions)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"assumption {name!r} is unknown; there are {', '.join(sorted(known))}: correct it.")
        if value < 0 or (value == 0 and not name.endswith(("gib", "ms", "fragmentation"))):
            raise ValueError(f"assumption {name} is {value}; it must be positive: correct it.")
    return Assumptions(**{**vars(assumptions), **settings})


@dataclass(frozen=True)
class Runtime:
    """How libraries of one kind of device use memory."""

    adam_temporaries: int  # float32 copies of the largest parameter inside an optimizer step
    copies_for_collectives: bool  # gloo copies a gradient buffer before it reduces and scatters it
    engine_sleeps: bool  # the engine's weights and cache leave the device while others work
    overhead_bytes: float = 0.0
    fragmentation: float = 0.0

    @classmethod
    def cuda(cls, assumptions: Assumptions) -> Runtime:
        """Transformer Engine's fused Adam, NCCL, vLLM's sleep mode."""
        return cls(0, False, True, assumptions.device_overhead_gib * GIB, assumptions.fragmentation)


CPU = Runtime(adam_temporaries=2, copies_for_collectives=True, engine_sleeps=False)  # torch's Adam, gloo
