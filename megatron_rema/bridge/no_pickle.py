"""A checkpoint is data: reading one never runs what somebody wrote into it.

torch.distributed.checkpoint keeps the plan of a folder as a pickle (``.metadata``) and reads it, and the few objects that are no tensors,
without restriction. Both readers are replaced here: the plan by one that knows the plan's own classes and no other name, the objects by
torch's reader of plain data (``weights_only``). Tensors, and megatron-core's ``common.pt``, are read so already.
"""

from __future__ import annotations

import os
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_rema.parallel.platform import View

# What reading a pickle of arbitrary bytes may raise, by the documentation of pickle and by trial.
_NO_PLAN = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, OverflowError, MemoryError)
NO_TENSOR = (OSError, ValueError, RuntimeError, KeyError, *_NO_PLAN)  # what torch's reader says of bytes that are no tensor
_FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_KNOWN = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # where it was written to
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}


def contain() -> None:
    """Make torch.distributed.checkpoint read data only, in this process and from now on.

    Raises ValueError where the environment asks torch for the opposite.
    """
    if os.environ.get(_FORCED, "0").lower() in ("1", "y", "yes", "true"):
        raise ValueError(f"{_FORCED} is set; a checkpoint could then run whatever somebody wrote into it: unset it.")
    filesystem.pickle = View(pickle, load=read_plan)
    default_planner.torch = View(torch, load=_load_data)


def read_plan(file: IO[bytes]) -> Any:
    """What ``pickle.load`` gives for a ``.metadata``. Raises ValueError for a name that no plan holds, and for bytes that are no plan."""
    try:
        plan = _Plan(file).load()
    except _NO_PLAN as error:
        raise ValueError(f"a checkpoint's .metadata is damaged ({type(error).__name__}): copy the checkpoint again.") from None
    try:
        whole = isinstance(plan, Metadata) and _is_whole(plan)
    except (AttributeError, TypeError):  # what an object lacks that was cut short
        whole = False
    if not whole:
        raise ValueError("a checkpoint's .metadata is damaged (it holds no whole plan of tensors): copy the checkpoint again.")
    return plan


def _is_whole(plan: Metadata) -> bool:
    """Every part of a plan is there and of its type."""

    def numbers(*parts: Any) -> bool:
        return all(isinstance(part, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in part) for part in parts)

    for key, entry in plan.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and isinstance(key, str):
            continue
        if not (isinstance(key, str) and isinstance(entry, TensorStorageMetadata) and isinstance(entry.properties.dtype, torch.dtype)):
            return False
        shapes = [part for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)]
        if not numbers(entry.size, *shapes) or any(len(shape) != len(entry.size) for shape in shapes):
            return False
    return all(
        isinstance(index.fqn, str)
        and (index.offset is None or numbers(index.offset))
        and isinstance(info.relative_path, str)
        and numbers((info.offset, info.length))
        for index, info in plan.storage_data.items()
    )


class _Plan(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(
            f"a checkpoint's .metadata names {module}.{name}, which no plan of tensors holds: it is not what a save wrote. Nothing was "
            "run; take the checkpoint from where you trust it."
        )


def _load_data(file: IO[bytes], **options: Any) -> Any:
    return torch.load(file, **{**options, "weights_only": True})
