"""Log-probability and entropy straight from hidden states and the output layer's weight: all logits never exist at once.

Shapes: T label positions, H hidden, V this rank's rows of the weight (columns [rank * V, (rank + 1) * V) of the padded vocabulary).
For a vocabulary of 150,000 the logits of one microbatch and their gradient are larger than the model's activations. Here they exist for
``chunk_tokens`` positions at a time, and are computed again in backward: one more matrix product of the output layer is the price.
Over the wire: forward, and again in backward, what `vocab_parallel_logprobs_and_entropy` says, once per chunk; in backward the gradient of
the hidden states summed over the ranks that share the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rema.parallel.vocab import vocab_parallel_logprobs_and_entropy


def linear_logprobs_and_entropy(
    hidden_TH: Tensor,
    local_weight_VH: Tensor,
    labels_T: Tensor,
    tp_group: ProcessGroup | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    vocab_size: int,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor | None]:
    """`vocab_parallel_logprobs_and_entropy` of the logits ``hidden @ weight.T``, with gradients for both.

    ``hidden_TH`` is the same on every rank of ``tp_group``, and so is its gradient; the weight's is this rank's, summed over
    chunks in its own dtype. Every rank must run backward. Raises ValueError for fewer than one token in a chunk.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}.")
    options = {"temperature": temperature, "with_entropy": with_entropy, "vocab_size": vocab_size}
    logprobs_T, entropy_T = _Linear.apply(hidden_TH, local_weight_VH, labels_T, tp_group, options, chunk_tokens)
    return logprobs_T, entropy_T if with_entropy else None


class _Linear(torch.autograd.Function):
    """Chunks of tokens one after the other; backward makes each chunk's logits again and writes their gradient over them."""

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, labels_T, tp_group, options, chunk_tokens):
        results = []
        for rows in _chunks(len(labels_T), chunk_tokens):
            results.append(vocab_parallel_logprobs_and_entropy(hidden_TH[rows] @ weight_VH.T, labels_T[rows], tp_group, **options))
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T)
        ctx.call = (tp_group, options, chunk_tokens)
        logprobs_T = torch.cat([logprobs for logprobs, _ in results])
        return logprobs_T, torch.cat([entropy for _, entropy in results]) if options["with_entropy"] else logprobs_T.new_zeros(0)

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        hidden_TH, weight_VH, labels_T = ctx.saved_tensors
        tp_group, options, chunk_tokens = ctx.call
        grad_hidden_TH, grad_weight_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        for rows in _chunks(len(labels_T), chunk_tokens):
            logits_CV = (hidden_TH[rows] @ weight_VH.T).requires_grad_()
            with torch.enable_grad():
                outputs = vocab_parallel_logprobs_and_entropy(logits_CV, labels_T[rows], tp_group, overwrite_logits=True, **options)
            used = 2 if options["with_entropy"] else 1
            incoming = (grad_logprobs_T[rows], grad_entropy_T[rows] if used == 2 else None)
            (grad_CV,) = torch.autograd.grad(outputs[:used], logits_CV, incoming[:used])
            torch.mm(grad_CV, weight_VH, out=grad_hidden_TH[rows])
            grad_weight_VH.addmm_(grad_CV.T, hidden_TH[rows])
        if tp_group is not None and dist.get_world_size(tp_group) > 1:
            dist.all_reduce(grad_hidden_TH, group=tp_group)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    """At least one, so that no tokens give empty results of the right kind."""
    return [slice(start, min(start + chunk_tokens, tokens)) for start in range(0, max(tokens, 1), chunk_tokens)]
