"""Hugging Face -> Megatron shards -> Hugging Face at every layout. Numbers are only moved, so equality is bitwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.layout import shard_shape
from megatron_rema.bridge.names import hf_shapes, name_map
from megatron_rema.bridge.weights import iterate_hf_tensors, load_hf, save_hf
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import Groups, build_groups
from tests.tiny_models import TINY_MODELS, save_tiny_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module", params=TINY_MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hf") / request.param, request.param)


def exports_bitwise(path: Path, tensor: int, pipeline: int, virtual: int = 1) -> bool:
    """Loads, exports; True when names, their order, dtypes and every bit are the file's on this rank."""
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    modules = build_policy(arch, groups=groups, virtual=virtual, dtype=torch.float32, trainable=False, seed=1).modules
    num_bytes = load_hf(modules, arch, path, groups)
    assert num_bytes == sum(parameter.nbytes for module in modules for parameter in module.parameters())
    return _same_as_file(path, arch, list(iterate_hf_tensors(modules, arch, groups)))


def _same_as_file(path: Path, arch: Architecture, exported: list[tuple[str, torch.Tensor]]) -> bool:
    file = load_file(path / "model.safetensors")
    assert [name for name, _ in exported] == list(hf_shapes(arch))
    assert file.keys() == dict(exported).keys()
    return all(tensor.dtype == file[name].dtype and torch.equal(tensor, file[name]) for name, tensor in exported)


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_hf_to_megatron_to_hf_is_bitwise_identity(run_ranks: Callable, checkpoint: Path, tensor: int, pipeline: int):
    assert run_ranks(tensor * pipeline, exports_bitwise, checkpoint, tensor, pipeline) == [True] * (tensor * pipeline)


@pytest.mark.parametrize("name", ["qwen2_tied", "llama3"])
def test_virtual_stages_load_and_export_bitwise(run_ranks: Callable, tmp_path: Path, name: str):
    path = save_tiny_model(tmp_path / "hf", name, num_hidden_layers=4)
    assert run_ranks(4, exports_bitwise, path, 2, 2, 2) == [True] * 4


def _save_and_read_back(path: Path, out_dir: Path, max_shard_bytes: int) -> tuple[bool, str]:
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=2, pipeline=1)  # on four ranks: two copies of the model, one of which only waits
    module = build_policy(arch, groups=groups, dtype=torch.float32, trainable=False, seed=1).module
    load_hf(module, arch, path, groups)
    save_hf(module, arch, path, out_dir, groups, max_shard_bytes=max_shard_bytes)
    complete_on_return = (out_dir / "config.json").is_file()
    try:
        save_hf(module, arch, path, out_dir, groups)
    except ValueError as error:
        return complete_on_return, str(error)
    return complete_on_return, ""


def test_saved_folder_is_read_by_transformers_and_by_us_and_never_overwritten(run_ranks: Callable, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    source, out_dir = save_tiny_model(tmp_path / "source", "qwen2_tied"), tmp_path / "runs" / "exported"
    (source / "tokenizer.json").write_text("{}")
    returned = run_ranks(4, _save_and_read_back, source, out_dir, 150_000)  # the embedding alone is 101 * 128 * 4 = 51,712 bytes
    assert all(complete and "is never overwritten" in refusal for complete, refusal in returned)
    files = {file.name for file in out_dir.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= files
    shards = [out_dir / name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 150_000 for shard in shards)
    assert [path.name for path in out_dir.parent.iterdir()] == ["exported"]  # no temporary folder stays
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, out_dir))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert run_ranks(1, _exports_bitwise_sharded, source, out_dir) == [True]


def _exports_bitwise_sharded(source: Path, out_dir: Path) -> bool:
    """Loading from the several files of ``out_dir`` gives the tensors of ``source``."""
    arch = Architecture.from_pretrained(out_dir)
    groups = build_groups(tensor=1, pipeline=1)
    module = build_policy(arch, groups=groups, dtype=torch.float32, trainable=False, seed=1).module
    load_hf(module, arch, out_dir, groups)
    return _same_as_file(source, arch, list(iterate_hf_tensors(module, arch, groups)))


class _FusedStage(nn.Module):
    """Parameters of one rank's stage under Transformer Engine's names: norms inside the linear layers, layers counted from 0."""

    def __init__(self, arch: Architecture, groups: Groups, dtype: torch.dtype) -> None:
        super().__init__()
        per_stage = arch.num_layers // groups.pipeline_size
        first = per_stage * groups.pipeline_rank
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(nn.Module() for _ in range(per_stage))
        for index, layer in enumerate(self.decoder.layers):
            layer.layer_number = first + index + 1
        for name, entry in name_map(arch).items():
            shape = shard_shape(entry, arch, size=groups.tensor_size)
            if name.startswith("decoder.layers."):
                number, tail = name.removeprefix("decoder.layers.").split(".", 1)
                if not first <= int(number) < first + per_stage:
                    continue
                tail = tail.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
                tail = tail.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
                name = f"decoder.layers.{int(number) - first}.{tail}"
            elif name.startswith("embedding."):
                if not groups.is_first_stage:
                    continue
            elif not groups.is_last_stage or (entry.is_copy and groups.is_first_stage):
                continue
            _put(self, name, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)


def _fused_round_trip(path: Path, dtype: torch.dtype) -> bool:
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=2, pipeline=2)
    module = _FusedStage(arch, groups, dtype)
    num_bytes = load_hf(module, arch, path, groups)
    assert num_bytes == sum(parameter.nbytes for parameter in module.parameters())
    return _same_as_file(path, arch, list(iterate_hf_tensors(module, arch, groups)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_transformer_engine_names_are_served_by_the_same_map(run_ranks: Callable, tmp_path: Path, dtype: str):
    path = save_tiny_model(tmp_path / "hf", "qwen3", dtype=dtype)
    assert run_ranks(4, _fused_round_trip, path, getattr(torch, dtype)) == [True] * 4


def _refusal(path: Path, change: Callable[[nn.Module], None]) -> str:
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=1, pipeline=1)
    module = _FusedStage(arch, groups, torch.float32)
    change(module)
    try:
        load_hf(module, arch, path, groups)
    except ValueError as error:
        return str(error)
    return ""


def _add_parameter(module: nn.Module) -> None:
    module.register_parameter("value_head", nn.Parameter(torch.zeros(1)))


def _drop_parameter(module: nn.Module) -> None:
    del module.decoder.layers[1].self_attention.q_layernorm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_add_parameter, "parameter value_head (value_head) has no entry"),
        (_drop_parameter, "no parameter decoder.layers.1.self_attention.q_layernorm.weight"),
    ],
)
def test_a_module_of_another_architecture_is_refused_by_parameter_name(run_ranks: Callable, tmp_path: Path, change: Callable, words: str):
    assert words in run_ranks(1, _refusal, save_tiny_model(tmp_path / "hf", "qwen3"), change)[0]
