"""The planner's memory of an update against what the allocator counts while megatron-core does one, rank by rank.

Measured: the highest sum of live bytes of torch's CPU allocator over building model and optimizer and two whole updates (the first makes
Adam's state), temporaries inside operations included. `pytest tests/distributed/test_planning.py -s` prints the table of docs/planning.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_rema.architecture import Architecture
from megatron_rema.config import AlgorithmConfig, LayoutConfig
from megatron_rema.kernels import library
from megatron_rema.models.optimizer import build_optimizer
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.planning.memory import Work, scoring, total, updating, weights
from megatron_rema.planning.shapes import Shard
from megatron_rema.trainer.experience import pack_for_rank
from megatron_rema.trainer.scoring import label_logprobs
from megatron_rema.trainer.update import update_critic, update_policy
from megatron_rema.types import Role, Trace

MIB = 1 << 20
TOLERANCE = 0.15
MEASURED = "measured"
# 5 million parameters: weights, state, activations and logits each weigh something
QWEN2 = Architecture(
    family="qwen2",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=4000,
    rope_theta=1e4,
    rope_scaling_factor=None,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tied=False,
    max_positions=4096,
    eos_token_ids=(0,),
)
QWEN3_TIED = replace(QWEN2, family="qwen3", qkv_bias=False, qk_norm=True, tied=True)


@dataclass(frozen=True)
class Case:
    world: int = 1
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    arch: Architecture = QWEN2
    bfloat16: bool = False
    microbatches: int = 1
    tokens: int = 512
    logits_chunk_tokens: int = 0
    critic: bool = False
    exact_kl: bool = False
    uneven: bool = False
    kernels: str = "fused"
    scores_only: bool = False  # a frozen model's log-probabilities, no update

    @property
    def data(self) -> int:
        return self.world // (self.layout.tensor * self.layout.pipeline)

    @property
    def lengths(self) -> list[int]:
        """Of one microbatch's traces."""
        quarter = self.tokens // 4
        eighths = (10, 9, 7, 6) if self.uneven else (8, 8, 8, 8)
        return [quarter * number // 8 for number in eighths]

    def work(self) -> Work:
        longest = max(self.lengths)
        return Work(
            tokens=self.tokens,
            microbatches=self.microbatches,
            element_bytes=2 if self.bfloat16 else 4,
            data=self.data,
            logits_chunk_tokens=self.logits_chunk_tokens,
            fused_kernels=self.kernels == "fused",
            padding=sum(longest if length >= 0.75 * longest else length for length in self.lengths) / self.tokens if self.uneven else None,
        )


def traces(case: Case) -> list[Trace]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(case.lengths * case.microbatches * case.data):
        tokens = tuple(torch.randint(0, case.arch.vocab_size, (length + 1,), generator=generator).tolist())
        mask = tuple(position > length // 2 for position in range(length + 1))
        turns = tuple(0 if own else -1 for own in mask)
        made.append(Trace(str(index), Role.REASONING, tokens, mask, turns, tuple(-8.3 * own for own in mask), (0.0,), (1.0,)))
    return made


def two_updates(case: Case) -> None:
    groups = build_groups(tensor=case.layout.tensor, pipeline=case.layout.pipeline)
    layout, dtype = case.layout, torch.bfloat16 if case.bfloat16 else torch.float32
    shared = {"dtype": dtype, "sequence_parallel": layout.sequence_parallel, "logits_chunk_tokens": case.logits_chunk_tokens}
    model = build_policy(
        case.arch.with_scalar_head(1) if case.critic else case.arch,
        groups=groups,
        seed=1,
        virtual=layout.virtual_pipeline,
        recompute=layout.recompute,
        distributed_optimizer=layout.distributed_optimizer,
        **shared,
    )
    optimizer = build_optimizer(model, lr=1e-3, total_steps=2)
    reference = build_policy(case.arch, groups=groups, seed=2, trainable=False, **shared) if case.exact_kl else None
    algorithm = AlgorithmConfig(kl_coef=0.1 * case.exact_kl, kl_estimator="exact" if case.exact_kl else "k3")
    step = traces(case)
    columns = {}
    if case.critic:
        columns = {name: [torch.zeros(len(trace.token_ids) - 1) for trace in step] for name in ("values", "returns")}
    batches = pack_for_rank(step, groups=groups, aggregation="turn", max_turns=1, microbatch_tokens=case.tokens, columns=columns)
    assert len(batches) == case.microbatches and len(batches[0].tokens) == case.tokens, "the case says what is run"
    for number in range(2):
        time.sleep(0.1 * number)  # gloo's threads let go of what they copied, on a busy machine too
        if case.critic:
            update_critic(model, optimizer, batches, value_clip=0.2)
        else:
            update_policy(model, optimizer, batches, algorithm=algorithm, temperature=1.0, reference=reference)


def scores(case: Case) -> None:
    groups = build_groups(tensor=case.layout.tensor, pipeline=case.layout.pipeline)
    model = build_policy(
        case.arch,
        groups=groups,
        seed=1,
        trainable=False,
        dtype=torch.bfloat16 if case.bfloat16 else torch.float32,
        sequence_parallel=case.layout.sequence_parallel,
        logits_chunk_tokens=case.logits_chunk_tokens,
    )
    with record_function(MEASURED):  # not how random weights are drawn, whole and in float32
        label_logprobs(model, traces(case), temperature=1.0, microbatch_tokens=case.tokens)


def peak_bytes(case: Case) -> float:
    """The most bytes that torch's CPU allocator had given out at once."""
    library.select(case.kernels, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (scores if case.scores_only else two_updates)(case)
    return peak_of(profiler.profiler.kineto_results.experimental_event_tree())


def peak_of(tree: list) -> float:
    """Replays what was allocated and freed. What gloo's threads free after a collective the profiler does not see: a copy that a collective
    made and nobody frees is taken as gone at the next allocation outside collectives."""
    events, begin = [], 0
    waiting = [(event, False) for event in tree]
    while waiting:
        event, in_collective = waiting.pop()
        in_collective = in_collective or event.name.startswith(("c10d::", "gloo:"))
        waiting.extend((child, in_collective) for child in event.children)
        kind, details = event.typed
        if kind == _EventType.Allocation:
            events.append((event.start_time_ns, details.ptr, details.alloc_size, in_collective))
        elif event.name == MEASURED:
            begin = event.start_time_ns
    events.sort(key=lambda event: event[0])
    freed_at: dict[int, int] = {}  # index of an allocation -> index of what frees it
    last: dict[int, int] = {}
    for index, (_, pointer, size, _) in enumerate(events):
        if size > 0:
            last[pointer] = index
        elif pointer in last:
            freed_at[last.pop(pointer)] = index
    live, peak = 0.0, 0.0
    forgotten = 0.0
    for index, (time_ns, _, size, in_collective) in enumerate(events):
        if size > 0 and not in_collective:
            live, forgotten = live - forgotten, 0.0
        live += size
        if size > 0 and in_collective and index not in freed_at:
            forgotten += size
        if time_ns >= begin:
            peak = max(peak, live)
    return peak


def predicted_bytes(case: Case, stage: int) -> float:
    arch = case.arch.with_scalar_head(1) if case.critic else case.arch
    shard = Shard(arch, case.layout, stage)
    if case.scores_only:
        return total(scoring(shard, case.work()))
    others = total(weights(shard, case.work())) if case.exact_kl else 0.0
    return total(updating(shard, case.work(), exact_kl=case.exact_kl)) + others


def cut(**settings) -> LayoutConfig:
    return LayoutConfig(**settings)


ZERO1 = {"distributed_optimizer": True}
CASES = {
    "TP1": Case(),
    "TP1, Qwen3, tied": Case(arch=QWEN3_TIED),
    "uneven lengths": Case(uneven=True),
    "two microbatches, bfloat16": Case(bfloat16=True, microbatches=2),
    "recompute": Case(layout=cut(recompute=True)),
    "logits_chunk_tokens 128": Case(logits_chunk_tokens=128),
    "critic": Case(critic=True),
    "exact KL": Case(exact_kl=True),
    "exact KL, logits_chunk_tokens 128, uneven": Case(exact_kl=True, logits_chunk_tokens=128, uneven=True),
    "plain torch instead of kernels": Case(kernels="reference"),
    "scores, TP1": Case(scores_only=True),
    "scores, PP2, uneven": Case(2, cut(pipeline=2), scores_only=True, uneven=True, microbatches=2),
    "scores, TP2, logits_chunk_tokens 128, bfloat16": Case(2, cut(tensor=2), scores_only=True, logits_chunk_tokens=128, bfloat16=True),
    "TP2": Case(2, cut(tensor=2)),
    "TP2, sequence parallel, uneven": Case(2, cut(tensor=2, sequence_parallel=True), uneven=True),
    "TP4, sequence parallel": Case(4, cut(tensor=4, sequence_parallel=True)),
    "DP2, ZeRO-1, bfloat16": Case(2, cut(**ZERO1), bfloat16=True),
    "DP2, ZeRO-1, few tokens": Case(2, cut(**ZERO1), tokens=64),
    "PP2": Case(2, cut(pipeline=2), microbatches=3),
    "PP2, tied, recompute": Case(2, cut(pipeline=2, recompute=True), arch=QWEN3_TIED, microbatches=2),
    "PP2, 2 virtual stages": Case(2, cut(pipeline=2, virtual_pipeline=2), microbatches=4),
    "TP2 x PP2, sequence parallel, bfloat16": Case(4, cut(tensor=2, pipeline=2, sequence_parallel=True), bfloat16=True, microbatches=3),
}


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak_is_what_the_allocator_counts(run_ranks, name):
    case = CASES[name]
    measured = run_ranks(case.world, peak_bytes, case, timeout_s=120)
    for rank, peak in enumerate(measured):
        stage = rank * case.layout.pipeline // case.world
        predicted = predicted_bytes(case, stage)
        error = predicted / peak - 1
        print(f"| {name} | {rank} | {peak / MIB:.1f} | {predicted / MIB:.1f} | {error:+.1%} |")
        assert abs(error) <= TOLERANCE, (name, rank, peak, predicted)
