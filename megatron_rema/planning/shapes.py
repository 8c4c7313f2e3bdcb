"""Shapes of models, and what one rank holds of one: its pipeline stage of its tensor shard. Numbers only, no torch.

Built-in shapes are those of the published config.json files, so that a plan needs no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rema.architecture import Architecture
from megatron_rema.config import LayoutConfig

_QWEN = {"family": "qwen2", "head_dim": 128, "rope_theta": 1e6, "rope_scaling_factor": None, "qkv_bias": True, "eos_token_ids": (151645,)}
_LLAMA = {"family": "llama", "head_dim": 128, "rope_theta": 5e5, "qkv_bias": False, "eos_token_ids": (128009,)}

# name -> Architecture. Sources: config.json of Qwen/Qwen2.5-7B-Instruct, Qwen/Qwen2.5-32B-Instruct, meta-llama/Llama-3.1-8B-Instruct and
# meta-llama/Llama-3.3-70B-Instruct on huggingface.co.
BUILT_IN: dict[str, Architecture] = {
    "qwen2.5-7b": Architecture(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_heads=28,
        num_kv_heads=4,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        qk_norm=False,
        tied=False,
        max_positions=32768,
        **_QWEN,
    ),
    "qwen2.5-32b": Architecture(
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=27648,
        num_heads=40,
        num_kv_heads=8,
        vocab_size=152064,
        rms_norm_eps=1e-6,
        qk_norm=False,
        tied=False,
        max_positions=32768,
        **_QWEN,
    ),
    "llama-3.1-8b": Architecture(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_heads=32,
        num_kv_heads=8,
        vocab_size=128256,
        rope_scaling_factor=8.0,
        rms_norm_eps=1e-5,
        qk_norm=False,
        tied=False,
        max_positions=131072,
        **_LLAMA,
    ),
    "llama-3.3-70b": Architecture(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_heads=64,
        num_kv_heads=8,
        vocab_size=128256,
        rope_scaling_factor=8.0,
        rms_norm_eps=1e-5,
        qk_norm=False,
        tied=False,
        max_positions=131072,
        **_LLAMA,
    ),
}


def architecture(name: str) -> Architecture:
    """A built-in shape by its name, or that of a Hugging Face folder. Raises ValueError naming both possibilities."""
    if name.lower() in BUILT_IN:
        return BUILT_IN[name.lower()]
    if not Path(name).is_dir():
        raise ValueError(f"model {name!r} is neither a folder with config.json nor one of {', '.join(BUILT_IN)}: give one of these.")
    return Architecture.from_pretrained(name)


@dataclass(frozen=True)
class Shard:
    """What one rank holds: stage ``stage`` of ``arch`` cut as ``layout`` says, its vocabulary, heads and widths divided by ``tensor``."""

    arch: Architecture
    layout: LayoutConfig
    stage: int = 0

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def num_layers(self) -> int:
        return self.arch.num_layers // self.layout.pipeline

    @property
    def query_size(self) -> float:
        return self.arch.num_heads * self.arch.head_dim / self.layout.tensor

    @property
    def kv_size(self) -> float:
        """Of keys; values are as many."""
        return self.arch.num_kv_heads * self.arch.head_dim / self.layout.tensor

    @property
    def ffn_size(self) -> float:
        return self.arch.ffn_hidden_size / self.layout.tensor

    @property
    def vocab_size(self) -> float:
        """Columns of the logits here, padding included."""
        return self.arch.padded_vocab_size(self.layout.tensor) / self.layout.tensor

    @property
    def layer_matrices(self) -> float:
        """Parameters of one layer that multiply tokens."""
        hidden = self.arch.hidden_size
        return hidden * (2 * self.query_size + 2 * self.kv_size + 3 * self.ffn_size)

    @property
    def layer_parameters(self) -> float:
        arch = self.arch
        bias = self.query_size + 2 * self.kv_size if arch.qkv_bias else 0
        return self.layer_matrices + bias + 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)

    @property
    def head_parameters(self) -> float:
        """Of whatever ends the last stage: the output layer (where it is tied and lies on the first stage, the embedding serves)."""
        if self.arch.num_scalars:
            return self.arch.num_scalars * self.arch.hidden_size
        return self.vocab_size * self.arch.hidden_size

    @property
    def num_parameters(self) -> float:
        number = self.num_layers * self.layer_parameters
        if self.is_first:
            number += self.vocab_size * self.arch.hidden_size
        if self.is_last:
            number += self.arch.hidden_size
            number += 0 if self.arch.tied and self.is_first else self.head_parameters
        return number

    @property
    def largest_parameter(self) -> float:
        """Of the largest single tensor, whose gradient and Adam's temporaries exist beside everything else."""
        ends = self.vocab_size * self.arch.hidden_size if self.is_first or (self.is_last and not self.arch.num_scalars) else 0
        return max(ends, 2 * self.arch.hidden_size * self.ffn_size)


def whole_parameters(arch: Architecture) -> float:
    """Parameters of the whole model, vocabulary padded for one rank."""
    return Shard(arch, LayoutConfig()).num_parameters
