"""Weights out of a Hugging Face folder into TP x PP shards, and back: to an engine, or to a new folder.

The module is taken structurally (``named_parameters``, ``decoder.layers[i].layer_number``): a bare megatron-core GPTModel of this
rank's pipeline stage. At every moment memory holds about one full tensor more than the module (saving: one file's worth).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.layout import shard_shape, to_hf, to_megatron
from megatron_rema.bridge.names import Entry, canonical_name, hf_shapes, name_map

if TYPE_CHECKING:
    from megatron_rema.parallel.groups import Groups

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What stands beside the weights in a checkpoint folder and goes along unchanged.
_COMPANIONS = ("generation_config.json", "tokenizer*", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")  # fmt: skip
# Fields of Architecture that may differ between a checkpoint and the model it fills: they touch neither shapes nor arithmetic.
_FREE_FIELDS = ("max_positions", "eos_token_ids")


@torch.no_grad()
def load_hf(module: nn.Module, arch: Architecture, path: str | Path, groups: Groups) -> int:
    """Fills every parameter of this rank's module from a Hugging Face folder; returns the bytes filled. Reads what this stage needs.

    Values are cast to the parameter's dtype. Call it before the optimizer takes its fp32 master copy. Raises ValueError naming the
    tensor or field when the folder holds another architecture, misses a tensor, or has one that no parameter takes.
    """
    path = Path(path)
    _check_same_architecture(arch, path)
    file_of = _check_tensors(arch, path)
    num_bytes = 0
    with _Reader(file_of) as reader:
        for parameter, entry in _own_entries(module, arch).values():
            if entry.is_copy and "lm_head.weight" in file_of:
                _check_copy(reader, entry, path)
            tensors = [reader.tensor(name) for name in entry.hf_names]
            local = to_megatron(tensors, entry, arch, rank=groups.tensor_rank, size=groups.tensor_size)
            assert local.shape == parameter.shape, f"{entry.megatron_name}: shard {tuple(local.shape)} for {tuple(parameter.shape)}"
            parameter.copy_(local)
            num_bytes += parameter.nbytes
    return num_bytes


@torch.no_grad()
def iterate_hf_tensors(module: nn.Module, arch: Architecture, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) in ``hf_shapes`` order, the same on every rank; a tied output layer is left out.

    A collective over ``groups.tp`` and ``groups.pp``: every rank consumes it to the end. On the wire: a parameter's shard from its stage
    to the other stages (broadcast over PP), then the shards of all ranks to all (all-gather over TP). A tensor may be a view of a live
    parameter: copy it to keep it past the next optimizer step.
    """
    own = _own_entries(module, arch)
    stage_of, dtype_of = _stages(own, groups)
    size = groups.tensor_size
    for name, entry in name_map(arch).items():
        if entry.is_copy:
            continue
        assert name in stage_of, f"no pipeline stage holds {name}"
        if groups.pipeline_rank == stage_of[name]:
            local = own[name][0].detach().contiguous()
        else:
            device = next(module.parameters()).device
            local = torch.empty(shard_shape(entry, arch, size=size), dtype=dtype_of[name], device=device)
        if groups.pipeline_size > 1:
            dist.broadcast(local, dist.get_global_rank(groups.pp, stage_of[name]), group=groups.pp)
        shards = [local]
        if size > 1:
            shards = [torch.empty_like(local) for _ in range(size)]
            dist.all_gather(shards, local, group=groups.tp)
        for hf_name, shape, tensor in zip(entry.hf_names, entry.hf_shapes, to_hf(shards, entry, arch), strict=True):
            assert tensor.shape == shape, f"{hf_name}: exported {tuple(tensor.shape)}, the architecture says {shape}"
            yield hf_name, tensor


def save_hf(
    module: nn.Module,
    arch: Architecture,
    source_dir: str | Path,
    out_dir: str | Path,
    groups: Groups,
    *,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes a Hugging Face folder: weights in safetensors files of at most ``max_shard_bytes``, config and tokenizer from ``source_dir``.

    A collective over the world; rank 0 writes, into a temporary folder beside ``out_dir`` that is renamed when complete, so a folder with
    that name is a whole checkpoint. Raises ValueError on every rank when ``out_dir`` exists.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    is_writer = dist.get_rank() == 0
    refused = [is_writer and out_dir.exists()]
    dist.broadcast_object_list(refused, src=0)
    if refused[0]:
        raise ValueError(f"out_dir {out_dir} exists; a checkpoint is never overwritten: choose another name or remove it.")
    members = torch.zeros(dist.get_world_size(), dtype=torch.bool)
    members[dist.get_process_group_ranks(groups.tp)] = True
    if groups.data_rank == 0:  # one replica is enough; the others wait at the barrier
        tensors = iterate_hf_tensors(module, arch, groups)
        if is_writer:
            _write(tensors, arch, source_dir, out_dir, max_shard_bytes)
        else:
            for _ in tensors:
                pass
    dist.barrier()
