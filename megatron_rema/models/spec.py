"""From an `Architecture` to megatron-core's own nouns: TransformerConfig and layer spec. Local modules only, the same on CPU and CUDA.

Four modules are ours, through the public ModuleSpec: an RMSNorm that knows sequence parallelism, a core attention for packed sequences, a
self attention that leaves rotary positions to it, and the gated activation. The gradients of three are written by hand: on a CPU autograd's
chains of small operations cost a tenth of a step (docs/performance.md).
Shapes: T tokens of a packed batch, P cells of the padded view that attention sees, N query heads and K key/value heads of this tensor
rank, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
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
        use_te_activation_func=True,  # megatron's name for: the activation is a module of the layer spec, here our SwiGLU
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
    layer.self_attention.module = RotaryInside
    attention.core_attention = PackedAttention
    layer.mlp.submodules.activation_func = SwiGLU
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

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> the same. torch has a fused kernel on CUDA; on CPU it has a chain of operations, so there it is written out."""
        return super().forward(hidden) if hidden.is_cuda else _RMSNormOnCPU.apply(hidden, self.weight, self.eps)


class _RMSNormOnCPU(torch.autograd.Function):
    """y = w x / r with r = sqrt(mean(x^2) + eps), z = x / r:

    dL/dx = (g w - z mean(g w z)) / r          dL/dw = sum over tokens of g z
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).square_().div_(x.shape[-1])
        inverse_r = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_r)
        return (x * inverse_r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse_r = ctx.saved_tensors
        z = x * inverse_r
        grad_z = grad * z
        mean = (grad_z @ weight.to(grad_z.dtype)).unsqueeze(-1).div_(x.shape[-1])
        grad_weight = grad_z.flatten(0, -2).sum(0)
        grad_x = (grad * weight).to(z.dtype).sub_(z.mul_(mean)).mul_(inverse_r)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RotaryInside(SelfAttention):
    """megatron's self attention; rotary positions are left to `PackedAttention`.

    megatron's own rotation of packed sequences computes cos and sin again in every layer and copies queries and keys several times.
    """

    def forward(self, hidden_states: Tensor, attention_mask: None, *, rotary_pos_emb: Tensor, packed_seq_params: Packing, **rest):
        """rotary_pos_emb: angles [longest, 1, 1, H]."""
        if hidden_states.stride(0) != hidden_states.stride(1):
            # The embedding was transposed: a middle dimension of size 1 has any stride. torch.matmul with a frozen weight would then not
            # fold [T, 1, hidden] into a matrix but repeat the weight for every token.
            hidden_states = hidden_states.flatten(0, 1)[:, None]
        if packed_seq_params.rotation is None:
            angles = rotary_pos_emb[packed_seq_params.positions, 0]
            dtype = self.config.params_dtype
            packed_seq_params.rotation = angles.cos().to(dtype), angles.sin().to(dtype)
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, packed_seq_params=packed_seq_params, **rest)


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence, by torch's scaled_dot_product_attention; rotary positions, grouped queries.

    Sequences of similar length are padded on the right and attended side by side (`Packing`); nothing is moved where all have one length.
    Exact: under a causal mask no real token sees what is to its right. Never a [T, T] mask.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packed_seq_params: Packing, **_) -> Tensor:
        """query [T, N, H], key and value [T, K, H] -> [T, 1, N * H]."""
        cos, sin = packed_seq_params.rotation
        packed = (_Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin), value)
        blocks, cells, slots = packed_seq_params.blocks, packed_seq_params.cells, packed_seq_params.slots
        if cells is not None:
            packed = tuple(_ToCells.apply(tensor, cells, slots) for tensor in packed)
        split = [tensor.split([count * width for count, width in blocks]) for tensor in packed]
        outputs = []
        for (count, width), *parts in zip(blocks, *split, strict=True):
            q, k, v = (part.view(count, width, *part.shape[1:]).transpose(1, 2) for part in parts)  # [count, heads, width, H]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return (attended if slots is None else attended.index_select(0, slots))[:, None]


class _Rotate(torch.autograd.Function):
    """Rotary positions: halves (a, b) of the last dimension become (a cos - b sin, b cos + a sin). Backward turns the other way."""

    @staticmethod
    def forward(ctx, packed_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(packed_TNH, cos, sin)

    @staticmethod
    def backward(ctx, grad_TNH: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad_TNH, cos, -sin), None, None


def _rotated(packed_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin [T, 1, H], the same in both halves."""
    half = packed_TNH.shape[-1] // 2
    first, second = packed_TNH.split(half, dim=-1)
    rotated = packed_TNH * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1.0)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


class _ToCells(torch.autograd.Function):
    """[T, ...] -> [P, ...]. What stands in a padding cell does not matter: no token sees it, and its gradient is dropped."""

    @staticmethod
    def forward(ctx, packed: Tensor, cells: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return packed.index_select(0, cells)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class SwiGLU(MegatronModule):
    """silu(gate) * up, where megatron's own would add an offset of zero and put the gradients of gate and up together by a copy."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[T, 1, 2 F] -> [T, 1, F], F this tensor rank's share of the feed-forward width."""
        return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    """y = silu(gate) up; both gradients are written into one tensor, as the linear layer below wants them."""

    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_and_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        gate_and_up, silu = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grads
