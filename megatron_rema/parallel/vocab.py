"""Log-probability, entropy and KL of a token distribution whose vocabulary is sharded over tensor-parallel ranks.

Shapes: T label positions, V the padded vocabulary, V/tp this rank's shard ("local"): columns [rank * V/tp, (rank + 1) * V/tp);
S sets of tokens, W 32-bit words that hold one bit a token.
Over the wire, forward: one all-gather of four numbers per token (eight with reference logits), merged in rank order, hence bitwise equal
on every rank. Backward: nothing; each rank forms the gradient of its own shard.
Memory: what is kept for backward is the logits themselves (in their own dtype, no copy) and a few numbers per token; in plain torch
float32 temporaries exist for one chunk of rows at a time, in the fused kernels (kernels/logits.py) there are none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rema.kernels import logits as kernels
from megatron_rema.kernels.logits import Statistics

CHUNK_ELEMENTS = 1 << 20  # logits of one float32 temporary (4 MiB: larger ones leave a CPU's cache and take a third longer)
LOWEST = -1e4  # nats below the largest: exp is 0 as for -inf, but 0 * -1e4 is 0


def vocab_parallel_statistics(
    local_logits_TV: Tensor,
    labels_T: Tensor,
    tp_group: ProcessGroup | None,
    *,
    local_ref_logits_TV: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    vocab_size: int,
    allowed_sets_SW: Tensor | None = None,
    allowed_ids_T: Tensor | None = None,
    overwrite_logits: bool = False,
) -> Statistics:
    """[T] each, in nats: log-probability of the label under p = softmax(logits / temperature), entropy of p (None unless asked for), and
    with reference logits the exact KL(p || q) from q = softmax(reference logits / temperature), else None.

    Computed in float32 whatever the logits' dtype (float64 logits: in float64). Columns from ``vocab_size`` on are padding:
    they have no probability and get gradient 0. A label outside [0, vocab_size) gives NaN. ``tp_group`` None: not sharded.
    With allowed sets (bits over the whole vocabulary: ``types.Trace.allowed``) p and q at position t run over the tokens of set
    ``allowed_ids_T[t]`` only: the logits of all others become -inf, and a label that is one of them gets log-probability -inf.
    Every rank returns the same values; the caller's loss must be the same on every rank, and its gradient is not reduced.
    There is none with respect to the reference logits.

    A logit of -inf has probability 0 and adds 0 to entropy and KL; where only q is 0 the KL is infinite (and has no gradient). A NaN
    makes its own row NaN, and so does a row without a finite logit.
    ``overwrite_logits``: the logits' values, and the reference's, serve nobody else. -inf is then written into them, not into a copy, and
    backward may write the gradient over the logits; it can be run only once.
    """
    tp_size, rank = _place(tp_group)
    width = local_logits_TV.shape[-1]
    _check(temperature, width, tp_size, vocab_size)
    assert local_logits_TV.dim() == 2 and labels_T.shape == local_logits_TV.shape[:1], (local_logits_TV.shape, labels_T.shape)
    assert local_ref_logits_TV is None or local_ref_logits_TV.shape == local_logits_TV.shape, "the reference is cut like the policy"
    assert (allowed_sets_SW is None) == (allowed_ids_T is None), "allowed sets and each position's set come together"
    first, num_valid = rank * width, min(max(vocab_size - rank * width, 0), width)
    if allowed_sets_SW is not None:
        allowed_SV = allowed_columns(allowed_sets_SW, first, num_valid)
        local_logits_TV = _forbid(local_logits_TV, allowed_SV, allowed_ids_T, overwrite=overwrite_logits)
        if local_ref_logits_TV is not None:
            local_ref_logits_TV = _forbid(local_ref_logits_TV, allowed_SV, allowed_ids_T, overwrite=overwrite_logits)
    if not kernels.is_fused(local_logits_TV):
        values_T = _LogprobsAndEntropy.apply(local_logits_TV, labels_T, tp_group, temperature, with_entropy, vocab_size)
        if local_ref_logits_TV is None:
            return Statistics(*values_T, None)
        return Statistics(*values_T, _Kl.apply(local_logits_TV, local_ref_logits_TV, tp_group, temperature, vocab_size))
    shape = {"first_column": first, "num_valid": num_valid, "temperature": temperature}
    parts_STW = _gather(kernels.partial(local_logits_TV, local_ref_logits_TV, labels_T, **shape), tp_group)
    statistics = kernels.finish(
        parts_STW, local_logits_TV, local_ref_logits_TV, labels_T, vocab_size=vocab_size, overwrite_logits=overwrite_logits, **shape
    )
    return statistics if with_entropy else statistics._replace(entropy=None)


def _check(temperature: float, width: int, tp_size: int, vocab_size: int) -> None:
    if temperature <= 0.0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    if width * tp_size < vocab_size:
        raise ValueError(f"{tp_size} shards of {width} columns hold {width * tp_size} logits, fewer than vocab_size ({vocab_size}).")


def allowed_columns(sets_SW: Tensor, first: int, number: int) -> Tensor:
    """[S, number] bool: is token ``first + column`` in the set? ``sets_SW`` int32: bit v % 32 of word v // 32 stands for token v."""
    tokens_V = torch.arange(first, first + number, device=sets_SW.device)
    return ((sets_SW[:, tokens_V // 32] >> (tokens_V % 32).int()) & 1).bool()


def _forbid(logits_TV: Tensor, allowed_SV: Tensor, allowed_ids_T: Tensor, *, overwrite: bool) -> Tensor:
    """The logits with -inf at every token outside its position's set. Their gradient there is 0 whatever is made of them: p is 0."""
    logits_TV = logits_TV if overwrite else logits_TV.clone()
    with torch.no_grad():
        for rows in _row_chunks(logits_TV):
            logits_TV[rows, : allowed_SV.shape[1]].masked_fill_(~allowed_SV[allowed_ids_T[rows]], -torch.inf)
    return logits_TV


def _place(tp_group: ProcessGroup | None) -> tuple[int, int]:
    """(ranks that share the vocabulary, this one's rank among them)."""
    return (1, 0) if tp_group is None else (dist.get_world_size(tp_group), dist.get_rank(tp_group))


def _gather(part_TW: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[S, T, W] every shard's numbers, in rank order."""
    tp_size, _ = _place(tp_group)
    if tp_size == 1:
        return part_TW[None]
    parts_STW = part_TW.new_empty(tp_size, *part_TW.shape)
    dist.all_gather(list(parts_STW.unbind(0)), part_TW, group=tp_group)
    return parts_STW


class _LogprobsAndEntropy(torch.autograd.Function):
    """z = logits / temperature, p = softmax(z), a the label, H = -sum p log p:

    d logp_a / d z_j = [j = a] - p_j          d H / d z_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, logits_TV, labels_T, tp_group, temperature, with_entropy, vocab_size):
        _, rank = _place(tp_group)
        first = rank * logits_TV.shape[1]
        num_valid = min(max(vocab_size - first, 0), logits_TV.shape[1])
        is_mine_T = (labels_T >= first) & (labels_T < first + num_valid)
        column_T = (labels_T - first).masked_fill(~is_mine_T, 0)

        # local max m, sum of exp(z - m), sum of exp(z - m) (z - m), label's z (0 where another rank has it)
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        local_T4 = torch.zeros(logits_TV.shape[0], 4, dtype=dtype, device=logits_TV.device)
        if num_valid == 0:
            local_T4[:, 0] = torch.finfo(dtype).min  # finite, so that a shard of padding adds 0 and no NaN
        else:
            for rows in _row_chunks(logits_TV):
                z_RV = _scaled(logits_TV[rows, :num_valid], dtype, temperature)
                local_T4[rows, 3] = z_RV.gather(1, column_T[rows, None])[:, 0].masked_fill(~is_mine_T[rows], 0.0)
                max_R = z_RV.amax(1).clamp(min=torch.finfo(dtype).min)  # finite in a shard that holds nothing but -inf
                z_RV = z_RV - max_R[:, None]  # a copy: the logits are kept for backward
                exp_RV = z_RV.clamp_(min=LOWEST).exp() if with_entropy else z_RV.exp_()
                local_T4[rows, 0] = max_R
                local_T4[rows, 1] = exp_RV.sum(1)
                if with_entropy:
                    local_T4[rows, 2] = exp_RV.mul_(z_RV).sum(1)

        shards_ST4 = _gather(local_T4, tp_group)
        max_ST, sum_ST, weighted_ST, label_ST = shards_ST4.unbind(-1)
        max_T = max_ST.amax(0)
        shift_ST = max_ST - max_T
        scale_ST = shift_ST.exp()
        total_T = (scale_ST * sum_ST).sum(0)
        log_total_T = total_T.log()
        logprobs_T = label_ST.sum(0) - max_T - log_total_T
        logprobs_T = logprobs_T.masked_fill((labels_T < 0) | (labels_T >= vocab_size), float("nan"))
        entropy_T = None
        if with_entropy:
            entropy_T = log_total_T - (scale_ST * (weighted_ST + shift_ST * sum_ST)).sum(0) / total_T

        ctx.save_for_backward(logits_TV, column_T, is_mine_T, max_T + log_total_T, entropy_T)
        ctx.temperature, ctx.num_valid = temperature, num_valid
        ctx.set_materialize_grads(False)
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx, grad_logprobs_T, grad_entropy_T):
        logits_TV, column_T, is_mine_T, lse_T, entropy_T = ctx.saved_tensors
        if grad_logprobs_T is None and grad_entropy_T is None:
            return None, None, None, None, None, None
        zeros_T = torch.zeros_like(lse_T)
        grad_logprobs_T = zeros_T if grad_logprobs_T is None else grad_logprobs_T
        grad_TV = torch.empty_like(logits_TV)
        grad_TV[:, ctx.num_valid :] = 0.0
        if ctx.num_valid:
            for rows in _row_chunks(logits_TV):
                logp_RV = _scaled(logits_TV[rows, : ctx.num_valid], lse_T.dtype, ctx.temperature) - lse_T[rows, None]
                if grad_entropy_T is None:
                    grad_RV = logp_RV.exp_().mul_(-grad_logprobs_T[rows, None])
                else:
                    p_RV = logp_RV.clamp_(min=LOWEST).exp()
                    slope_RV = logp_RV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]).add_(grad_logprobs_T[rows, None])
                    grad_RV = p_RV.mul_(slope_RV).neg_()
                label_grad_R = grad_logprobs_T[rows].masked_fill(~is_mine_T[rows], 0.0)
                grad_RV.scatter_add_(1, column_T[rows, None], label_grad_R[:, None])
                grad_TV[rows, : ctx.num_valid] = grad_RV if ctx.temperature == 1.0 else grad_RV.div_(ctx.temperature)
        return grad_TV, None, None, None, None, None


class _Kl(torch.autograd.Function):
    """z, y = logits and reference logits / temperature, p, q their softmax, K the KL:

    K = sum p ((z - max z) - (y - max y)) - log sum exp(z - max z) + log sum exp(y - max y)        d K / d z_j = p_j (log p_j - log q_j - K)
    """

    @staticmethod
    def forward(ctx, logits_TV, ref_logits_TV, tp_group, temperature, vocab_size):
        _, rank = _place(tp_group)
        num_valid = min(max(vocab_size - rank * logits_TV.shape[1], 0), logits_TV.shape[1])
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        # max z, sum exp(z - max z), sum exp(z - max z) ((z - max z) - (y - max y)), max y, sum exp(y - max y)
        local_T5 = torch.zeros(logits_TV.shape[0], 5, dtype=dtype, device=logits_TV.device)
        local_T5[:, [0, 3]] = torch.finfo(dtype).min
        for rows in _row_chunks(logits_TV) if num_valid else ():
            z_RV, max_z_R = _shifted(logits_TV[rows, :num_valid], dtype, temperature)
            y_RV, max_y_R = _shifted(ref_logits_TV[rows, :num_valid], dtype, temperature)
            exp_RV = z_RV.exp()
            weighted_RV = (exp_RV * (z_RV.clamp(min=LOWEST) - y_RV)).masked_fill(exp_RV == 0.0, 0.0)
            local_T5[rows] = torch.stack([max_z_R, exp_RV.sum(1), weighted_RV.sum(1), max_y_R, y_RV.exp().sum(1)], 1)

        max_z_ST, sum_z_ST, weighted_ST, max_y_ST, sum_y_ST = _gather(local_T5, tp_group).unbind(-1)
        max_z_T, max_y_T = max_z_ST.amax(0), max_y_ST.amax(0)
        shift_z_ST, shift_y_ST = max_z_ST - max_z_T, max_y_ST - max_y_T
        scale_ST = shift_z_ST.exp()
        total_T = (scale_ST * sum_z_ST).sum(0)
        log_z_T, log_y_T = total_T.log(), (shift_y_ST.exp() * sum_y_ST).sum(0).log()
        moved_ST = scale_ST * (weighted_ST + sum_z_ST * (shift_z_ST - shift_y_ST))
        kl_T = moved_ST.masked_fill(scale_ST * sum_z_ST == 0.0, 0.0).sum(0) / total_T - log_z_T + log_y_T
        ctx.save_for_backward(logits_TV, ref_logits_TV, max_z_T + log_z_T, max_y_T + log_y_T, kl_T)
        ctx.temperature, ctx.num_valid = temperature, num_valid
        return kl_T

    @staticmethod
    def backward(ctx, grad_T):
        logits_TV, ref_logits_TV, lse_z_T, lse_y_T, kl_T = ctx.saved_tensors
        grad_TV = torch.zeros_like(logits_TV)
        for rows in _row_chunks(logits_TV) if ctx.num_valid else ():
            logp_RV = _scaled(logits_TV[rows, : ctx.num_valid], lse_z_T.dtype, ctx.temperature) - lse_z_T[rows, None]
            logq_RV = _scaled(ref_logits_TV[rows, : ctx.num_valid], lse_z_T.dtype, ctx.temperature) - lse_y_T[rows, None]
            p_RV = logp_RV.exp()
            slope_RV = (logp_RV - logq_RV - kl_T[rows, None]) * (grad_T[rows, None] / ctx.temperature)
            grad_TV[rows, : ctx.num_valid] = (p_RV * slope_RV).masked_fill(p_RV == 0.0, 0.0)
        return grad_TV, None, None, None, None


def _shifted(logits_RV: Tensor, dtype: torch.dtype, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits / temperature less each row's largest, and the largest: finite also where all are -inf."""
    z_RV = _scaled(logits_RV, dtype, temperature)
    max_R = z_RV.amax(1).clamp(min=torch.finfo(dtype).min)
    return z_RV - max_R[:, None], max_R


def _scaled(logits_RV: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """The logits themselves, not a copy, where there is nothing to do: not to be changed in place."""
    logits_RV = logits_RV.to(dtype)
    return logits_RV if temperature == 1.0 else logits_RV / temperature


def _row_chunks(logits_TV: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits_TV.shape[0], rows))
