"""Weights out of a Hugging Face folder into TP x PP shards, and back: to an engine, or to a new folder.

A module is taken structurally (``named_parameters``, ``decoder.layers[i].layer_number``): a bare megatron-core GPTModel, this rank's
pipeline stage; or a list of them, its virtual stages. Beyond the modules, memory holds about one full tensor at a time (the writer of a
folder: one file's worth).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.folder import CheckpointReader, write_checkpoint
from megatron_rema.bridge.layout import shard_shape, to_hf, to_megatron
from megatron_rema.bridge.names import canonical_name, name_map
from megatron_rema.parallel.exchange import gather_rows
from megatron_rema.parallel.groups import Groups
from megatron_rema.parallel.pulse import beat

Modules = nn.Module | Sequence[nn.Module]  # this rank's stage: one chunk, or its virtual stages


@torch.no_grad()
def load_hf(modules: Modules, arch: Architecture, path: str | Path, groups: Groups, *, fresh_head: bool = False) -> int:
    """Fills every parameter of this rank's stage from a Hugging Face folder; returns the bytes filled. Reads what this stage needs.

    Values are cast to the parameter's dtype. Call it before the optimizer takes its fp32 master copy. Not a collective.
    ``fresh_head``: only the trunk is read (of a language model, say, for a critic) and the head stays as it was drawn. Raises ValueError
    naming the tensor or field when the folder holds another architecture, misses a tensor, or has one that no parameter takes.
    """
    reader = CheckpointReader(path, _trunk_of(path, arch) if fresh_head else arch)
    entries = name_map(arch)
    num_bytes = 0
    for name, parameter in _own_parameters(modules, arch, groups).items():
        if fresh_head and name == "output_layer.weight":
            continue
        beat()
        entry = entries[name]
        tensors = [reader.tensor(hf_name) for hf_name in entry.hf_names]
        local = to_megatron(tensors, entry, arch, rank=groups.tensor_rank, size=groups.tensor_size)
        assert local.shape == parameter.shape, f"{name}: the shard is {tuple(local.shape)}, the parameter {tuple(parameter.shape)}"
        parameter.copy_(local)
        num_bytes += parameter.nbytes
    return num_bytes


@torch.no_grad()
def iterate_hf_tensors(modules: Modules, arch: Architecture, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) in the order of ``names.hf_shapes`` on every rank; a tied output layer is left out.

    A collective over ``groups.tp`` and ``groups.pp``: every rank consumes it to the end. On the wire, per parameter: its shard from its
    stage to the other stages (broadcast over PP), then the shards of all ranks to all (all-gather over TP). A tensor may be a view of a
    live parameter: copy it to keep it past the next optimizer step.
    """
    own = _own_parameters(modules, arch, groups)
    stage_of, dtype_of = _owners(own, groups)
    device = next(iter(own.values())).device
    for name, entry in name_map(arch).items():
        if entry.is_copy:
            continue
        beat()
        assert name in stage_of, f"no pipeline stage holds {name}"
        if stage_of[name] == groups.pipeline_rank:
            local = own[name].detach()
        else:
            local = torch.empty(shard_shape(entry, arch, size=groups.tensor_size), dtype=dtype_of[name], device=device)
        if groups.pipeline_size > 1:
            dist.broadcast(local, group=groups.pp, group_src=stage_of[name])
        shards = [local]
        if groups.tensor_size > 1:
            shards = [torch.empty_like(local) for _ in range(groups.tensor_size)]
            dist.all_gather(shards, local, group=groups.tp)
        for hf_name, shape, tensor in zip(entry.hf_names, entry.hf_shapes, to_hf(shards, entry, arch), strict=True):
            assert tensor.shape == shape, f"{hf_name}: exported {tuple(tensor.shape)}, the architecture says {shape}"
            yield hf_name, tensor


def save_hf(
    modules: Modules, arch: Architecture, source_dir: str | Path, out_dir: str | Path, groups: Groups, *, max_shard_bytes: int = 4 << 30
) -> None:
    """Writes a Hugging Face folder: safetensors files of at most ``max_shard_bytes``, config and tokenizer files of ``source_dir``.

    A collective over the world; rank 0 writes, and the folder takes its name only when it is complete. Raises ValueError on every rank
    when ``out_dir`` exists.
    """
    out_dir = Path(out_dir)
    is_writer = dist.get_rank() == 0
    if any(row["exists"] for row in gather_rows([{"exists": is_writer and out_dir.exists()}])):
        raise ValueError(f"out_dir {out_dir} exists; a checkpoint is never overwritten: choose another name or remove it.")
    if groups.data_rank == 0:  # one copy of the model is enough; the others wait at the barrier
        tensors = iterate_hf_tensors(modules, arch, groups)
        if is_writer:
            dtype = next(_list(modules)[0].parameters()).dtype
            write_checkpoint(tensors, arch, dtype, Path(source_dir), out_dir, max_shard_bytes)
        else:
            for _ in tensors:
                pass
    dist.barrier()


def _trunk_of(path: str | Path, arch: Architecture) -> Architecture:
    """``arch`` with the head that the folder has: all else must agree."""
    found = Architecture.from_pretrained(path)
    return replace(arch, num_scalars=found.num_scalars, tied=found.tied)


def _list(modules: Modules) -> list[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else list(modules)


def _own_parameters(modules: Modules, arch: Architecture, groups: Groups) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of this stage. A parameter without an entry, or an entry without its parameter, is an error."""
    known = name_map(arch)
    own: dict[str, nn.Parameter] = {}
    held: list[str] = []
    for module in _list(modules):
        layer_numbers = [layer.layer_number for layer in module.decoder.layers]
        held += [f"decoder.layers.{number - 1}." for number in layer_numbers]
        for name, parameter in module.named_parameters():
            canonical = canonical_name(name, layer_numbers)
            if canonical not in known:
                raise ValueError(f"parameter {name} ({canonical}) has no entry in the {arch.family} name map: add it to bridge/names.py.")
            own[canonical] = parameter
    held += ["embedding."] * groups.is_first_stage + ["decoder.final_layernorm."] * groups.is_last_stage
    missing = [name for name in known if name.startswith(tuple(held)) and name not in own]
    if missing:
        raise ValueError(f"the module has no parameter {missing[0]}, which a {arch.family} model has: build it from the same Architecture.")
    return own


def _owners(own: dict[str, nn.Parameter], groups: Groups) -> tuple[dict[str, int], dict[str, torch.dtype]]:
    """Which stage holds each parameter, and in which dtype. Equal on all ranks of ``groups.pp``."""
    mine = [{"name": name, "stage": groups.pipeline_rank, "dtype": str(p.dtype).removeprefix("torch.")} for name, p in own.items()]
    rows = gather_rows(mine, groups.pp)
    stage_of = {row["name"]: row["stage"] for row in rows}
    return stage_of, {row["name"]: getattr(torch, row["dtype"]) for row in rows}
