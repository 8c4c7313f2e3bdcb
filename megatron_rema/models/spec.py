"""From an `Architecture` to megatron-core's own nouns: TransformerConfig and layer spec. Local modules only, the same on CPU and CUDA.

Two modules are ours, through the public ModuleSpec: an RMSNorm that knows sequence parallelism, and a core attention for packed sequences.
Shapes: T tokens of a packed batch, B sequences, S longest sequence, N query heads and K key/value heads of this tensor rank, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rema.architecture import Architecture
from megatron_rema.parallel.pipeline import Packing


def transformer_config(
    arch: Architecture,
    *,
    tensor: int,
    pipeline: int,
    virtual: int = 1,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    recompute: bool = False,
) -> TransformerConfig:
    """Raises ValueError when ``arch`` cannot be cut into tensor x pipeline parts of ``virtual`` chunks each."""
    arch.check_layout(tensor, pipeline, virtual)
    if sequence_parallel and tensor == 1:
        raise ValueError("parallel.sequence_parallel is true with parallel.tensor 1; it needs parallel.tensor >= 2: turn it off.")
    recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        qk_layernorm=arch.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        # Chunks that alternate between two stages send both ways to the same peer: in one batch the messages are taken for one another,
        # and the loss is silently wrong.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,  # the loss is a sum: no division by microbatches, no average over data-parallel ranks
        # weights come from a checkpoint or from policy.initialise: megatron only allocates and marks how they are cut
        use_cpu_initialization=True,
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        # fusions that need Apex, Transformer Engine or a compiler
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **recomputation,
    )


def _leave_empty(weight: Tensor) -> Tensor:
    return weight


def layer_spec(arch: Architecture) -> ModuleSpec:
    """One decoder layer: megatron's local spec with our norm and our core attention."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if arch.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    return spec


def block_spec(
    arch: Architecture, config: TransformerConfig, pipeline_rank: int, virtual_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage, or of one of its virtual stages, and the final norm."""
    num_layers = get_num_layers_to_build(config, virtual_stage, pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(arch)] * num_layers, layer_norm=RMSNorm)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, its weight marked for megatron's gradient reduction under sequence parallelism (megatron's wrapper refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence, by torch's scaled_dot_product_attention; grouped queries.

    Sequences are scattered to [B, S] padded on the right and gathered back. Exact: under a causal mask no real token sees what is to its
    right. Costs B * S instead of T positions, and never a [T, T] mask.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packed_seq_params: Packing, **_) -> Tensor:
        """query [T, N, H], key and value [T, K, H] -> [T, 1, N * H]."""
        longest = packed_seq_params.max_seqlen_q
        num_sequences = len(packed_seq_params.cu_seqlens_q) - 1
        slots = packed_seq_params.slots

        def side_by_side(packed: Tensor) -> Tensor:  # [T, heads, H] -> [B, heads, S, H]
            padded = packed.new_zeros(num_sequences * longest, *packed.shape[1:]).index_copy(0, slots, packed)
            return padded.view(num_sequences, longest, *packed.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            side_by_side(query),
            side_by_side(key),
            side_by_side(value),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, slots).flatten(1)[:, None]
