"""From Hugging Face tensors to one rank's shard and back: pure tensor functions, no process groups.

Shapes: Q query heads, K key-value heads, D numbers per head, V vocabulary, H hidden size; ``...`` is H for a weight, nothing for a bias.
Source: megatron-core 0.16 ``attention.py`` (a kv head's rows are its Q/K query heads, then its key, then its value) and ``mlp.py`` (a
rank's rows of linear_fc1 are its gates, then its ups).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.names import Entry, Kind, Shape


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_kv_heads: int) -> Tensor:
    """q [Q*D, ...], k and v [K*D, ...] -> [(Q+2K)*D, ...], interleaved by kv head."""
    by_kv_head = [x.reshape(num_kv_heads, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(by_kv_head, dim=1).reshape(-1, *q.shape[1:])


def split_qkv(qkv: Tensor, *, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of ``merge_qkv``: [(Q+2K)*D, ...] -> q, k, v."""
    head_dim = qkv.shape[0] // (num_heads + 2 * num_kv_heads)
    by_kv_head = qkv.reshape(num_kv_heads, -1, *qkv.shape[1:])
    parts = by_kv_head.split([num_heads // num_kv_heads * head_dim, head_dim, head_dim], dim=1)
    q, k, v = (part.reshape(-1, *qkv.shape[1:]) for part in parts)
    return q, k, v


def pad_rows(weight: Tensor, rows: int) -> Tensor:
    """[V, H] -> [rows, H]; the new rows are zero, so that a padding column's logit is 0 and never -inf or noise."""
    assert rows >= weight.shape[0], f"cannot pad {weight.shape[0]} rows down to {rows}"
    if rows == weight.shape[0]:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - weight.shape[0], *weight.shape[1:])])


def shard(full: Tensor, kind: Kind, *, rank: int, size: int) -> Tensor:
    """The slice of a full Megatron parameter that tensor-parallel rank ``rank`` of ``size`` holds (a view where possible)."""
    if size == 1 or kind is Kind.REPLICATED:
        return full
    if kind is Kind.ROW:
        return full.chunk(size, dim=1)[rank]
    if kind is Kind.GATE_UP:
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return full.chunk(size)[rank]


def unshard(shards: Sequence[Tensor], kind: Kind) -> Tensor:
    """Inverse of ``shard``: the shards of all tensor-parallel ranks, in rank order -> the full Megatron parameter."""
    if len(shards) == 1 or kind is Kind.REPLICATED:
        return shards[0]
    if kind is Kind.ROW:
        return torch.cat(tuple(shards), dim=1)
    if kind is Kind.GATE_UP:
        gates, ups = zip(*(x.chunk(2) for x in shards), strict=True)
        return torch.cat((*gates, *ups))
    return torch.cat(tuple(shards))


def to_megatron(tensors: Sequence[Tensor], entry: Entry, arch: Architecture, *, rank: int, size: int) -> Tensor:
    """Full Hugging Face tensors of one entry -> the shard of tensor-parallel rank ``rank`` of ``size``."""
    if entry.kind is Kind.QKV:
        full = merge_qkv(*tensors, num_kv_heads=arch.num_kv_heads)
    elif entry.kind is Kind.GATE_UP:
        full = torch.cat(tuple(tensors))
    elif entry.kind is Kind.VOCAB:
        full = pad_rows(tensors[0], arch.padded_vocab_size(size))
    else:
        full = tensors[0]
    return shard(full, entry.kind, rank=rank, size=size)


def to_hf(shards: Sequence[Tensor], entry: Entry, arch: Architecture) -> tuple[Tensor, ...]:
    """Inverse of ``to_megatron``: the shards of all ranks -> the full Hugging Face tensors, contiguous, aligned with ``hf_names``."""
    full = unshard(shards, entry.kind)
    if entry.kind is Kind.QKV:
        return split_qkv(full, num_heads=arch.num_heads, num_kv_heads=arch.num_kv_heads)
    if entry.kind is Kind.GATE_UP:
        return full.chunk(2)
    if entry.kind is Kind.VOCAB:
        return (full[: arch.vocab_size],)
    return (full,)


def shard_shape(entry: Entry, arch: Architecture, *, size: int) -> Shape:
    """Shape of one rank's shard of a parameter, from the Hugging Face shapes alone."""
    rows, *rest = entry.hf_shapes[0]
    if entry.kind is Kind.REPLICATED:
        return entry.hf_shapes[0]
    if entry.kind is Kind.ROW:
        return (rows, rest[0] // size)
    if entry.kind is Kind.VOCAB:
        return (arch.padded_vocab_size(size) // size, *rest)
    return (sum(shape[0] for shape in entry.hf_shapes) // size, *rest)
