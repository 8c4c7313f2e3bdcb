"""Layout functions against hand-written rows, and their inverses on random sizes. Everything is a copy of numbers: equality is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.layout import merge_qkv, pad_rows, shard_shape, split_qkv, to_hf, to_megatron
from megatron_rema.bridge.names import Kind, name_map


def test_qkv_rows_are_interleaved_by_kv_head():
    # 4 query heads (0..3), 2 kv heads, 1 number per head: kv head 0 serves queries 0 and 1, kv head 1 serves 2 and 3
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    merged = merge_qkv(q, k, v, num_kv_heads=2)
    assert merged.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [x.tolist() for x in split_qkv(merged, num_heads=4, num_kv_heads=2)] == [[0, 1, 2, 3], [10, 11], [20, 21]]


def test_padding_rows_are_zero():
    assert pad_rows(torch.ones(2, 1), 4).flatten().tolist() == [1, 1, 0, 0]


def test_each_rank_holds_its_gates_then_its_ups():
    arch = _arch(heads_per_kv_head=1, kv_heads=2, head_dim=1, ffn=4, vocab=3, family="llama")
    gate, up = torch.arange(4).view(4, 1), 10 + torch.arange(4).view(4, 1)
    entry = name_map(arch)["decoder.layers.0.mlp.linear_fc1.weight"]
    shards = [to_megatron([gate, up], entry, arch, rank=rank, size=2).flatten().tolist() for rank in range(2)]
    assert shards == [[0, 1, 10, 11], [2, 3, 12, 13]]


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    heads_per_kv_head=st.integers(1, 3),
    kv_heads_per_rank=st.integers(1, 2),
    head_dim=st.integers(1, 5),
    ffn_per_rank=st.integers(1, 5),
    vocab=st.integers(1, 70),
    family=st.sampled_from(["qwen2", "qwen3", "llama"]),
)
def test_every_parameter_survives_sharding_and_back_bitwise(
    size: int, heads_per_kv_head: int, kv_heads_per_rank: int, head_dim: int, ffn_per_rank: int, vocab: int, family: str
):
    arch = _arch(heads_per_kv_head, kv_heads_per_rank * size, head_dim, ffn_per_rank * size, vocab, family)
    for entry in name_map(arch).values():
        tensors = [torch.randn(shape) for shape in entry.hf_shapes]
        shards = [to_megatron(tensors, entry, arch, rank=rank, size=size) for rank in range(size)]
        assert all(tuple(x.shape) == shard_shape(entry, arch, size=size) for x in shards), entry
        if entry.kind not in (Kind.REPLICATED, Kind.VOCAB):  # cut, never copied
            assert sum(x.numel() for x in shards) == sum(x.numel() for x in tensors)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(to_hf(shards, entry, arch), tensors, strict=True)), entry


def test_padding_to_fewer_rows_is_a_bug_of_ours():
    with pytest.raises(AssertionError):
        pad_rows(torch.ones(3, 1), 2)


def _arch(heads_per_kv_head: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, family: str) -> Architecture:
    return Architecture.from_config(
        {
            "model_type": family,
            "num_hidden_layers": 1,
            "hidden_size": 6,
            "intermediate_size": ffn,
            "num_attention_heads": kv_heads * heads_per_kv_head,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocab,
        }
    )
