"""A model's weights on this rank: one tensor shard of one pipeline stage of a megatron-core GPTModel, or of several virtual stages.

Random weights are drawn for the FULL tensor of each name and then cut, so that they are the same at every layout.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rema.architecture import Architecture
from megatron_rema.kernels.logits import Statistics
from megatron_rema.models.heads import ScalarHead, hand_over_hidden_states
from megatron_rema.models.offload import HostOffload
from megatron_rema.models.spec import block_spec, transformer_config
from megatron_rema.parallel import pipeline, platform
from megatron_rema.parallel.groups import Groups
from megatron_rema.parallel.linear_vocab import Factors, linear_statistics
from megatron_rema.parallel.vocab import vocab_parallel_statistics
from megatron_rema.types import Batch


@dataclass(eq=False)
class ParallelModel:
    """One set of weights, in the layout of ``groups``."""

    arch: Architecture
    groups: Groups
    config: TransformerConfig
    modules: list[GPTModel]  # this rank's shard of its stage: one module, or one per virtual stage, first layers first
    chunks: list[nn.Module]  # the modules, each wrapped in megatron's DistributedDataParallel when trainable
    offload: HostOffload | None = None  # of the weights; None: they stay on the device
    logits_chunk_tokens: int = 0  # > 0: the last stage gives hidden states, and logits exist for so many positions at a time

    @property
    def module(self) -> GPTModel:
        """The only module of a model without virtual stages."""
        assert len(self.modules) == 1, "this model has virtual stages: use modules"
        return self.modules[0]

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.chunks[0], DistributedDataParallel)

    def resident(self) -> AbstractContextManager[None]:
        """The weights are on the device inside: whoever reads or runs them asks for it."""
        return nullcontext() if self.offload is None else self.offload.resident()

    def statistics(
        self,
        outputs: Tensor,
        batch: Batch,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        reference: ParallelModel | None = None,
    ) -> Statistics:
        """[T] log-probabilities of the labels, entropies, and exact KL to ``reference``, from what the last stage gave a loss.

        The ``outputs`` serve nobody afterwards. The reference is run here, on this microbatch alone: a model of one stage whose vocabulary
        is cut as this one's, with the same ``logits_chunk_tokens``, resident until backward is through.
        """
        ref_outputs = None
        if reference is not None:
            with torch.no_grad():
                ref_outputs = pipeline.run(reference.module, batch)[0]
        options = {"temperature": temperature, "with_entropy": with_entropy, "vocab_size": self.arch.vocab_size}
        options |= {"allowed_sets_SW": batch.allowed_sets, "allowed_ids_T": batch.allowed_ids}
        if not self.logits_chunk_tokens:
            return vocab_parallel_statistics(
                outputs, batch.labels, self.groups.tp, local_ref_logits_TV=ref_outputs, overwrite_logits=True, **options
            )
        factors = Factors(outputs, self._output_weight)
        ref_factors = None if reference is None else Factors(ref_outputs, reference._output_weight)
        return linear_statistics(
            factors, batch.labels, self.groups.tp, ref_logits=ref_factors, chunk_tokens=self.logits_chunk_tokens, **options
        )

    @property
    def _output_weight(self) -> Tensor:
        """On the last stage, this tensor rank's rows: the embedding's own where it is tied and lies here, else the output layer's."""
        last = self.modules[-1]
        return last.shared_embedding_or_output_weight() if self.arch.tied else last.output_layer.weight

    def forward_backward(self, batches: list[Batch], loss_fn: pipeline.LossFn, *, forward_only: bool = False) -> list[pipeline.Stats]:
        """`pipeline.forward_backward` with this model's chunks, config and groups."""
        assert forward_only or self.is_trainable, "a frozen policy has no gradients"
        assert self.offload is None or not self.offload.is_resting, "the weights wait in host memory: run the model inside resident()"
        return pipeline.forward_backward(self.chunks, self.config, batches, loss_fn, groups=self.groups, forward_only=forward_only)


def build_policy(
    arch: Architecture,
    *,
    groups: Groups,
    virtual: int = 1,
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    seed: int | None = None,
    sequence_parallel: bool = False,
    recompute: bool = False,
    distributed_optimizer: bool = False,
    offload: bool = False,
    logits_chunk_tokens: int = 0,
) -> ParallelModel:
    """This rank's part of ``arch``: ``virtual`` chunks of it, of which chunk v holds part v * stages + stage. A collective.

    ``seed`` draws random weights; without it they are left empty, for a checkpoint to fill. ``distributed_optimizer`` lays gradients
    out for ZeRO-1; `build_optimizer` follows it. ``offload``: the weights wait in host memory outside `ParallelModel.resident`, from its
    first use on; `build_optimizer` follows it too. ``logits_chunk_tokens`` > 0: see `ParallelModel`; scalar heads have no logits to cut.
    """
    config = transformer_config(
        arch,
        tensor=groups.tensor_size,
        pipeline=groups.pipeline_size,
        virtual=virtual,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
    )
    modules = [_module(arch, config, groups, stage if virtual > 1 else None, logits_chunk_tokens) for stage in range(virtual)]
    if seed is not None:
        for module in modules:
            initialise(module, arch, groups=groups, seed=seed)
    if not trainable:
        for module in modules:
            module.requires_grad_(False)
        return ParallelModel(arch, groups, config, modules, list(modules), _offload_of(modules) if offload else None, logits_chunk_tokens)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer)
    wrapped = [DistributedDataParallel(config, ddp_config, module, pg_collection=groups.collection) for module in modules]
    return ParallelModel(arch, groups, config, modules, wrapped, _offload_of(modules) if offload else None, logits_chunk_tokens)


def _offload_of(modules: list[GPTModel]) -> HostOffload:
    return HostOffload(lambda: [param.data for module in modules for param in module.parameters()])


def _module(arch: Architecture, config: TransformerConfig, groups: Groups, virtual_stage: int | None, logits_chunk_tokens: int) -> GPTModel:
    """One chunk, its weights empty. ``virtual_stage`` is None where the whole pipeline stage is one chunk."""
    last_virtual = (config.virtual_pipeline_model_parallel_size or 1) - 1
    is_last = groups.is_last_stage and virtual_stage in (None, last_virtual)
    module = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(arch, config, groups.pipeline_rank, virtual_stage),
        vocab_size=arch.padded_vocab_size(groups.tensor_size),
        max_sequence_length=arch.max_positions,
        pre_process=groups.is_first_stage and not virtual_stage,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        rope_scaling=arch.rope_scaling_factor is not None,
        rope_scaling_factor=arch.rope_scaling_factor or 1.0,
        pg_collection=groups.collection,
        vp_stage=virtual_stage,
    )
    if arch.num_scalars and is_last:
        module.output_layer = ScalarHead(config, arch.num_scalars, groups)
    elif logits_chunk_tokens and is_last:
        hand_over_hidden_states(module.output_layer)
    return module.to(platform.device())


def full_name(name: str, module: GPTModel, arch: Architecture) -> str:
    """A parameter's name in the whole model: layers counted from the first stage, tied output weights under the embedding's name."""
    if name == "output_layer.weight" and arch.tied:
        return "embedding.word_embeddings.weight"
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        return f"decoder.layers.{module.decoder.layers[int(local)].layer_number - 1}.{rest}"
    return name


@torch.no_grad()
def initialise(module: GPTModel, arch: Architecture, *, groups: Groups, seed: int) -> None:
    """Norms 1, biases 0, matrices normal(0, ``arch.initializer_range``), those that write into the residual stream divided by
    sqrt(2 * layers) (GPT-2). A scalar head has 1 / sqrt(hidden + 1).

    Each tensor has a generator of its own, seeded by ``seed`` and its `full_name`: no layout changes a single number. The vocabulary's
    padding rows are 0.
    """
    for name, param in module.named_parameters():
        whole_name = full_name(name, module, arch)
        if param.ndim == 1:
            param.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        size = list(param.shape)
        if getattr(param, "tensor_model_parallel", False):
            size[param.partition_dim] *= groups.tensor_size
        is_head = whole_name == "output_layer.weight"
        is_vocabulary = whole_name == "embedding.word_embeddings.weight" or (is_head and not arch.num_scalars)
        rows = arch.vocab_size if is_vocabulary else size[0]
        digest = hashlib.sha256(f"{seed}/{whole_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        writes_residual = whole_name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = (arch.hidden_size + 1) ** -0.5 if is_head and arch.num_scalars else arch.initializer_range
        scale = std / math.sqrt(2 * arch.num_layers) if writes_residual else std
        whole = torch.zeros(size)
        whole[:rows] = torch.randn(rows, size[1], generator=generator) * scale
        param.copy_(cut(whole, param, groups))


def cut(whole: Tensor, param: Tensor, groups: Groups) -> Tensor:
    """This rank's shard of a full tensor, as megatron marks ``param``: gate and up (stride 2) are cut apart."""
    if not getattr(param, "tensor_model_parallel", False):
        return whole
    parts = whole.chunk(groups.tensor_size * param.partition_stride, dim=param.partition_dim)
    return torch.cat(parts[groups.tensor_rank :: groups.tensor_size], dim=param.partition_dim)
