"""The one name map between a Hugging Face checkpoint and megatron-core's GPTModel.

Loading, weight sync and saving all walk the entries of ``name_map`` in the same order, so none of them can know a tensor that the
others do not. Names are megatron-core's local spec with global layer numbers; the Transformer Engine spec, which keeps a norm's weight
inside the linear layer behind it, is served by ``canonical_name``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from megatron_rema.architecture import Architecture

Shape = tuple[int, ...]


class Kind(StrEnum):
    """How the Hugging Face tensors of one entry become the Megatron parameter, and how tensor parallelism cuts it."""

    REPLICATED = "replicated"  # one tensor, the whole of it on every rank
    ROW = "row"  # one tensor [out, in], cut along in
    QKV = "qkv"  # q, k, v interleaved by kv head, cut along rows
    GATE_UP = "gate_up"  # gate above up, each cut along rows
    VOCAB = "vocab"  # one tensor [vocab, hidden], rows padded, cut along rows


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it is made of."""

    megatron_name: str
    kind: Kind
    hf_names: tuple[str, ...]  # 1; 3 (q, k, v) for QKV; 2 (gate, up) for GATE_UP
    hf_shapes: tuple[Shape, ...]  # of the full tensors, aligned with hf_names
    is_copy: bool = False  # the tied output layer: filled on loading, never exported


def name_map(arch: Architecture) -> dict[str, Entry]:
    """Canonical Megatron name -> entry, in the order of the model's forward pass. Every parameter of the model has one entry."""
    hidden, ffn, vocab = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    q_rows, kv_rows = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    entries: list[Entry] = []

    def add(megatron_name: str, kind: Kind, *tensors: tuple[str, Shape], is_copy: bool = False) -> None:
        names, shapes = zip(*tensors, strict=True)
        entries.append(Entry(megatron_name, kind, names, shapes, is_copy))

    embedding = ("model.embed_tokens.weight", (vocab, hidden))
    add("embedding.word_embeddings.weight", Kind.VOCAB, embedding)
    for layer in range(arch.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        add(ours + "input_layernorm.weight", Kind.REPLICATED, (theirs + "input_layernorm.weight", (hidden,)))
        add(ours + "self_attention.linear_qkv.weight", Kind.QKV, *((f"{attention}{x}_proj.weight", (n, hidden)) for x, n in rows.items()))
        if arch.qkv_bias:
            add(ours + "self_attention.linear_qkv.bias", Kind.QKV, *((f"{attention}{x}_proj.bias", (n,)) for x, n in rows.items()))
        if arch.qk_norm:
            for x in "qk":
                add(f"{ours}self_attention.{x}_layernorm.weight", Kind.REPLICATED, (f"{attention}{x}_norm.weight", (arch.head_dim,)))
        add(ours + "self_attention.linear_proj.weight", Kind.ROW, (attention + "o_proj.weight", (hidden, q_rows)))
        add(ours + "pre_mlp_layernorm.weight", Kind.REPLICATED, (theirs + "post_attention_layernorm.weight", (hidden,)))
        add(ours + "mlp.linear_fc1.weight", Kind.GATE_UP, *((f"{mlp}{x}_proj.weight", (ffn, hidden)) for x in ("gate", "up")))
        add(ours + "mlp.linear_fc2.weight", Kind.ROW, (mlp + "down_proj.weight", (hidden, ffn)))
    add("decoder.final_layernorm.weight", Kind.REPLICATED, ("model.norm.weight", (hidden,)))
    if arch.num_scalars:
        add("output_layer.weight", Kind.REPLICATED, ("score.weight", (arch.num_scalars, hidden)))
        return {entry.megatron_name: entry for entry in entries}
    head = embedding if arch.tied else ("lm_head.weight", (vocab, hidden))
    add("output_layer.weight", Kind.VOCAB, head, is_copy=arch.tied)
    return {entry.megatron_name: entry for entry in entries}


def hf_shapes(arch: Architecture) -> dict[str, Shape]:
    """Every tensor of the Hugging Face checkpoint (a tied output layer has none) and its shape, in export order."""
    return {
        name: shape
        for entry in name_map(arch).values()
        if not entry.is_copy
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }


_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def canonical_name(parameter_name: str, layer_numbers: list[int]) -> str:
    """A parameter's name in its own module -> its key in ``name_map``.

    ``layer_numbers[i]`` is the global number (from 1, as megatron-core counts) of the module's i-th layer. The fused norm names of
    Transformer Engine become the local spec's; a name that is none of ours comes back unchanged, for the caller to refuse.
    """
    match = _LAYER.fullmatch(parameter_name)
    if match is None:
        return parameter_name
    local_index, tail = int(match[1]), match[2]
    return f"decoder.layers.{layer_numbers[local_index] - 1}.{_ALIASES.get(tail, tail)}"
