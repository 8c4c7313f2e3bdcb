"""What a Hugging Face ``config.json`` says of a decoder, in one frozen noun. Imports neither torch nor transformers.

Models (the Megatron side), the bridge (names and shapes) and front doors (early layout errors) read the same object. What this
package cannot train exactly (sliding windows, other rope types, quantised weights) is refused here, before anything is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_rema.reading import brief, is_file, json_object

FAMILIES = ("qwen2", "qwen3", "llama")

# megatron-core's llama 3 rope takes the factor only: the other three numbers are constants there, as in every Llama 3.1-3.3 release.
_LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Columns of the vocabulary per rank are a multiple of this: 16-byte rows in bfloat16, which tensor cores want.
_VOCAB_MULTIPLE = 8

_LARGEST = 2**31 - 1  # of a size: what indices of tensors hold
_SIZES = ("hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_positions")
_MOST_LAYERS = 4096
_MOST_PARTS = 4096  # that are offered where a layout does not fit


@dataclass(frozen=True)
class Architecture:
    """A dense decoder with RMSNorm, SwiGLU, RoPE and grouped-query attention. Sizes are of the full model (TP=1, PP=1)."""

    family: str  # Hugging Face model_type: one of FAMILIES
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # as in the checkpoint, before padding
    rope_theta: float
    rope_scaling_factor: float | None  # llama 3 scaling, with low / high / original fixed at 1 / 4 / 8192; None: plain rope
    rms_norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool  # the output layer is the embedding
    max_positions: int
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json
    num_scalars: int = 0  # outputs per position of a scalar head (critic, reward model); 0: a language-model head
    initializer_range: float = 0.02  # standard deviation of random weights, where a model starts from them

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Architecture:
        """Reads ``path/config.json`` (and the stop tokens of generation_config.json). Raises ValueError naming what is not supported."""
        file = Path(path) / "config.json"
        if not is_file(file):
            raise ValueError(f"{path} has no config.json; it must be a Hugging Face checkpoint folder: correct model.path.")
        generation = Path(path) / "generation_config.json"
        more_eos = _ids(json_object(generation), str(generation)) if generation.is_file() else []
        return cls.from_config(json_object(file), source=str(file), more_eos=more_eos)

    @classmethod
    def from_config(cls, config: dict[str, Any], *, source: str = "config.json", more_eos: list[int] | None = None) -> Architecture:
        """From the parsed ``config.json``; both spellings of rope (``rope_parameters`` of transformers 5, the older flat keys) are read."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{source}: model_type is {brief(family)}; supported are {', '.join(FAMILIES)}: choose such a checkpoint.")
        _refuse_what_we_cannot_train(config, family, source)

        def need(key: str, default: int | None = None, most: int = _LARGEST) -> int:
            value = default if config.get(key) is None else config[key]
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{source}: {key} is {brief(value)}; it must be an integer from 1 to {most}: correct the file.")
            return value

        heads, hidden = need("num_attention_heads"), need("hidden_size")
        rope_theta, rope_factor = _rope(config, source)
        num_scalars = _num_scalars(config, source)
        arch = cls(
            family=family,
            num_layers=need("num_hidden_layers", most=_MOST_LAYERS),
            hidden_size=hidden,
            ffn_hidden_size=need("intermediate_size"),
            num_heads=heads,
            num_kv_heads=need("num_key_value_heads", heads),
            head_dim=need("head_dim", 128 if family == "qwen3" else max(hidden // heads, 1)),
            vocab_size=need("vocab_size"),
            rope_theta=rope_theta,
            rope_scaling_factor=rope_factor,
            rms_norm_eps=_positive(config, "rms_norm_eps", 1e-6, source),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            tied=bool(config.get("tie_word_embeddings", False)) and num_scalars == 0,
            max_positions=need("max_position_embeddings", 2048),
            num_scalars=num_scalars,
            initializer_range=_positive(config, "initializer_range", 0.02, source),
            eos_token_ids=tuple(dict.fromkeys(_ids(config, source) + list(more_eos or ()))),
        )
        if arch.num_heads % arch.num_kv_heads:
            raise ValueError(
                f"{source}: num_attention_heads ({arch.num_heads}) must be a multiple of num_key_value_heads ({arch.num_kv_heads}); "
                f"got remainder {arch.num_heads % arch.num_kv_heads}: correct the file."
            )
        return arch

    @classmethod
    def from_json(cls, stored: dict[str, Any], *, source: str) -> Architecture:
        """What ``dataclasses.asdict`` gave, back from a checkpoint's state.json. Raises ValueError naming the field."""
        try:
            arch = TypeAdapter(cls).validate_python(stored)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ValueError(f"{source}: {field} is {brief(first['input'])}, which no save wrote: copy the checkpoint again.") from None
        for field, most in (("num_layers", _MOST_LAYERS), *((name, _LARGEST) for name in _SIZES)):
            if not 1 <= getattr(arch, field) <= most:
                raise ValueError(f"{source}: {field} is {brief(getattr(arch, field))}, which no save wrote: copy the checkpoint again.")
        return arch

    def __post_init__(self) -> None:
        assert not (self.tied and self.num_scalars), "a scalar head has no embedding to be tied to: use with_scalar_head"

    def with_scalar_head(self, num_scalars: int) -> Architecture:
        """The same trunk with ``num_scalars`` outputs per position instead of the vocabulary."""
        return replace(self, num_scalars=num_scalars, tied=False)

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def padded_vocab_size(self, tensor: int) -> int:
        """Rows of the embedding over all ranks: the least multiple of 8 * tensor that holds the vocabulary."""
        multiple = _VOCAB_MULTIPLE * tensor
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, tensor: int, pipeline: int, virtual: int = 1) -> None:
        """Raises ValueError when the model cannot be cut into ``tensor`` x ``pipeline`` equal parts, or these into ``virtual`` chunks."""
        for axis, parts, name, value in (
            ("tensor", tensor, "num_attention_heads", self.num_heads),
            ("tensor", tensor, "num_key_value_heads", self.num_kv_heads),
            ("tensor", tensor, "intermediate_size", self.ffn_hidden_size),
            ("pipeline", pipeline, "num_hidden_layers", self.num_layers),
        ):
            if parts < 1 or value % parts:
                remainder = f"got remainder {value % parts}: " if parts > 0 else ""
                raise ValueError(
                    f"parallel.{axis} ({parts}) must divide {name} ({value}) of this {self.family} model; {remainder}"
                    f"choose one of {', '.join(str(n) for n in range(1, min(value, _MOST_PARTS) + 1) if value % n == 0)}."
                )
        if virtual < 1 or (virtual > 1 and pipeline == 1):
            raise ValueError(
                f"parallel.virtual_pipeline is {virtual} with parallel.pipeline {pipeline}; virtual stages need at least 2 stages: "
                "set it to 1."
            )
        if self.num_layers % (pipeline * virtual):
            raise ValueError(
                f"parallel.pipeline ({pipeline}) * parallel.virtual_pipeline ({virtual}) = {pipeline * virtual} must divide "
                f"num_hidden_layers ({self.num_layers}) of this {self.family} model; "
                f"got remainder {self.num_layers % (pipeline * virtual)}: lower one."
            )


def _num_scalars(config: dict[str, Any], source: str) -> int:
    """0 for a language model; the number of labels of a sequence- or token-classification checkpoint."""
    kinds = config.get("architectures") or ["ForCausalLM"]
    kind = kinds[0] if isinstance(kinds, list) else kinds
    if not isinstance(kind, str) or not kind.endswith(("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")):
        raise ValueError(
            f"{source}: architectures is {brief(kind)}; it must end in ForCausalLM or ForSequenceClassification: choose another checkpoint."
        )
    if kind.endswith("ForCausalLM"):
        return 0
    labels = config.get("id2label") or (0, 1)
    count = config.get("num_labels") or (len(labels) if isinstance(labels, dict | tuple) else labels)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _LARGEST:
        raise ValueError(f"{source}: num_labels is {brief(count)}; it must be an integer from 1 on: correct the file.")
    return count


def _ids(config: dict[str, Any], source: str) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= _LARGEST for one in ids):
        raise ValueError(f"{source}: eos_token_id is {brief(value)}; it must be a token id or a list of them: correct the file.")
    return ids


def _positive(config: dict[str, Any], key: str, default: float, source: str) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _LARGEST or math.isinf(value):
        raise ValueError(f"{source}: {key} is {brief(value)}; it must be a number above 0: correct the file.")
    return float(value)


def _rope(config: dict[str, Any], source: str) -> tuple[float, float | None]:
    """(theta, llama 3 factor or None). transformers 5 writes ``rope_parameters``; older files ``rope_theta`` and ``rope_scaling``."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{source}: rope_parameters (or rope_scaling) is {brief(rope)}; it must be an object: correct the file.")
    theta = _positive(rope if rope.get("rope_theta") else config, "rope_theta", 10000.0, source)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is not 1.0; only full rotary embeddings are supported: choose another model.")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{source}: rope_type is {brief(kind)}; supported are default and llama3: remove the scaling or choose another model."
        )
    for key, constant in _LLAMA3_CONSTANTS.items():
        if rope.get(key, constant) != constant:
            raise ValueError(
                f"{source}: rope_parameters.{key} is {brief(rope[key])}; megatron-core's llama3 rope fixes it at {constant}: "
                "choose another model."
            )
    if "factor" not in rope:
        raise ValueError(f"{source}: rope_type is llama3 without factor; it must be given: complete the file.")
    return theta, _positive({"rope_parameters.factor": rope["factor"]}, "rope_parameters.factor", 1.0, source)


def _refuse_what_we_cannot_train(config: dict[str, Any], family: str, source: str) -> None:
    """Settings that change the mathematics in a way the Megatron side does not follow."""
    rules: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", "silu", ("silu",)),
        ("use_sliding_window", False, (False, None)),
        ("attention_bias", False, (False, None)),
        ("mlp_bias", False, (False, None)),
        ("quantization_config", None, (None,)),
    ]
    for key, default, allowed in rules:
        value = config.get(key, default)
        if value not in allowed and not (family == "qwen2" and key == "attention_bias"):
            raise ValueError(
                f"{source}: {key} is {brief(value)}; a supported {family} model has {allowed[0]!r}: choose another checkpoint."
            )
    kinds = config.get("layer_types") or []
    other = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind != "full_attention"]
    if other:
        raise ValueError(f"{source}: layer_types has {brief(other[0])}; only full_attention is supported: choose another checkpoint.")
