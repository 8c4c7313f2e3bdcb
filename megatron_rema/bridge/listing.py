"""What a folder of weights holds, from headers alone: Hugging Face, Megatron, training checkpoint, or any folder of safetensors files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rema.bridge.megatron_folder import LAYOUT
from megatron_rema.bridge.stream import TensorFile


@dataclass(frozen=True)
class Row:
    """One tensor, or one shard of one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    shard: str  # file, rank or number of pieces


@dataclass(frozen=True)
class Listing:
    kind: str
    about: dict[str, str]  # what the folder says of itself
    rows: list[Row]


def list_folder(path: Path) -> Listing:
    """Raises ValueError where ``path`` holds no weights, or a file's header does not fit the file."""
    if (path / "state.json").is_file():
        return _training_checkpoint(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no weights: neither *.safetensors nor the state.json of a training checkpoint is there.")
    about = {}
    if (path / LAYOUT).is_file():
        layout = json.loads((path / LAYOUT).read_text())
        about = {key: str(layout[key]) for key in ("tensor", "pipeline", "dtype")}
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text())
        about["model"] = str((config.get("architectures") or [config.get("model_type")])[0])
    rows = [
        Row(name, stored.shape, _short(stored.dtype), stored.num_bytes, _shard_name(file))
        for file in files
        for name, stored in TensorFile(file).tensors.items()
    ]
    return Listing("Megatron folder" if (path / LAYOUT).is_file() else "Hugging Face folder", about, rows)


def _training_checkpoint(path: Path) -> Listing:
    state = json.loads((path / "state.json").read_text())
    rows = []
    for model in state["architectures"]:
        for key, stored in FileSystemReader(str(path / model)).read_metadata().state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                shape, dtype = tuple(stored.size), stored.properties.dtype
                rows.append(Row(f"{model}/{key}", shape, _short(dtype), math.prod(shape) * dtype.itemsize, f"{len(stored.chunks)} pieces"))
    about = {key: str(value) for key, value in state.items() if isinstance(value, (int, str))}
    return Listing("training checkpoint", {**about, "models": ", ".join(state["architectures"])}, rows)


def _shard_name(file: Path) -> str:
    parts = file.stem.removeprefix("model_").split("_")
    if parts[:2] == ["tp", "rank"] and parts[3:5] == ["pp", "rank"]:
        return f"tp {int(parts[2])} pp {int(parts[5])}"
    return file.name


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
