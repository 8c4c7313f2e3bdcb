"""Converted weights beside what ranks hold in memory, what trainers save, and what transformers computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.convert import open_source, to_hf_folder, to_megatron_folder
from megatron_rema.bridge.names import canonical_name
from megatron_rema.bridge.weights import load_hf
from megatron_rema.models.optimizer import Optimizer, build_optimizer
from megatron_rema.models.policy import ParallelModel, build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer import state
from tests.tiny_models import TINY_MODELS, save_tiny_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def _quietly(*_: object) -> None:
    """Nobody watches the progress."""


def _holds_the_file(path: Path, converted: Path) -> bool:
    """True when this rank's parameters, loaded from the Hugging Face folder, are this rank's file: names and every bit."""
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=2, pipeline=2)
    module = build_policy(arch, groups=groups, trainable=False, seed=1).module
    load_hf(module, arch, path, groups)
    layers = [layer.layer_number for layer in module.decoder.layers]
    held = {canonical_name(name, layers): parameter for name, parameter in module.named_parameters()}
    file = load_file(converted / f"model_tp_rank_{groups.tensor_rank:02}_pp_rank_{groups.pipeline_rank:02}.safetensors")
    assert held.keys() == file.keys()
    return all(torch.equal(held[name], tensor) for name, tensor in file.items())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_each_file_is_what_that_rank_holds_in_memory(run_ranks: Callable, tmp_path: Path, name: str):
    hf = save_tiny_model(tmp_path / "hf", name)
    to_megatron_folder(open_source(hf), tmp_path / "m", tensor=2, pipeline=2, advance=_quietly)
    assert run_ranks(4, _holds_the_file, hf, tmp_path / "m") == [True] * 4


@dataclass
class _Learner:
    model: ParallelModel
    optimizer: Optimizer


def _save_training_checkpoint(path: Path, folder: Path, tensor: int, pipeline: int) -> None:
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups)
    load_hf(model.module, arch, path, groups)
    folder.mkdir(exist_ok=True)
    learner = _Learner(model, build_optimizer(model, lr=1e-3, total_steps=1))
    state.Checkpoints(folder, keep=1).save(state.Position(step=7), {"policy": learner})


@pytest.mark.parametrize(("name", "tensor", "pipeline"), [("qwen2_tied", 2, 2), ("qwen3", 2, 1), ("llama3", 1, 2)])
def test_a_training_checkpoint_becomes_the_hugging_face_folder_bitwise(
    run_ranks: Callable, tmp_path: Path, name: str, tensor: int, pipeline: int
):
    hf = save_tiny_model(tmp_path / "hf", name)
    run_ranks(tensor * pipeline, _save_training_checkpoint, hf, tmp_path / "checkpoints", tensor, pipeline)
    source = open_source(tmp_path / "checkpoints" / "step_000007", config_dir=hf)
    to_hf_folder(source, tmp_path / "back", max_shard_bytes=1 << 30, advance=_quietly)
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(hf / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    with pytest.raises(ValueError, match="holds policy; got model critic"):
        open_source(tmp_path / "checkpoints" / "step_000007", config_dir=hf, model="critic")


def _verify(hf: Path, converted: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, str(TOOL), "verify", str(hf), str(converted), "--tokens", "40"]
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


def test_verify_compares_with_transformers_and_sees_a_swapped_projection(tmp_path: Path):
    hf = save_tiny_model(tmp_path / "hf", "llama3")
    to_megatron_folder(open_source(hf), tmp_path / "m", tensor=2, pipeline=2, advance=_quietly)
    done = _verify(hf, tmp_path / "m")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("max difference ")[1].split()[0]) < 2e-5  # as in test_logits_parity
    file, name = tmp_path / "m" / "model_tp_rank_00_pp_rank_01.safetensors", "decoder.layers.1.mlp.linear_fc1.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])  # up above gate
    save_file(tensors, file)
    done = _verify(hf, tmp_path / "m")
    assert done.returncode == 1 and "is not the model of" in done.stderr, done.stdout + done.stderr
