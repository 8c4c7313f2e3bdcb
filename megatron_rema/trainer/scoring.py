"""Forward-only passes over whole traces, at any model's own layout: every rank gets every trace's numbers, trace by trace.

A model's data-parallel ranks score different traces, and only its last stage holds the outputs; models of other layouts need them cut
otherwise. So scores leave a model as one tensor a trace, and are packed again for whoever trains on them.
Shapes: L tokens of one trace, T positions of one packed batch, K outputs per position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rema.models.policy import ParallelModel
from megatron_rema.parallel.pipeline import broadcast_from_last_stage
from megatron_rema.trainer.experience import pack, plan_for, to_device
from megatron_rema.types import Batch, Trace


def label_logprobs(model: ParallelModel, traces: Sequence[Trace], *, temperature: float, microbatch_tokens: int) -> list[Tensor]:
    """[L-1] log-probabilities (nats) of each trace's labels under ``model``. A collective of the world."""

    def outputs(last: Tensor, batch: Batch) -> Tensor:
        return model.statistics(last, batch, temperature=temperature).logprobs[:, None]

    return [columns_LK[:, 0] for columns_LK in _per_trace(model, traces, outputs, width=1, microbatch_tokens=microbatch_tokens)]


def scalars(model: ParallelModel, traces: Sequence[Trace], *, microbatch_tokens: int) -> list[Tensor]:
    """[L-1, K] outputs of a scalar-head model at every position of each trace. A collective of the world."""
    return _per_trace(model, traces, lambda values_TK, _: values_TK, width=model.arch.num_scalars, microbatch_tokens=microbatch_tokens)


def _per_trace(
    model: ParallelModel,
    traces: Sequence[Trace],
    outputs: Callable[[Tensor, Batch], Tensor],
    *,
    width: int,
    microbatch_tokens: int,
) -> list[Tensor]:
    groups = model.groups
    plan, length = plan_for(traces, microbatch_tokens=microbatch_tokens, groups=groups)
    batches = [to_device(pack([traces[i] for i in indices], length)) for indices in plan[groups.data_rank]]

    def keep(local: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        values_TK = outputs(local, batch).detach().float()
        return values_TK.sum(), {"values": values_TK}

    with model.resident():
        results = model.forward_backward(batches, keep, forward_only=True)
    shapes = [{"values": torch.empty(length, width, device=batch.tokens.device)} for batch in batches]
    mine = torch.stack([result["values"] for result in broadcast_from_last_stage(results, shapes, groups)])
    everyone = [torch.empty_like(mine) for _ in range(groups.data_size)]
    dist.all_gather(everyone, mine, group=groups.dp)
    scores: list[Tensor] = [torch.empty(0)] * len(traces)
    for rank, microbatches in enumerate(plan):
        for number, indices in enumerate(microbatches):
            sizes = [len(traces[i].token_ids) - 1 for i in indices]
            pieces = everyone[rank][number].cpu().split([*sizes, length - sum(sizes)])
            for index, piece in zip(indices, pieces, strict=False):  # the last piece is padding
                scores[index] = piece
    return scores
