"""Traces -> packed Batches. The one place where labels are shifted: ``labels = token_ids[1:]``.

Shapes: T label positions of one packed batch, K turns of one trace, L tokens of one trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from megatron_rema.algorithm.losses import aggregation_weights
from megatron_rema.parallel.groups import Groups
from megatron_rema.parallel.microbatch import Plan, padded_tokens, plan_microbatches
from megatron_rema.parallel.platform import device
from megatron_rema.types import Batch, Trace


@dataclass(frozen=True)
class Counts:
    """Global normalisers of one optimizer step: taken over every trace of the minibatch, whichever rank trains on it."""

    num_tokens: int  # trainable tokens
    num_turns: int
    num_traces: int

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Counts:
        """Only what has a label counts: a trace's first token is never predicted."""
        turns = [len(set(trace.turn_ids[1:]) - {-1}) for trace in traces]
        return cls(sum(sum(trace.loss_mask[1:]) for trace in traces), sum(turns), sum(number > 0 for number in turns))


def is_trainable(trace: Trace) -> bool:
    """A trace without an own token after its first position has nothing to predict."""
    return any(trace.loss_mask[1:])


def pack(traces: Sequence[Trace], length: int, columns: Mapping[str, Sequence[torch.Tensor]] | None = None) -> Batch:
    """Lay traces end to end in ``length`` positions; what is left becomes padding sequences, none longer than the longest trace.

    A trace of L tokens takes L-1 positions: its last token is only ever a label. ``columns`` are further per-token fields of Batch
    (old_logprobs, values, ...), one [L-1] tensor a trace; where given, they stand instead of what the traces say.
    Raises ValueError when the traces do not fit.
    """
    sizes = [len(trace.token_ids) - 1 for trace in traces]
    used = sum(sizes)
    if used > length:
        raise ValueError(f"{len(traces)} traces need {used} positions, the batch has {length}; plan with larger microbatch_tokens.")
    longest = max(sizes, default=min(length, 128))
    padding = [min(longest, length - start) for start in range(used, length, longest)]
    tokens: list[int] = []
    labels: list[int] = []
    mask: list[bool] = []
    turn_ids: list[int] = []
    trace_ids: list[int] = []
    rollout_logprobs: list[float] = []
    advantages: list[float] = []
    first_turn = 0
    for index, trace in enumerate(traces):
        tokens += trace.token_ids[:-1]
        labels += trace.token_ids[1:]
        mask += trace.loss_mask[1:]
        turn_ids += [turn if turn < 0 else turn + first_turn for turn in trace.turn_ids[1:]]
        trace_ids += [index] * (len(trace.token_ids) - 1)
        rollout_logprobs += trace.rollout_logprobs[1:]
        per_turn = trace.advantages
        advantages += [per_turn[turn] if turn >= 0 and per_turn else 0.0 for turn in trace.turn_ids[1:]]
        first_turn += 1 + max(trace.turn_ids, default=-1)
    rest = length - used
    for index, size in enumerate(padding, start=len(traces)):
        trace_ids += [index] * size
    positions = torch.cat([torch.arange(size) for size in [*sizes, *padding]])
    boundaries = torch.tensor([0, *sizes, *padding], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    turn_ids_T = torch.tensor(turn_ids + [-1] * rest)
    # where later turns begin; one without a label has the start of the next
    starts = torch.searchsorted(turn_ids_T.cummax(0).values, torch.arange(1, max(first_turn, 1)))
    batch = Batch(
        tokens=torch.tensor(tokens + [0] * rest),
        labels=torch.tensor(labels + [0] * rest),
        positions=positions,
        cu_seqlens=boundaries,
        max_seqlen=longest,
        loss_mask=torch.tensor(mask + [False] * rest),
        turn_ids=turn_ids_T,
        trace_ids=torch.tensor(trace_ids),
        cu_turns=torch.cat([torch.tensor([0]), starts, torch.tensor([length])]),
        rollout_logprobs=torch.tensor(rollout_logprobs + [0.0] * rest),
        advantages=torch.tensor(advantages + [0.0] * rest),
    )
    padded = {name: torch.cat([*pieces, torch.zeros(rest)]) for name, pieces in (columns or {}).items()}
    return replace(batch, **_allowed(traces, length), **padded)


def _allowed(traces: Sequence[Trace], length: int) -> dict[str, torch.Tensor]:
    """``allowed_sets`` and ``allowed_ids`` of a batch; nothing where no trace is constrained. Set 0 is the whole vocabulary."""
    numbers: dict[bytes | None, int] = {None: 0}
    ids: list[int] = []
    for trace in traces:
        labels = trace.allowed[1:] or [None] * (len(trace.token_ids) - 1)
        ids += [numbers.setdefault(token_set, len(numbers)) for token_set in labels]
    if len(numbers) == 1:
        return {}
    num_bytes = len(next(token_set for token_set in numbers if token_set))
    sets = b"".join(b"\xff" * num_bytes if token_set is None else token_set for token_set in numbers)
    return {
        "allowed_sets": torch.frombuffer(bytearray(sets), dtype=torch.int32).view(len(numbers), -1),
        "allowed_ids": torch.tensor(ids + [0] * (length - len(ids))),
    }


def plan_for(traces: Sequence[Trace], *, microbatch_tokens: int, groups: Groups) -> tuple[Plan, int]:
    """Who trains on which trace in which microbatch, and the length of all microbatches. Equal on all ranks without communication."""
    lengths, multiple = [len(trace.token_ids) - 1 for trace in traces], 8 * groups.tensor_size
    plan = plan_microbatches(lengths, max_tokens=microbatch_tokens, num_ranks=groups.data_size, multiple=multiple)
    return plan, padded_tokens(plan, lengths, multiple=multiple)


def pack_for_rank(
    traces: Sequence[Trace],
    *,
    aggregation: str,
    max_turns: int,
    microbatch_tokens: int,
    groups: Groups,
    columns: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> list[Batch]:
    """This data-parallel rank's microbatches of one optimizer step, all of one length, loss weights set.

    ``max_turns`` (of the protocol, not of the data) scales the ``constant`` aggregation. ``columns``: see `pack`.
    Every rank passes the same traces: the plan and the global counts need no communication.
    """
    plan, length = plan_for(traces, microbatch_tokens=microbatch_tokens, groups=groups)
    counts = Counts.of(traces)
    batches = []
    for indices in plan[groups.data_rank]:
        batch = pack([traces[i] for i in indices], length, {name: [column[i] for i in indices] for name, column in (columns or {}).items()})
        batch.loss_weights = aggregation_weights(
            batch.turn_ids,
            batch.trace_ids,
            batch.loss_mask,
            num_turns=batch.num_turns,
            aggregation=aggregation,
            num_tokens_global=counts.num_tokens,
            num_turns_global=counts.num_turns,
            num_traces_global=counts.num_traces,
            max_turns=max_turns,
        )
        batches.append(to_device(batch))
    return batches


def to_device(batch: Batch) -> Batch:
    """Every tensor of the batch where this process computes."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **{name: tensor.to(device()) for name, tensor in tensors.items()})
