"""A Hugging Face checkpoint folder on disk: checked before it is read, complete before it has its name. No process groups."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.names import hf_shapes
from megatron_rema.reading import brief, json_object

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TIED_HEAD = "lm_head.weight"  # some folders with tied embeddings store it a second time
# What stands beside the weights and goes along unchanged.
_COMPANIONS = (
    *("generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "*.tiktoken"),
)
# These may differ between a folder and the model that it fills: they touch neither shapes nor arithmetic.
_FREE_FIELDS = ("max_positions", "eos_token_ids", "initializer_range")


class CheckpointReader:
    """Tensors of one folder by name, on the CPU. Opening it checks names and shapes of ALL tensors (headers only) against ``arch``.

    Raises ValueError when the folder holds another architecture, or misses a tensor, or has one that the model does not have.
    """

    def __init__(self, path: str | Path, arch: Architecture) -> None:
        self.path = Path(path)
        _check_same_architecture(self.path, arch)
        self._files: dict[str, safe_open] = {}  # tensor name -> its open file
        for file in _weight_files(self.path):
            try:
                opened = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); the folder is incomplete: copy or download it again.") from error
            self._files.update(dict.fromkeys(opened.keys(), opened))
        self._check_tensors(arch)

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def _check_tensors(self, arch: Architecture) -> None:
        expected = hf_shapes(arch)
        for name, shape in expected.items():
            if name not in self._files:
                raise ValueError(f"{self.path} misses tensor {name} {shape}; every parameter must be filled: complete the folder.")
            found = tuple(self._files[name].get_slice(name).get_shape())
            if found != shape:
                raise ValueError(
                    f"{self.path}: tensor {name} has shape {found}; config.json makes it {shape}: the two do not belong together."
                )
        for name in sorted(self._files.keys() - expected.keys()):
            if arch.tied and name == _TIED_HEAD:
                if not torch.equal(self.tensor(name), self.tensor("model.embed_tokens.weight")):
                    raise ValueError(
                        f"{self.path}: {name} differs from model.embed_tokens.weight though tie_word_embeddings is true; "
                        "set it to false in config.json, or remove the tensor."
                    )
            elif not name.endswith("rotary_emb.inv_freq"):  # old llama folders keep this constant
                raise ValueError(f"{self.path} has tensor {name}, which no parameter of this {arch.family} model takes: wrong folder?")


def write_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], arch: Architecture, dtype: torch.dtype, source_dir: Path, out_dir: Path, max_shard_bytes: int
) -> None:
    """Streams ``tensors`` (in ``hf_shapes`` order, all of ``dtype``) into safetensors files, then config and tokenizer from ``source_dir``.

    Holds one file's tensors in memory. Everything goes to a folder beside ``out_dir`` that takes its name when complete.
    """
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a writer that was killed
    partial.mkdir(parents=True)
    files = _plan_files(arch, dtype, max_shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, names in enumerate(files, 1):
        file_name = _SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        held: dict[str, Tensor] = {}
        for name in names:
            arrived, tensor = next(stream)
            assert arrived == name and tensor.dtype == dtype, f"expected {name} {dtype}, got {arrived} {tensor.dtype}"
            held[name] = tensor.to("cpu", copy=True).contiguous()
            num_bytes += tensor.nbytes
        save_file(held, partial / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    assert next(stream, None) is None, "more tensors than the architecture has"
    if len(files) > 1:
        _write_json(partial / _INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    config = json_object(source_dir / "config.json")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if arch.num_scalars:
        config["architectures"] = [f"{arch.family.capitalize()}ForSequenceClassification"]
        config["tie_word_embeddings"] = False
        config["num_labels"] = arch.num_scalars
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(arch.num_scalars)}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    _write_json(partial / "config.json", config)
    for pattern in _COMPANIONS:
        for file in source_dir.glob(pattern):
            if file.is_file():
                shutil.copy2(file, partial / file.name)
    os.rename(partial, out_dir)


def _plan_files(arch: Architecture, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names per file: in order, a new file when the next tensor would exceed the limit (a larger one gets a file alone)."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in hf_shapes(arch).items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if files[-1] and held + size > max_shard_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        files = json_object(path / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) and Path(name).name == name for name in files.values()):
            raise ValueError(
                f"{path / _INDEX}: weight_map is {brief(files)}; it must give each tensor the name of a file beside it: download it again."
            )
        return [path / name for name in sorted(set(files.values()))]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    raise ValueError(f"{path} has neither {_SINGLE} nor {_INDEX}; weights must be safetensors: convert or complete the folder.")


def _check_same_architecture(path: Path, arch: Architecture) -> None:
    found = Architecture.from_pretrained(path)
    for field in sorted(fields(Architecture), key=lambda field: field.name != "num_scalars"):  # another head says more than what follows
        ours, theirs = getattr(arch, field.name), getattr(found, field.name)
        if ours != theirs and field.name not in _FREE_FIELDS:
            raise ValueError(
                f"{path}: {field.name} is {theirs!r}; the model to fill has {ours!r}: choose a checkpoint of the same architecture."
            )
