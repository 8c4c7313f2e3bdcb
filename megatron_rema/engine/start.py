"""From a name in the configuration to a running engine. Each engine's library is imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rema.types import Engine

ENGINES = ("vllm", "transformers")


def build_engine(
    name: str,
    model_path: str | Path,
    *,
    tensor: int = 1,
    dtype: str = "float32",
    max_model_len: int,
    max_num_seqs: int = 64,
    block_size: int = 32,
    kv_cache_gib: float = 0.25,
    seed: int = 0,
    constrained: bool = False,
) -> Engine:
    """Start the engine ``name`` on a Hugging Face directory; its weight version is 0 until the first load_weights.

    ``block_size`` (tokens) and ``kv_cache_gib`` (per rank) shape vLLM's cache; the transformers engine grows its own.
    ``constrained``: takes requests with a regex, for which it reads the folder's tokenizer and needs xgrammar.
    Raises ValueError for an unknown name or dtype, and when the engine's library is missing.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"engine.dtype ({dtype!r}) must be one of float32, bfloat16, float16.")
    shape = {"tensor": tensor, "dtype": dtype, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    shape["constrained"] = constrained
    if name == "vllm":
        from megatron_rema.engine.vllm import VllmEngine

        return VllmEngine(model_path, **shape, block_size=block_size, kv_cache_gib=kv_cache_gib, seed=seed)
    if name == "transformers":
        from megatron_rema.engine.transformers import TransformersEngine

        return TransformersEngine(model_path, **shape)
    raise ValueError(f"engine.name ({name!r}) must be one of {', '.join(ENGINES)}.")
