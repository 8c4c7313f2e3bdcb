"""Log-probability, entropy and KL straight from hidden states and the output layer's weight: all logits never exist at once.

Shapes: T label positions, C of them in a chunk, H hidden, V this rank's rows of the weight (columns [rank * V, (rank + 1) * V) of the
padded vocabulary).
For a vocabulary of 150,000 the logits of one microbatch and their gradient are larger than the model's activations. Here they exist for
``chunk_tokens`` positions at a time, and are computed again in backward: one more matrix product of the output layer is the price.
Over the wire: forward, and again in backward, what `vocab_parallel_statistics` says, once per chunk; in backward the gradient of the hidden
states summed over the ranks that share the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rema.kernels.logits import Statistics
from megatron_rema.parallel.vocab import vocab_parallel_statistics


class Factors(NamedTuple):
    """Logits that nobody has multiplied out yet: ``hidden @ local_weight.T``."""

    hidden_TH: Tensor  # the same on every rank that shares the vocabulary
    local_weight_VH: Tensor


def linear_statistics(
    logits: Factors,
    labels_T: Tensor,
    tp_group: ProcessGroup | None,
    *,
    ref_logits: Factors | None = None,
    allowed_sets_SW: Tensor | None = None,
    allowed_ids_T: Tensor | None = None,
    chunk_tokens: int = 1024,
    **options: float | bool,
) -> Statistics:
    """`vocab_parallel_statistics` of the factors' products, with gradients for both factors of ``logits``. ``options`` are its own.

    The gradient of the hidden states is the same on every rank of ``tp_group``; the weight's is this rank's, summed over chunks in its own
    dtype. Every rank must run backward. Raises ValueError for fewer than one token in a chunk.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")

    def statistics(logits_CV: Tensor, rows: slice) -> Statistics:
        return vocab_parallel_statistics(
            logits_CV,
            labels_T[rows],
            tp_group,
            local_ref_logits_TV=None if ref_logits is None else ref_logits.hidden_TH[rows] @ ref_logits.local_weight_VH.T,
            allowed_sets_SW=allowed_sets_SW,
            allowed_ids_T=None if allowed_ids_T is None else allowed_ids_T[rows],
            overwrite_logits=True,
            **options,
        )

    # at least one chunk, so that no tokens give empty results of the right kind
    chunks = [slice(start, min(start + chunk_tokens, len(labels_T))) for start in range(0, max(len(labels_T), 1), chunk_tokens)]
    return Statistics(*_Linear.apply(*logits, tp_group, chunks, statistics))


class _Linear(torch.autograd.Function):
    """Chunks of tokens one after the other; backward makes each chunk's logits again and writes their gradient over them."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, tp_group, chunks, statistics):
        results = [statistics(hidden_TH[rows] @ weight_VH.T, rows) for rows in chunks]
        ctx.save_for_backward(hidden_TH, weight_VH)
        ctx.call = (tp_group, chunks, statistics)
        ctx.set_materialize_grads(False)
        return tuple(None if values[0] is None else torch.cat(values) for values in zip(*results, strict=True))

    @staticmethod
    def backward(ctx, *grads_T):
        hidden_TH, weight_VH = ctx.saved_tensors
        tp_group, chunks, statistics = ctx.call
        grad_hidden_TH, grad_weight_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)

        def add(rows: slice) -> None:  # a function, so that a chunk's logits are gone before the next one's are made
            logits_CV = (hidden_TH[rows] @ weight_VH.T).requires_grad_()
            with torch.enable_grad():
                values = statistics(logits_CV, rows)
            used = [(value_C, grad_T[rows]) for value_C, grad_T in zip(values, grads_T, strict=True) if grad_T is not None]
            values_C, grads_C = zip(*used, strict=True)
            (grad_CV,) = torch.autograd.grad(values_C, logits_CV, grads_C)
            torch.mm(grad_CV, weight_VH, out=grad_hidden_TH[rows])
            grad_weight_VH.addmm_(grad_CV.T, hidden_TH[rows])

        for rows in chunks:
            add(rows)
        if tp_group is not None and dist.get_world_size(tp_group) > 1:
            dist.all_reduce(grad_hidden_TH, group=tp_group)
        return grad_hidden_TH, grad_weight_VH, None, None, None
