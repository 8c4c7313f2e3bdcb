"""What a folder of weights holds, from headers alone: Hugging Face, Megatron, training checkpoint, or any folder of safetensors files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rema.bridge import no_pickle
from megatron_rema.bridge.megatron_folder import LAYOUT, read_layout
from megatron_rema.bridge.stream import TensorFile
from megatron_rema.bridge.training_checkpoint import read_metadata, read_state
from megatron_rema.reading import brief, is_file, json_object


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
    if is_file(path / "state.json"):
        return _training_checkpoint(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no weights: neither *.safetensors nor the state.json of a training checkpoint is there.")
    about = {}
    if (path / LAYOUT).is_file():
        layout = read_layout(path)
        about = {key: str(layout[key]) for key in ("tensor", "pipeline", "dtype")}
    if (path / "config.json").is_file():
        config = json_object(path / "config.json")
        kinds = config.get("architectures")
        about["model"] = brief(kinds[0] if isinstance(kinds, list) and kinds else config.get("model_type")).strip("'")
    rows = [
        Row(name, stored.shape, _short(stored.dtype), stored.num_bytes, _shard_name(file))
        for file in files
        for name, stored in TensorFile(file).tensors.items()
    ]
    return Listing("Megatron folder" if (path / LAYOUT).is_file() else "Hugging Face folder", about, rows)


def _training_checkpoint(path: Path) -> Listing:
    no_pickle.contain()
    state = read_state(path)
    rows = []
    for model in state["architectures"]:
        for key, stored in read_metadata(path / model).state_dict_metadata.items():
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
