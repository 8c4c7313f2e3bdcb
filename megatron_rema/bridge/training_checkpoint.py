"""The weights of one model out of a training checkpoint (megatron-core's torch_dist format), tensor by tensor, without process groups.

A torch_dist folder is a ``.metadata`` file (each tensor's global shape and, for every piece of it, offsets, file and bytes) and the files
with the pieces, each a torch-serialised tensor. megatron-core stacks the layers of a stage: ``decoder.layers.mlp.linear_fc2.weight`` has
a leading axis of layers. Read piece by piece here, because loading a whole key would hold that tensor of ALL layers.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_rema.architecture import Architecture
from megatron_rema.bridge import no_pickle
from megatron_rema.bridge.layout import shard_shape, to_hf
from megatron_rema.bridge.names import Entry, Kind, canonical_name, name_map
from megatron_rema.reading import brief, json_object

_LAYERS = "decoder.layers."


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a training checkpoint. Raises ValueError where it does not name the models beside it."""
    file, remedy = path / "state.json", "copy the checkpoint again."
    state = json_object(file, remedy)
    models = state.get("architectures")
    if not isinstance(models, dict) or not models or not all(isinstance(arch, dict) for arch in models.values()):
        raise ValueError(f"{file}: architectures is {brief(models)}; it must hold the architecture of each model: {remedy}")
    for name in models:
        if Path(name).name != name:
            raise ValueError(f"{file}: architectures names {brief(name)}, which is no folder beside it: {remedy}")
    return state


def read_metadata(path: Path) -> Metadata:
    """The plan of one model's folder. Raises ValueError naming the folder where there is none or it is damaged."""
    try:
        return FileSystemReader(str(path)).read_metadata()
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}/.metadata cannot be read: {error}") from None


class TrainingCheckpoint:
    """Full Hugging Face tensors of one model of ``checkpoints/step_NNNNNN``; ``config_dir`` is the folder that the run's model came from.

    Opening it checks names, shapes and dtypes of all weights. Raises ValueError naming what is missing, extra or misshapen.
    """

    def __init__(self, path: Path, config_dir: Path, model: str | None = None) -> None:
        no_pickle.contain()
        architectures = read_state(path)["architectures"]
        if model is None and len(architectures) == 1:
            (model,) = architectures
        if model not in architectures:
            raise ValueError(f"{path} holds {', '.join(architectures)}; got model {model}: choose one of them with --model.")
        stored = architectures[model]
        self.arch = Architecture.from_json(stored, source=f"{path / 'state.json'}, {model}")
        self.path, self.config_dir = path / model, config_dir
        self._metadata = read_metadata(self.path)
        self._storage = {(index.fqn, tuple(index.offset or ())): info for index, info in self._metadata.storage_data.items()}
        self._keys = self._weight_keys()
        self.dtype = self._check()

    def _weight_keys(self) -> dict[str, tuple[str, bool]]:
        """Canonical name (layer 0 stands for all stacked layers) -> key, and whether it is stacked."""
        keys = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or key.startswith("optimizer."):
                continue
            tail = key.removeprefix(_LAYERS)
            stacked = tail != key and not tail.split(".")[0].isdigit()
            layer_numbers = list(range(1, self.arch.num_layers + 1))
            keys[canonical_name(f"{_LAYERS}0.{tail}" if stacked else key, layer_numbers)] = (key, stacked)
        return keys

    def _key(self, name: str) -> tuple[str, bool]:
        """The stored key of a parameter."""
        if name in self._keys and not self._keys[name][1]:
            return self._keys[name]
        if name.startswith(_LAYERS):
            name = f"{_LAYERS}0.{name.split('.', 3)[3]}"
        return self._keys.get(name, ("", False))

    def _check(self) -> torch.dtype:
        wanted = {name: entry for name, entry in name_map(self.arch).items() if not entry.is_copy}
        used, dtypes = set(), {}
        for name, entry in wanted.items():
            key, stacked = self._key(name)
            if not key:
                raise ValueError(f"{self.path} misses tensor {name}: the checkpoint is of another model.")
            used.add(key)
            stored = self._metadata.state_dict_metadata[key]
            found = tuple(stored.size[1:] if stacked else stored.size)
            shape = shard_shape(entry, self.arch, size=1)
            padded = entry.kind is Kind.VOCAB and found[0] >= self.arch.vocab_size and found[1:] == shape[1:]
            if found != shape and not padded:  # the vocabulary's padding depends on the layout that saved it
                raise ValueError(f"{self.path}: tensor {name} has shape {found}; state.json makes it {shape}: another model's weights.")
            dtypes.setdefault(stored.properties.dtype, name)
        extra = sorted({key for key, _ in self._keys.values()} - used - ({"output_layer.weight"} if self.arch.tied else set()))
        if extra:
            raise ValueError(f"{self.path} has tensor {extra[0]}, which this {self.arch.family} model does not have.")
        if len(dtypes) > 1:
            raise ValueError(f"{self.path}: tensors differ in dtype ({', '.join(f'{name} {dtype}' for dtype, name in dtypes.items())}).")
        return next(iter(dtypes))

    def tensors(self, entry: Entry) -> tuple[Tensor, ...]:
        """The full tensors of one entry, aligned with ``entry.hf_names``."""
        key, stacked = self._key(entry.megatron_name)
        stored = self._metadata.state_dict_metadata[key]
        layer = int(entry.megatron_name.split(".")[2]) if stacked else None
        whole = torch.empty(tuple(stored.size[1:] if stacked else stored.size), dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if stacked:
                if sizes[0] != 1:
                    raise ValueError(f"{self.path}/.metadata: {key} has a piece of {sizes[0]} layers: copy the checkpoint again.")
                if offsets[0] != layer:
                    continue
            piece = self._read(key, offsets)
            if tuple(piece.shape) != sizes or piece.dtype != whole.dtype:
                raise ValueError(
                    f"{self.path}: the piece of {key} at {offsets} is {piece.dtype} {tuple(piece.shape)}; .metadata says {whole.dtype} "
                    f"{sizes}: copy the checkpoint again."
                )
            if stacked:
                piece, offsets, sizes = piece.reshape(sizes[1:]), offsets[1:], sizes[1:]
            if any(start + size > end for start, size, end in zip(offsets, sizes, whole.shape, strict=True)):
                raise ValueError(f"{self.path}/.metadata: a piece of {key} lies outside of it: copy the checkpoint again.")
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))] = piece
            filled += piece.numel()
        if filled != whole.numel():
            raise ValueError(f"{self.path}: {filled} of {whole.numel()} numbers of {entry.megatron_name} are stored: incomplete.")
        return to_hf([whole], entry, self.arch)

    def _read(self, key: str, offsets: tuple[int, ...]) -> Tensor:
        info = self._storage.get((key, offsets))
        if info is None:
            raise ValueError(f"{self.path}/.metadata names no file for {key} at {offsets}: copy the checkpoint again.")
        file = self.path / info.relative_path
        try:
            with file.open("rb") as stream:
                stream.seek(info.offset)
                return torch.load(io.BytesIO(stream.read(info.length)), map_location="cpu", weights_only=True)
        except no_pickle.NO_TENSOR as error:
            raise ValueError(f"{file}: {key} at {offsets} cannot be read ({type(error).__name__}): copy the checkpoint again.") from None
