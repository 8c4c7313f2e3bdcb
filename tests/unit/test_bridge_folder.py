"""A checkpoint folder that does not belong to the model is refused by the name of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.folder import CheckpointReader
from tests.tiny_models import save_tiny_model

Q = "model.layers.1.self_attn.q_proj.weight"


def _rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _refused(path: Path, arch: Architecture, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CheckpointReader(path, arch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tied", "qwen2_tied")


@pytest.fixture
def arch(folder: Path) -> Architecture:
    return Architecture.from_pretrained(folder)


def test_a_missing_tensor_is_named(folder: Path, arch: Architecture):
    _refused(_rewritten(folder, lambda t: t.pop(Q)), arch, f"misses tensor {Q}")


def test_an_extra_tensor_is_named(folder: Path, arch: Architecture):
    _refused(_rewritten(folder, lambda t: t.update({"score.weight": torch.ones(1)})), arch, r"has tensor score\.weight")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path, arch: Architecture):
    _refused(_rewritten(folder, lambda t: t.update({Q: t[Q][:-1].clone()})), arch, rf"{Q} has shape \(127, 128\).*\(128, 128\)")


def test_another_family_is_refused(folder: Path, arch: Architecture, tmp_path: Path):
    _refused(save_tiny_model(tmp_path / "llama", "llama3"), arch, "family is 'llama'; the model to fill has 'qwen2'")


def test_another_rope_base_is_refused_though_every_shape_agrees(folder: Path, arch: Architecture):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(config))
    _refused(folder, arch, r"rope_theta is 500000\.0; the model to fill has 10000\.0")


def test_a_truncated_file_is_named(folder: Path, arch: Architecture):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _refused(folder, arch, r"model\.safetensors cannot be read")


def test_a_folder_without_weights_is_refused(folder: Path, arch: Architecture):
    (folder / "model.safetensors").unlink()
    _refused(folder, arch, r"neither model\.safetensors nor")


def test_a_second_copy_of_the_tied_head_is_accepted_only_when_equal(folder: Path, arch: Architecture):
    def add_head(offset: float) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + offset})

    CheckpointReader(_rewritten(folder, add_head(0.0)), arch)
    _refused(_rewritten(folder, add_head(1.0)), arch, r"lm_head\.weight differs from model\.embed_tokens\.weight")
