"""Weights from one folder to another: Hugging Face, Megatron at any TP x PP, training checkpoint (as a source only).

A source gives the full Hugging Face tensors of one name-map entry at a time, a writer takes them: memory holds one entry (the Hugging
Face writer: one file's worth), whatever the size of the model. Sources check names, shapes and bytes of everything before the first
tensor is read; what is written is opened again and checked before the folder takes its name. Numbers are only moved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.folder import _COMPANIONS, CheckpointReader, _weight_files, write_checkpoint
from megatron_rema.bridge.megatron_folder import LAYOUT, MegatronFolder, MegatronWriter
from megatron_rema.bridge.names import Entry, hf_shapes, name_map
from megatron_rema.bridge.stream import TensorFile
from megatron_rema.bridge.training_checkpoint import TrainingCheckpoint
from megatron_rema.reading import json_object

Advance = Callable[[str, int], None]  # (name, bytes) of what was just read


class Source(Protocol):
    """Where weights come from."""

    path: Path
    config_dir: Path  # config.json and tokenizer files
    arch: Architecture
    dtype: torch.dtype

    def tensors(self, entry: Entry) -> tuple[Tensor, ...]:
        """The full Hugging Face tensors of one entry, aligned with ``entry.hf_names``."""


class HuggingFaceFolder:
    """Full tensors out of a Hugging Face folder. Opening it checks it as `CheckpointReader` does, and that all tensors have one dtype."""

    def __init__(self, path: Path) -> None:
        self.path = self.config_dir = path
        self.arch = Architecture.from_pretrained(path)
        self._files = {name: file for file in map(TensorFile, _weight_files(path)) for name in file.tensors}
        CheckpointReader(path, self.arch)
        dtypes = {self._files[name].tensors[name].dtype: name for name in reversed(hf_shapes(self.arch))}
        if len(dtypes) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise ValueError(f"{path}: tensors differ in dtype ({found}); a Megatron model has one: cast them to one dtype first.")
        (self.dtype,) = dtypes

    def tensors(self, entry: Entry) -> tuple[Tensor, ...]:
        return tuple(self._files[name].read(name) for name in entry.hf_names)


def open_source(path: Path, *, config_dir: Path | None = None, model: str | None = None) -> Source:
    """Whatever ``path`` is. A training checkpoint needs ``config_dir`` (the Hugging Face folder it was trained from) and, where it holds
    several models, the name of one. Raises ValueError where it is none of the three."""
    if (path / LAYOUT).is_file():
        return MegatronFolder(path)
    if (path / "state.json").is_file():
        if config_dir is None:
            raise ValueError(f"{path} is a training checkpoint, which has no config.json and tokenizer: name their folder with --config.")
        return TrainingCheckpoint(path, config_dir, model)
    if (path / "config.json").is_file():
        return HuggingFaceFolder(path)
    raise ValueError(
        f"{path} holds no weights: a Hugging Face folder has config.json, a Megatron folder {LAYOUT}, a training checkpoint state.json."
    )


def num_bytes(source: Source) -> int:
    """Of all full tensors, vocabulary padding and copies left out."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(source.arch).values()) * source.dtype.itemsize


def to_megatron_folder(source: Source, out_dir: Path, *, tensor: int, pipeline: int, advance: Advance) -> None:
    """Writes ``source`` as a Megatron folder cut into ``tensor`` x ``pipeline``. Raises ValueError when it cannot be cut so, or
    ``out_dir`` exists."""
    source.arch.check_layout(tensor, pipeline)
    partial = _begin(out_dir)
    try:
        writer = MegatronWriter(partial, source.arch, source.dtype, tensor=tensor, pipeline=pipeline)
        with writer.open():
            for entry, tensors in _walk(source, advance):
                writer.write(entry, tensors)
        _copy_companions(source.config_dir, partial)
        MegatronFolder(partial)
        os.rename(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def to_hf_folder(source: Source, out_dir: Path, *, max_shard_bytes: int, advance: Advance) -> None:
    """Writes ``source`` as a Hugging Face folder. Raises ValueError when ``out_dir`` exists."""
    _refuse_existing(out_dir)
    named = (pair for entry, tensors in _walk(source, advance) for pair in zip(entry.hf_names, tensors, strict=True))
    try:
        write_checkpoint(named, source.arch, source.dtype, source.config_dir, out_dir, max_shard_bytes)
    finally:
        shutil.rmtree(_partial(out_dir), ignore_errors=True)


def _walk(source: Source, advance: Advance) -> Iterator[tuple[Entry, tuple[Tensor, ...]]]:
    for name, entry in name_map(source.arch).items():
        if entry.is_copy:
            continue
        tensors = source.tensors(entry)
        for hf_name, shape, tensor in zip(entry.hf_names, entry.hf_shapes, tensors, strict=True):
            assert tuple(tensor.shape) == shape and tensor.dtype == source.dtype, f"{hf_name}: {tuple(tensor.shape)} {tensor.dtype}"
        advance(name, sum(tensor.nbytes for tensor in tensors))
        yield entry, tensors


def _partial(out_dir: Path) -> Path:
    return out_dir.with_name(f".{out_dir.name}.partial")


def _begin(out_dir: Path) -> Path:
    """The folder that takes the name ``out_dir`` when it is complete."""
    _refuse_existing(out_dir)
    partial = _partial(out_dir)
    shutil.rmtree(partial, ignore_errors=True)  # left by a writer that was killed
    partial.mkdir(parents=True)
    return partial


def _refuse_existing(out_dir: Path) -> None:
    if out_dir.exists():
        raise ValueError(f"{out_dir} exists; a checkpoint is never overwritten: choose another name or remove it.")


def _copy_companions(source_dir: Path, target: Path) -> None:
    for pattern in ("config.json", *_COMPANIONS):
        for file in source_dir.glob(pattern):
            if file.is_file():
                shutil.copy2(file, target / file.name)
    json_object(target / "config.json")
