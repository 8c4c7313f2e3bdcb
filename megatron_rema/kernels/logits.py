"""Statistics of a token distribution from (a shard of) its logits: log-probability of the label, entropy, KL to reference logits.

Shapes: T label positions, V this rank's columns of the vocabulary, S shards, W = 4 numbers per token (8 with reference logits).
One read of the logits forward (``logits_partial``), one read and one write backward; kept for backward: the logits themselves and 2 (4)
numbers per token. Between the two halves of forward the caller gathers [S, T, W] from its tensor-parallel ranks (parallel/vocab.py).
Temperature is folded into the change to base 2; sums are float32 about a running maximum (csrc/core.h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rema.kernels import library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Statistics(NamedTuple):
    """[T] each, in nats. ``entropy`` is None where nobody asked for it, ``kl`` without reference logits."""

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def is_fused(logits_TV: Tensor) -> bool:
    """Whether the chosen mode has a kernel for these logits. ``kernels=fused`` raises ValueError for a dtype without one."""
    if not library.is_fused(logits_TV):
        return False
    if logits_TV.dtype not in _DTYPES and library.mode() == "fused":
        raise ValueError(f"fused kernels read float32, bfloat16 and float16 logits, got {logits_TV.dtype}: set kernels=auto.")
    return logits_TV.dtype in _DTYPES


def partial(
    logits_TV: Tensor, ref_logits_TV: Tensor | None, labels_T: Tensor, *, first_column: int, num_valid: int, temperature: float
) -> Tensor:
    """[T, W] what this shard contributes. Columns from ``num_valid`` on are padding. Not differentiable."""
    _check(logits_TV, ref_logits_TV, labels_T)
    ref_TV = None if ref_logits_TV is None else ref_logits_TV.detach()
    return torch.ops.megatron_rema.logits_partial(logits_TV.detach(), ref_TV, labels_T, first_column, num_valid, 1.0 / temperature)


def finish(
    parts_STW: Tensor,
    logits_TV: Tensor,
    ref_logits_TV: Tensor | None,
    labels_T: Tensor,
    *,
    first_column: int,
    num_valid: int,
    vocab_size: int,
    temperature: float,
    overwrite_logits: bool = False,
) -> Statistics:
    """Shards merged in rank order, with the gradient with respect to ``logits_TV`` (this rank's; reference logits have none).

    ``overwrite_logits``: backward writes the gradient over the logits, whose values must then be of no use to anybody else, and can be
    run once. A row whose incoming gradients are all 0 has gradient 0 and is not read.
    """
    _check(logits_TV, ref_logits_TV, labels_T)
    ref_TV = None if ref_logits_TV is None else ref_logits_TV.detach()
    logprobs_T, entropy_T, kl_T, _ = torch.ops.megatron_rema.logits_finish(
        parts_STW, logits_TV, ref_TV, labels_T, first_column, num_valid, vocab_size, 1.0 / temperature, overwrite_logits
    )
    return Statistics(logprobs_T, entropy_T, None if ref_logits_TV is None else kl_T)


def _check(logits_TV: Tensor, ref_logits_TV: Tensor | None, labels_T: Tensor) -> None:
    for name, tensor in (("logits", logits_TV), ("reference logits", ref_logits_TV)):
        if tensor is None:
            continue
        if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} have strides {tensor.stride()}; a row's columns must lie next to each other: "
                "call .contiguous() first."
            )
        if tensor.dtype not in _DTYPES or tensor.dtype != logits_TV.dtype or tensor.shape != logits_TV.shape:
            raise ValueError(
                f"{name} are {tuple(tensor.shape)} {tensor.dtype}; they must be float32, bfloat16 or float16, and reference logits "
                f"like the logits ({tuple(logits_TV.shape)} {logits_TV.dtype})."
            )
    if labels_T.shape != logits_TV.shape[:1] or labels_T.dtype != torch.int64 or not labels_T.is_contiguous():
        raise ValueError(f"labels are {tuple(labels_T.shape)} {labels_T.dtype}; they must be int64, contiguous, one per row of the logits.")


def _stride(tensor_TV: Tensor) -> int:
    return tensor_TV.stride(0) if tensor_TV.shape[0] > 1 else tensor_TV.shape[1]


@torch.library.custom_op("megatron_rema::logits_partial", mutates_args=())
def _partial(logits: Tensor, ref_logits: Tensor | None, labels: Tensor, first_column: int, num_valid: int, scale: float) -> Tensor:
    part = torch.empty(logits.shape[0], 4 if ref_logits is None else 8, dtype=torch.float32, device=logits.device)
    ref_stride = 0 if ref_logits is None else _stride(ref_logits)
    library.get(logits.device).call(
        "rema_logits_partial", logits.device, logits, ref_logits, _DTYPES[logits.dtype], logits.shape[0], num_valid, _stride(logits),
        ref_stride, labels, first_column, scale, part,
    )  # fmt: skip
    return part


@_partial.register_fake
def _(logits, ref_logits, labels, first_column, num_valid, scale):
    return torch.empty(logits.shape[0], 4 if ref_logits is None else 8, dtype=torch.float32, device=logits.device)


@torch.library.custom_op("megatron_rema::logits_finish", mutates_args=())
def _finish(
    parts: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    first_column: int,
    num_valid: int,
    vocab_size: int,
    scale: float,
    overwrite_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, kl, norms = _finish_shapes(logits, ref_logits)
    library.get(logits.device).call(
        "rema_logits_finish", logits.device, parts, ref_logits is not None, parts.shape[0], parts.shape[1], labels, vocab_size, scale,
        logprobs, entropy, kl, norms,
    )  # fmt: skip
    return logprobs, entropy, kl, norms


@_finish.register_fake
def _(parts, logits, ref_logits, labels, first_column, num_valid, vocab_size, scale, overwrite_logits):
    return _finish_shapes(logits, ref_logits)


def _finish_shapes(logits: Tensor, ref_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    sizes = ((tokens,), (tokens,), (0 if ref_logits is None else tokens,), (tokens, 2 if ref_logits is None else 4))
    return tuple(torch.empty(size, dtype=torch.float32, device=logits.device) for size in sizes)


def _keep(ctx, inputs, output):
    _, logits, ref_logits, labels, first_column, num_valid, _, scale, overwrite_logits = inputs
    _, entropy, kl, norms = output
    ctx.save_for_backward(logits, ref_logits, labels, norms, entropy, kl)
    ctx.numbers = (first_column, num_valid, scale)
    ctx.overwrite_logits = overwrite_logits
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_entropy, grad_kl, _):
    logits, ref_logits, labels, norms, entropy, kl = ctx.saved_tensors
    grad_kl = None if ref_logits is None else grad_kl
    incoming = [None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy, grad_kl)]
    if all(grad is None for grad in incoming):
        return (None,) * 9
    arguments = (ref_logits, labels, norms, entropy, kl, *incoming, *ctx.numbers)
    if ctx.overwrite_logits:
        torch.ops.megatron_rema.logits_grad_(logits, *arguments)
        grad = logits.detach()
    else:
        grad = torch.ops.megatron_rema.logits_grad(logits, *arguments)
    return None, grad, *(None,) * 7


_finish.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("megatron_rema::logits_grad", mutates_args=())
def _grad(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    norms: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    first_column: int,
    num_valid: int,
    scale: float,
) -> Tensor:
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_grad(grad, logits, ref_logits, labels, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl, first_column, num_valid, scale)
    return grad


@_grad.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("megatron_rema::logits_grad_", mutates_args={"logits"})
def _grad_in_place(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    norms: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    first_column: int,
    num_valid: int,
    scale: float,
) -> None:
    _write_grad(
        logits, logits, ref_logits, labels, norms, entropy, kl, grad_logprobs, grad_entropy, grad_kl, first_column, num_valid, scale
    )


def _write_grad(
    grad: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    norms: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    first_column: int,
    num_valid: int,
    scale: float,
) -> None:
    library.get(logits.device).call(
        "rema_logits_grad", logits.device, logits, ref_logits, grad, _DTYPES[logits.dtype], logits.shape[0], num_valid, logits.shape[1],
        _stride(logits), 0 if ref_logits is None else _stride(ref_logits), _stride(grad), labels, first_column, scale, norms, entropy, kl,
        grad_logprobs, grad_entropy, grad_kl,
    )  # fmt: skip
