"""Tiny random Hugging Face checkpoints, one per thing that may differ between families. Nothing is downloaded.

Every parameter is random, norms and biases included (transformers starts them at 1 and 0, which would hide a swapped name). The default
vocabulary of 101 is odd, so that every tensor-parallel size > 1 pads it. head_dim is 32: vLLM's CPU attention refuses 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARED: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 16384,
    "eos_token_id": 2,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"model_type": "qwen2", "hidden_size": 128, "tie_word_embeddings": True},
    # one key-value head per query head
    "qwen2_untied": {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 2, "tie_word_embeddings": False},
    # norms on queries and keys; heads * head_dim (128) is not the hidden size
    "qwen3": {"model_type": "qwen3", "hidden_size": 64, "head_dim": 32, "tie_word_embeddings": True},
    # a theta so small that scaling shows within a hundred positions
    "llama3": {
        "model_type": "llama",
        "hidden_size": 128,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **_LLAMA3},
    },
}
TINY_MODELS = tuple(_CONFIGS)


def save_tiny_model(
    path: str | Path,
    name: str = "qwen2_tied",
    *,
    seed: int = 0,
    vocab_size: int = 101,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    num_scalars: int = 0,
    **config: Any,
) -> Path:
    """Writes ``path`` as a checkpoint folder and returns it. A tokenizer is saved along; it raises ``vocab_size`` to hold its tokens.

    ``num_scalars`` > 0: a sequence-classification checkpoint with that many labels, on the trunk that the same seed gives a language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    if tokenizer is not None:
        vocab_size = max(vocab_size, len(tokenizer))
    settings = {**_SHARED, **_CONFIGS[name], "vocab_size": vocab_size, **config}
    kind = AutoModelForCausalLM
    if num_scalars:
        kind, settings = AutoModelForSequenceClassification, {**settings, "num_labels": num_scalars, "tie_word_embeddings": False}
    model = kind.from_config(AutoConfig.for_model(**settings)).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key:
                noise = 1 + 0.2 * noise
            elif key.endswith("bias"):
                noise = 0.3 * noise
            else:  # rows of unit norm in expectation: logits and attention scores of order 1
                noise = noise / parameter.shape[-1] ** 0.5
            parameter.copy_(noise)
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return Path(path)
