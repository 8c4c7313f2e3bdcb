"""Forward and backward of packed microbatches through the stages of a pipeline, by megatron-core's own schedules.

Shapes: T label positions of one packed microbatch, B sequences, V vocabulary (padded, over all tensor ranks).

The loss is a plain SUM. megatron-core would divide it by microbatches and average gradients over data-parallel ranks; both are switched off
(``calculate_per_token_loss`` and a finalize function that takes no token count), because `Batch.loss_weights` already hold the global
normaliser. So loss and gradients do not move with the layout, the microbatching or the padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rema.parallel import platform
from megatron_rema.parallel.exchange import broadcast
from megatron_rema.parallel.groups import Groups
from megatron_rema.parallel.pulse import beat
from megatron_rema.types import Batch

Stats = dict[str, Tensor]
LossFn = Callable[[Tensor, Batch], tuple[Tensor, Stats]]  # (last stage's outputs [T, ...], batch) -> (loss scalar, detached stats)
SHORTEST_IN_BLOCK = 0.75  # of the longest sequence that it is padded to


@dataclasses.dataclass
class Packing(PackedSeqParams):
    """megatron's description of packed sequences, and how attention lays them side by side.

    Attention sees blocks of sequences of about the same length, padded on the right to the longest of the block: P cells in all, the blocks
    one after the other, the longest first.
    """

    positions: Tensor | None = None  # [T] int64, each token's place in its sequence
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, cells of each) of each block
    cells: Tensor | None = None  # [P] int64, the token in each cell (any token where it is padding); None: the cells are the tokens
    slots: Tensor | None = None  # [T] int64, the cell of each token; None likewise
    rotation: tuple[Tensor, Tensor] | None = None  # cos and sin [T, 1, H] of rotary positions, made by the first layer that needs them


def packing_of(batch: Batch) -> Packing:
    """Built once per microbatch, for all layers. The longest sequence is counted here, so that padding sequences are covered too."""
    cu_seqlens = batch.cu_seqlens
    lengths = cu_seqlens.diff().tolist()
    assert sum(lengths) == len(batch.tokens), f"cu_seqlens end at {sum(lengths)}, the batch has {len(batch.tokens)} tokens"
    lengths_B = torch.tensor(lengths)
    starts_B = lengths_B.cumsum(0) - lengths_B
    positions_T = torch.arange(sum(lengths)) - starts_B.repeat_interleave(lengths_B)
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    blocks = blocks_of_similar_length([lengths[i] for i in order])
    num_cells = sum(count * width for count, width in blocks)
    cells_P = slots_T = None
    if order != list(range(len(order))) or num_cells != sum(lengths):
        widths = torch.tensor([width for count, width in blocks for _ in range(count)])
        first_cell_B = torch.zeros_like(lengths_B)
        first_cell_B[order] = widths.cumsum(0) - widths
        slots_T = first_cell_B.repeat_interleave(lengths_B) + positions_T
        cells_P = torch.zeros(num_cells, dtype=torch.long)
        cells_P[slots_T] = torch.arange(len(slots_T))
    device = cu_seqlens.device
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        positions=positions_T.to(device),
        blocks=blocks,
        cells=None if cells_P is None else cells_P.to(device),
        slots=None if slots_T is None else slots_T.to(device),
    )


def blocks_of_similar_length(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(sequences, longest) of each block; ``lengths`` descend. In a block none is shorter than SHORTEST_IN_BLOCK of the longest, so that
    padding stays small and lengths from L down to L / 10 take eight calls of attention, not one per sequence.
    """
    blocks: list[tuple[int, int]] = []
    for length in lengths:
        if blocks and length >= SHORTEST_IN_BLOCK * blocks[-1][1]:
            blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1])
        else:
            blocks.append((1, length))
    return tuple(blocks)


def forward_backward(
    chunks: list[nn.Module],
    config: TransformerConfig,
    batches: Sequence[Batch],
    loss_fn: LossFn,
    *,
    groups: Groups,
    forward_only: bool = False,
) -> list[Stats]:
    """One schedule over ``batches`` (all with the same T, and as many on every data-parallel rank). Gradients are added to the buffers of
    the wrapped chunks and, at the end, summed over data-parallel ranks.

    Several chunks are virtual stages, run interleaved. megatron-core then wants a multiple of the stages as number of microbatches: the
    last one is repeated as a filler, whose loss is 0 and of which ``loss_fn`` hears nothing. Plan for a multiple where time matters.

    Over the wire: activations [T, 1, hidden] between stages (T / tp under sequence parallelism), their gradients back; with backward, one
    sum of all gradients over `groups.dp`, tied embeddings over `groups.embedding`, norms over `groups.tp` under sequence parallelism.

    Returns the stats that ``loss_fn`` gave for each microbatch, on the last stage; [] on every other.
    """
    if not batches:
        raise ValueError("forward_backward got no microbatch; every rank needs at least one: plan at least one per data-parallel rank.")
    lengths = {len(batch.tokens) for batch in batches}
    if len(lengths) > 1:
        raise ValueError(
            f"microbatches of one step have {sorted(lengths)} tokens; they must all have the same number: pad them to the longest."
        )
    num_tokens = lengths.pop()
    if config.sequence_parallel and num_tokens % groups.tensor_size:
        raise ValueError(
            f"sequence parallelism needs microbatches of a multiple of {groups.tensor_size} tokens; got {num_tokens}: pad more."
        )
    assert config.calculate_per_token_loss, "megatron would average the loss"
    interleaved = len(chunks) > 1
    assert len(chunks) == (config.virtual_pipeline_model_parallel_size or 1), "chunks and config are of different models"
    assert not interleaved or (config.overlap_p2p_comm and not config.batch_p2p_comm), "interleaved messages would be mixed up"
    fillers = -len(batches) % groups.pipeline_size if interleaved else 0
    rounds = [(batch, loss_fn) for batch in batches] + [(batches[-1], _zero_loss)] * fillers

    def forward_step(microbatches, chunk: nn.Module):
        beat()
        batch, batch_loss = next(microbatches)
        batch = _on_device(batch)
        return run(chunk, batch), functools.partial(_loss_and_stats, batch_loss, batch)

    config.finalize_model_grads_func = _sum_gradients
    schedule = get_forward_backward_func(pp_size=groups.pipeline_size, vp_size=len(chunks) if interleaved else None)
    with torch.set_grad_enabled(not forward_only):
        results = schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(rounds) for _ in chunks] if interleaved else iter(rounds),
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(rounds),
            seq_length=num_tokens,
            decoder_seq_length=num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config),
            pg_collection=groups.collection,
        )
    return results[: len(batches)]


def run(chunk: nn.Module, batch: Batch) -> Tensor:
    """[1, T, V/tp] on the last stage (or what stands there instead of logits: models/heads.py), activations on every other."""
    return chunk(batch.tokens[None], batch.positions[None], None, packed_seq_params=packing_of(batch))


def _on_device(batch: Batch) -> Batch:
    """The same batch with its tensors where this process computes (itself where they are there already)."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved = {name: value.to(platform.device()) for name, value in fields.items() if isinstance(value, Tensor)}
    return batch if all(moved[name] is fields[name] for name in moved) else dataclasses.replace(batch, **moved)


def _loss_and_stats(loss_fn: LossFn, batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Stats]:
    """megatron's three values: with ``calculate_per_token_loss`` the loss goes to backward as it is; the count is only carried along."""
    loss, stats = loss_fn(logits.squeeze(0), batch)  # not logits[0], whose gradient would be a second tensor of their size
    return loss, torch.zeros([], dtype=torch.int, device=logits.device), stats


def _zero_loss(outputs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
    return outputs.sum() * 0.0, {}


def _sum_gradients(chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs) -> None:
    """megatron's reductions without its division by the token count. ``kwargs`` are megatron's own (groups, force_all_reduce)."""
    finalize_model_grads(chunks, num_tokens=None, **kwargs)


def broadcast_from_last_stage(results: list[Stats], like: list[Stats], groups: Groups) -> list[Stats]:
    """The last stage's ``results`` on every stage. ``like`` has the same names and shapes; other stages receive into them.

    Over the wire: each tensor once, along `groups.pp`.
    """
    if groups.pipeline_size == 1:
        return results
    on_device = [{name: value.to(platform.device()) for name, value in shaped.items()} for shaped in like]
    values = results if groups.is_last_stage else on_device
    assert len(values) == len(like), f"{len(values)} results, {len(like)} places for them"
    for mine, shaped in zip(values, on_device, strict=True):
        for name in sorted(shaped):
            dist.broadcast(mine[name], src=groups.last_stage_rank, group=groups.pp)
    return values


def reduce_stats(results: list[Stats], groups: Groups, *, maxima: tuple[str, ...] = ()) -> dict[str, float]:
    """Each scalar summed over microbatches and data-parallel ranks in float64 (those named in ``maxima``: their maximum); the same dict
    on every rank.

    ``results`` is what `forward_backward` returned on this rank; every data-parallel rank must bring the same names.
    """
    reduced: dict[str, float] = {}
    if groups.is_last_stage:
        for names, op in (([n for n in results[0] if n not in maxima], dist.ReduceOp.SUM), (list(maxima), dist.ReduceOp.MAX)):
            if not names:
                continue
            table = torch.stack([torch.stack([stats[name].double() for name in names]) for stats in results])  # [microbatches, names]
            row = table.sum(0) if op is dist.ReduceOp.SUM else table.amax(0)
            dist.all_reduce(row, op=op, group=groups.dp)
            reduced.update(zip(names, row.tolist(), strict=True))
    return broadcast(reduced, src=groups.last_stage_rank, group=groups.pp) if groups.pipeline_size > 1 else reduced
