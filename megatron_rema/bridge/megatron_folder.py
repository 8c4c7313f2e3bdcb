"""Our Megatron-side weights on disk: one safetensors file per (tensor, pipeline) rank, config and tokenizer beside them.

    layout.json                                    tensor, pipeline, dtype, tensors and bytes of every file
    model_tp_rank_00_pp_rank_00.safetensors        megatron-core's names with global layer numbers, this rank's shards
    config.json, tokenizer files, ...              of the Hugging Face folder that the weights came from

With tied embeddings and pipeline > 1 the last stage stores its copy of the embedding, as it holds one in memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.layout import pad_rows, shard, shard_shape, to_hf, to_megatron
from megatron_rema.bridge.names import Entry, Kind, name_map
from megatron_rema.bridge.stream import TensorFile, TensorWriter
from megatron_rema.reading import brief, json_object

LAYOUT = "layout.json"
_FORMAT = "megatron_rema weights 1"
_EMBEDDING, _COPY = "embedding.word_embeddings.weight", "output_layer.weight"


def file_name(tensor_rank: int, pipeline_rank: int) -> str:
    return f"model_tp_rank_{tensor_rank:02}_pp_rank_{pipeline_rank:02}.safetensors"


def stage_of(megatron_name: str, arch: Architecture, pipeline: int) -> int:
    """The pipeline rank that holds a parameter: the embedding is on the first, layers are dealt in order, the rest is on the last."""
    if megatron_name.startswith("embedding."):
        return 0
    if megatron_name.startswith("decoder.layers."):
        return int(megatron_name.split(".")[2]) // (arch.num_layers // pipeline)
    return pipeline - 1


def entries_of_stage(arch: Architecture, pipeline_rank: int, pipeline: int) -> dict[str, Entry]:
    """What the files of one stage hold. A tied output layer on the embedding's own stage is the embedding."""
    return {
        name: entry
        for name, entry in name_map(arch).items()
        if stage_of(name, arch, pipeline) == pipeline_rank and not (entry.is_copy and pipeline == 1)
    }


def read_layout(path: Path) -> dict[str, Any]:
    """``layout.json`` of a Megatron folder. Raises ValueError for one that this package has not written."""
    layout = json_object(path / LAYOUT, "convert the folder again.")
    if layout.get("format") != _FORMAT:
        raise ValueError(f"{path / LAYOUT}: format is {brief(layout.get('format'))}; this version reads {_FORMAT!r}: convert it again.")
    for key, is_right, rule in (
        ("tensor", lambda value: type(value) is int and 1 <= value <= 4096, "an integer from 1 to 4096"),
        ("pipeline", lambda value: type(value) is int and 1 <= value <= 4096, "an integer from 1 to 4096"),
        ("dtype", lambda value: isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype), "a dtype of torch"),
        ("files", lambda value: isinstance(value, dict), "an object"),
    ):
        if not is_right(layout.get(key)):
            raise ValueError(f"{path / LAYOUT}: {key} is {brief(layout.get(key))}; it must be {rule}: convert the folder again.")
    return layout


class MegatronFolder:
    """Full Hugging Face tensors out of a Megatron folder. Opening it checks names, shapes, dtypes and bytes of ALL tensors (headers only).

    Raises ValueError naming the tensor that is missing, extra or misshapen, or the file that is.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.config_dir = path
        layout = read_layout(path)
        self.tensor, self.pipeline = layout["tensor"], layout["pipeline"]
        self.dtype: torch.dtype = getattr(torch, layout["dtype"])
        self.arch = Architecture.from_pretrained(path)
        self.arch.check_layout(self.tensor, self.pipeline)
        self.files = {
            (t, p): self._checked(TensorFile(path / file_name(t, p)), p, layout["files"])
            for p in range(self.pipeline)
            for t in range(self.tensor)
        }

    def _checked(self, file: TensorFile, pipeline_rank: int, recorded: dict[str, dict[str, int]]) -> TensorFile:
        expected = entries_of_stage(self.arch, pipeline_rank, self.pipeline)
        for name, entry in expected.items():
            shape = shard_shape(entry, self.arch, size=self.tensor)
            if name not in file.tensors:
                raise ValueError(f"{file.path} misses tensor {name} {shape}: convert the folder again.")
            found = file.tensors[name]
            if found.shape != shape:
                raise ValueError(
                    f"{file.path}: tensor {name} has shape {found.shape}; config.json and {LAYOUT} (tensor {self.tensor}, pipeline "
                    f"{self.pipeline}) make it {shape}: convert the folder again."
                )
            if found.dtype != self.dtype:
                raise ValueError(f"{file.path}: tensor {name} is {found.dtype}; {LAYOUT} says {self.dtype}: convert the folder again.")
        extra = sorted(file.tensors.keys() - expected.keys())
        if extra:
            raise ValueError(f"{file.path} has tensor {extra[0]}, which this stage of the model does not have: convert the folder again.")
        counted = _count(file)
        if recorded.get(file.path.name) != counted:
            raise ValueError(f"{file.path} holds {counted}; {LAYOUT} says {recorded.get(file.path.name)}: convert the folder again.")
        return file

    def tensors(self, entry: Entry) -> tuple[Tensor, ...]:
        """The full tensors of one entry, aligned with ``entry.hf_names``."""
        name = entry.megatron_name
        stage = stage_of(name, self.arch, self.pipeline)
        files = [self.files[t, stage] for t in range(self.tensor)]
        if entry.kind in (Kind.VOCAB, Kind.QKV):  # shards lie one below the other: read in place, the largest tensor is held once
            rows, *rest = shard_shape(entry, self.arch, size=self.tensor)
            whole = torch.empty((rows * self.tensor, *rest), dtype=self.dtype)
            for rank, file in enumerate(files):
                file.read_into(name, whole[rank * rows : (rank + 1) * rows])
            if name == _EMBEDDING:
                self._check_copy(whole.chunk(self.tensor))
            return to_hf([whole], entry, self.arch)
        shards = [file.read(name) for file in files]
        if entry.kind is Kind.REPLICATED:
            for file, other in zip(files, shards, strict=True):
                if not _same_bits(other, shards[0]):
                    raise ValueError(f"{file.path}: {name} differs from the one of tensor rank 0: convert the folder again.")
        return to_hf(shards, entry, self.arch)

    def _check_copy(self, embedding: tuple[Tensor, ...]) -> None:
        if not self.arch.tied or self.pipeline == 1:
            return
        for rank, mine in enumerate(embedding):
            file = self.files[rank, self.pipeline - 1]
            if not _same_bits(file.read(_COPY), mine):
                raise ValueError(f"{file.path}: {_COPY} differs from the embedding, to which it is tied: convert the folder again.")


class MegatronWriter:
    """All files of a Megatron folder, filled entry by entry in any order."""

    def __init__(self, path: Path, arch: Architecture, dtype: torch.dtype, *, tensor: int, pipeline: int) -> None:
        arch.check_layout(tensor, pipeline)
        self.path, self.arch, self.dtype, self.tensor, self.pipeline = path, arch, dtype, tensor, pipeline
        self._files: dict[tuple[int, int], TensorWriter] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[MegatronWriter]:
        with contextlib.ExitStack() as stack:
            for p in range(self.pipeline):
                entries = entries_of_stage(self.arch, p, self.pipeline)
                announced = {name: (self.dtype, shard_shape(entry, self.arch, size=self.tensor)) for name, entry in entries.items()}
                for t in range(self.tensor):
                    self._files[t, p] = stack.enter_context(TensorWriter(self.path / file_name(t, p), announced))
            yield self
        files = {file_name(t, p): _count(TensorFile(self.path / file_name(t, p))) for t, p in self._files}
        layout = {"format": _FORMAT, "tensor": self.tensor, "pipeline": self.pipeline, "dtype": str(self.dtype).removeprefix("torch.")}
        (self.path / LAYOUT).write_text(json.dumps({**layout, "files": files}, indent=2) + "\n")

    def write(self, entry: Entry, tensors: tuple[Tensor, ...]) -> None:
        """Full Hugging Face tensors of one entry -> the shards of every rank that holds it."""
        if entry.kind is Kind.VOCAB:
            full = pad_rows(tensors[0], self.arch.padded_vocab_size(self.tensor))
        else:
            full = to_megatron(tensors, entry, self.arch, rank=0, size=1)
        places = {entry.megatron_name: stage_of(entry.megatron_name, self.arch, self.pipeline)}
        if entry.megatron_name == _EMBEDDING and self.arch.tied and self.pipeline > 1:
            places[_COPY] = self.pipeline - 1
        for rank in range(self.tensor):
            local = shard(full, entry.kind, rank=rank, size=self.tensor)
            for name, stage in places.items():
                self._files[rank, stage].write(name, local)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))  # a NaN equals itself


def _count(file: TensorFile) -> dict[str, int]:
    return {"num_tensors": len(file.tensors), "num_bytes": sum(stored.num_bytes for stored in file.tensors.values())}
