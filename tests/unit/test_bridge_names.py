"""The name map covers exactly what transformers builds, and serves the fused Transformer Engine names too."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.names import Kind, canonical_name, hf_shapes, name_map
from tests.tiny_models import TINY_MODELS, save_tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
def test_names_and_shapes_are_those_of_the_transformers_model(name: str, tmp_path: Path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = save_tiny_model(tmp_path / name, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    theirs = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}  # lists a tied tensor once
    assert hf_shapes(Architecture.from_pretrained(path)) == theirs


def test_tied_output_layer_is_filled_from_the_embedding_and_never_exported(tmp_path: Path):
    arch = Architecture.from_pretrained(save_tiny_model(tmp_path / "m", "qwen2_tied"))
    head = name_map(arch)["output_layer.weight"]
    assert (head.hf_names, head.is_copy, head.kind) == (("model.embed_tokens.weight",), True, Kind.VOCAB)
    assert "lm_head.weight" not in hf_shapes(arch)


def test_layer_numbers_of_a_later_stage_become_global():
    assert canonical_name("decoder.layers.1.mlp.linear_fc2.weight", [5, 6]) == "decoder.layers.5.mlp.linear_fc2.weight"


def test_fused_norm_names_of_transformer_engine_become_the_local_ones():
    fused = {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": "decoder.layers.2.pre_mlp_layernorm.weight",
    }
    assert {name: canonical_name(name, [3]) for name in fused} == fused


def test_a_name_of_no_layer_comes_back_unchanged():
    assert canonical_name("decoder.final_layernorm.weight", [1]) == "decoder.final_layernorm.weight"
