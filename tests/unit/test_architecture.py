"""Reading config.json: both rope spellings, and every refusal by field, value, rule, remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rema.architecture import Architecture

QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "eos_token_id": 7,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_fields_come_from_config_json_and_stop_tokens_also_from_generation_config(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    arch = Architecture.from_pretrained(tmp_path)
    assert arch == Architecture("qwen2", 4, 128, 384, 8, 4, 16, 101, 1e6, None, 1e-6, True, False, True, 4096, (7, 9))


def test_old_and_new_rope_spelling_give_the_same_architecture():
    base = {key: value for key, value in QWEN2.items() if key != "rope_theta"} | {"model_type": "llama"}
    old = Architecture.from_config(base | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}})
    new = Architecture.from_config(base | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert old == new
    assert (new.rope_theta, new.rope_scaling_factor) == (5e5, 8.0)


def test_qwen3_has_qk_norm_no_bias_and_its_own_head_dim():
    arch = Architecture.from_config(QWEN2 | {"model_type": "qwen3", "head_dim": 64})
    assert (arch.qk_norm, arch.qkv_bias, arch.head_dim) == (True, False, 64)


def test_padded_vocab_is_the_least_multiple_of_eight_per_rank():
    arch = Architecture.from_config(QWEN2)  # 101 tokens
    assert [arch.padded_vocab_size(n) for n in (1, 2, 4, 16)] == [104, 112, 128, 128]
    assert Architecture.from_config(QWEN2 | {"vocab_size": 128}).padded_vocab_size(2) == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are qwen2, qwen3, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 4096}}, "is 4096; .* fixes it at 8192"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "without factor"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_size": None}, "hidden_size is None; it must be an integer"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused_by_name(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Architecture.from_config(QWEN2 | change)


def test_attention_bias_of_llama_is_refused_because_it_also_biases_the_output_projection():
    with pytest.raises(ValueError, match="attention_bias is True"):
        Architecture.from_config(QWEN2 | {"model_type": "llama", "attention_bias": True})


def test_a_folder_without_config_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Architecture.from_pretrained(tmp_path)


def test_layout_that_cuts_heads_or_layers_unevenly_is_refused_with_the_choices():
    arch = Architecture.from_config(QWEN2)
    arch.check_layout(tensor=4, pipeline=2)
    with pytest.raises(ValueError, match=r"parallel.tensor \(8\) must divide num_key_value_heads \(4\).*choose one of 1, 2, 4"):
        arch.check_layout(tensor=8, pipeline=1)
    with pytest.raises(ValueError, match=r"parallel.pipeline \(3\) must divide num_hidden_layers \(4\).*remainder 1"):
        arch.check_layout(tensor=1, pipeline=3)
    with pytest.raises(ValueError, match=r"parallel.tensor \(0\)"):
        arch.check_layout(tensor=0, pipeline=1)


def test_reading_an_architecture_imports_neither_torch_nor_transformers():
    code = "import sys, megatron_rema.architecture; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
