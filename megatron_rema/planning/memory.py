"""Bytes that one rank holds of one model while it is trained, scored with, or waits. What the code really allocates, term by term.

Shapes: T tokens of a microbatch, P cells of the padded view that attention sees, H hidden size, F feed-forward width, V columns of the
vocabulary, L layers; widths are this tensor rank's. tests/distributed/test_planning.py holds these sums against what an allocator counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rema.planning.hardware import CPU, Runtime
from megatron_rema.planning.shapes import Shard

Parts = dict[str, float]  # what for -> bytes
_FLOAT32 = 4
_BATCH_BYTES = 14 * 8  # of a packed batch per token: ids, labels, masks, positions, cells
_PLAIN_CHUNK_BYTES = 2 * 4 * (1 << 20)  # float32 temporaries of plain torch: parallel/vocab.py


@dataclass(frozen=True)
class Work:
    """How a model is run: the settings of a step that decide on memory."""

    tokens: int  # T
    microbatches: int = 1  # per optimizer step and data-parallel rank
    element_bytes: int = 4  # 4: float32, 2: bfloat16
    data: int = 1  # data-parallel ranks
    logits_chunk_tokens: int = 0
    fused_kernels: bool = True
    padding: float | None = None  # P / T; None: all sequences of a microbatch have one length and nothing is padded
    runtime: Runtime = CPU


def total(parts: Parts) -> float:
    return sum(parts.values())


def added(many: Iterable[Parts]) -> Parts:
    result: Parts = {}
    for parts in many:
        for name, value in parts.items():
            result[name] = result.get(name, 0.0) + value
    return result


# --- what stays -------------------------------------------------------------------------------------------------------


def weights(shard: Shard, work: Work) -> Parts:
    return {"weights": shard.num_parameters * work.element_bytes}


def optimizer_state(shard: Shard, work: Work) -> Parts:
    """Gradients in one float32 buffer; Adam's two moments, and master weights under bfloat16. ZeRO-1 shares all but the gradients."""
    number = shard.num_parameters
    per_parameter = 2 * _FLOAT32 + (_FLOAT32 if work.element_bytes < _FLOAT32 else 0)
    sharing = work.data if shard.layout.distributed_optimizer else 1
    return {"gradients": number * _FLOAT32, "optimizer": number * per_parameter / sharing}


# --- what a microbatch leaves for backward ----------------------------------------------------------------------------


def residual_bytes(shard: Shard, work: Work) -> float:
    """One [T, H] tensor between layers; sequence parallelism cuts it over tensor ranks."""
    sharing = shard.layout.tensor if shard.layout.sequence_parallel else 1
    return work.tokens * shard.arch.hidden_size * work.element_bytes / sharing


def layer_bytes(shard: Shard, work: Work) -> float:
    """Kept by one layer: two norms and two sums of the residual stream, attention's operands and output, the feed-forward's three."""
    tokens, size = work.tokens, work.element_bytes
    query, kv, ffn = shard.query_size, shard.kv_size, shard.ffn_size
    norms_and_sums = 4 * residual_bytes(shard, work)
    heads = shard.arch.num_heads / shard.layout.tensor
    qkv = tokens * (query + 2 * kv) * size
    normed = tokens * query * size if shard.arch.qk_norm else 0  # norms keep their inputs: the queries' copy, keys inside qkv
    if work.padding is None:  # values are a view of qkv; rotated queries and keys; the output
        attention = qkv + tokens * (2 * query + kv) * size + tokens * heads * _FLOAT32
    else:  # all three in cells, the output in cells and as tokens
        cells = tokens * work.padding
        attention = cells * (2 * query + 2 * kv) * size + tokens * query * size + cells * heads * _FLOAT32
        attention += qkv if shard.arch.qk_norm else 0
    return norms_and_sums + attention + normed + tokens * 4 * ffn * size


def _once_bytes(shard: Shard, work: Work) -> float:
    """Kept once by a chunk, whatever its layers: its input, cos and sin of rotary positions, the batch itself."""
    rotation = 2 * work.tokens * shard.arch.head_dim * work.element_bytes
    return residual_bytes(shard, work) + rotation + work.tokens * _BATCH_BYTES


def in_flight(shard: Shard, microbatches: int) -> int:
    """Chunks whose activations wait on this stage when its first backward begins: megatron's 1F1B, plain or interleaved."""
    stages, virtual = shard.layout.pipeline, shard.layout.virtual_pipeline
    if virtual == 1:
        return min(microbatches, stages - shard.stage)
    padded = -(-microbatches // stages) * stages
    return min(padded * virtual, 2 * (stages - shard.stage - 1) + (virtual - 1) * stages + 1)


def activations(shard: Shard, work: Work) -> Parts:
    """Of all microbatches in flight. Recomputed layers keep their inputs only."""
    layers = shard.num_layers / shard.layout.virtual_pipeline
    per_layer = residual_bytes(shard, work) if shard.layout.recompute else layer_bytes(shard, work)
    number = in_flight(shard, work.microbatches)
    kept = number * (layers * per_layer + _once_bytes(shard, work))
    return {"activations": kept + (residual_bytes(shard, work) if shard.is_last else 0)}  # the final norm's output


# --- what exists for a moment -----------------------------------------------------------------------------------------


def _head_backward(shard: Shard, work: Work, *, exact_kl: bool) -> Parts:
    """At the output layer: logits, and what its own backward makes beside them."""
    arch, size = shard.arch, work.element_bytes
    if not shard.is_last:
        return {}
    if arch.num_scalars:
        return {"logits": work.tokens * arch.num_scalars * 2 * _FLOAT32}
    hidden = work.tokens * arch.hidden_size * size
    weight_gradient = shard.vocab_size * arch.hidden_size * size
    sharded = shard.layout.sequence_parallel and shard.layout.tensor > 1
    if work.logits_chunk_tokens:
        chunk = min(work.logits_chunk_tokens, work.tokens) * shard.vocab_size * size
        plain = 0 if work.fused_kernels else chunk + _PLAIN_CHUNK_BYTES
        workspace = weight_gradient + hidden * (2 if sharded else 1)
        return {"logits": chunk * (2 if exact_kl else 1) + plain, "workspace": workspace}
    logits = work.tokens * shard.vocab_size * size
    of_layer = weight_gradient + hidden * (3 if sharded else 1)
    of_loss = 0.0
    if exact_kl:  # the reference's logits, its own hidden states still there
        of_loss = logits + 3 * residual_bytes(shard, work)
    if not work.fused_kernels:  # the gradient does not overwrite the logits (of the KL: a second one)
        of_loss = logits * (3 if exact_kl else 1) + _PLAIN_CHUNK_BYTES * (2 if exact_kl else 1)
    return {"logits": logits, "workspace": max(of_layer, of_loss)}


def _layer_backward(shard: Shard, work: Work) -> Parts:
    """Inside the last layer of a chunk: gradients of the gated activation beside its operands; its output and the final norm's are gone."""
    size, tokens = work.element_bytes, work.tokens
    width = tokens * shard.ffn_size * size
    residual = residual_bytes(shard, work)
    hidden = tokens * shard.arch.hidden_size * size
    again = layer_bytes(shard, work) if shard.layout.recompute else 0.0
    at_activation = 3 * width + residual
    at_first_matrix = -2 * width + 2 * shard.arch.hidden_size * shard.ffn_size * size + residual + hidden
    gone = residual if shard.is_last else 0.0
    return {"workspace": again + max(at_activation, at_first_matrix) - gone}


def updating(shard: Shard, work: Work, *, exact_kl: bool = False) -> Parts:
    """Peak of one optimizer step of this model alone, weights and state included; the reference of an exact KL is another model."""
    state = {**weights(shard, work), **optimizer_state(shard, work)}
    kept = activations(shard, work)
    moments = [
        added([kept, _head_backward(shard, work, exact_kl=exact_kl)]),
        added([kept, _layer_backward(shard, work)]),
        {"workspace": _stepping(shard, work)},
    ]
    return added([state, max(moments, key=total)])


def _stepping(shard: Shard, work: Work) -> float:
    """Beside the state, once activations are gone: what reductions copy, what Adam needs for its largest tensor."""
    number = shard.num_parameters
    shared = shard.layout.distributed_optimizer and work.data > 1
    largest = min(shard.largest_parameter, number / work.data) if shared else shard.largest_parameter
    copies = number * _FLOAT32 if shared and work.runtime.copies_for_collectives else 0.0
    return max(copies, work.runtime.adam_temporaries * largest * _FLOAT32)


def scoring(shard: Shard, work: Work) -> Parts:
    """Peak of a forward pass without backward: one layer's operands at a time, then the logits. Weights included."""
    tokens, size = work.tokens, work.element_bytes
    residual = residual_bytes(shard, work)
    layer = tokens * 4 * shard.ffn_size * size + residual
    head = 0.0
    if shard.is_last and not shard.arch.num_scalars:
        positions = min(work.logits_chunk_tokens or tokens, tokens)
        head = positions * shard.vocab_size * size + (0 if work.fused_kernels else _PLAIN_CHUNK_BYTES)
    return added([weights(shard, work), {"workspace": 2 * residual + _once_bytes(shard, work) + max(layer, head)}])
