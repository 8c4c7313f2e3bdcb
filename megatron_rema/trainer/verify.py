"""Is a converted model the same function? Its logits, computed by our models, beside those of ``transformers``."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rema.bridge.convert import Source
from megatron_rema.bridge.layout import to_megatron
from megatron_rema.bridge.names import canonical_name, name_map
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.cast import process_group
from megatron_rema.types import Batch


@dataclass(frozen=True)
class Difference:
    """Of all logits (or values) of all positions, in float32."""

    maximum: float  # largest absolute difference
    largest: float  # largest absolute value that transformers gives
    num_tokens: int
    same_choice: float  # fraction of positions whose highest logit is the same


def compare_logits(hf_dir: Path, source: Source, *, num_sequences: int, num_tokens: int, seed: int) -> Difference:
    """``num_sequences`` of ``num_tokens`` random token ids through both. One model is in memory at a time, in float32."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, source.arch.vocab_size, (num_sequences, num_tokens), generator=generator)
    theirs = _transformers_outputs(hf_dir, tokens_BT, is_scalar=source.arch.num_scalars > 0)
    gc.collect()
    ours = _our_outputs(source, tokens_BT)
    if ours.shape != theirs.shape:
        raise ValueError(f"{source.path} gives outputs {tuple(ours.shape)}, {hf_dir} gives {tuple(theirs.shape)}: different models.")
    return Difference(
        maximum=float((ours - theirs).abs().max()),
        largest=float(theirs.abs().max()),
        num_tokens=tokens_BT.numel(),
        same_choice=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def _transformers_outputs(hf_dir: Path, tokens_BT: Tensor, *, is_scalar: bool) -> Tensor:
    """[B * T, vocabulary], or [B * T, scalars] of a classification head at every position."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    model = kind.from_pretrained(hf_dir, dtype=torch.float32, trust_remote_code=False).eval()
    if is_scalar:
        outputs = [model.score(model.base_model(sequence[None]).last_hidden_state)[0] for sequence in tokens_BT]
    else:
        outputs = [model(sequence[None]).logits[0] for sequence in tokens_BT]
    return torch.cat(outputs)


@torch.no_grad()
def _our_outputs(source: Source, tokens_BT: Tensor) -> Tensor:
    """The same from megatron-core's model, on all sequences packed into one batch."""
    arch = source.arch
    entries = name_map(arch)
    with process_group():
        model = build_policy(arch, groups=build_groups(tensor=1, pipeline=1), trainable=False)
        layers = [layer.layer_number for layer in model.module.decoder.layers]
        for name, parameter in model.module.named_parameters():
            entry = entries[canonical_name(name, layers)]
            parameter.copy_(to_megatron(source.tensors(entry), entry, arch, rank=0, size=1))
        outputs = model.forward_backward([_packed(tokens_BT)], lambda x, _: (x.sum(), {"outputs": x.detach().float()}), forward_only=True)
    return outputs[0]["outputs"][:, : arch.num_scalars or arch.vocab_size].cpu()


def _packed(tokens_BT: Tensor) -> Batch:
    num_sequences, num_tokens = tokens_BT.shape
    zeros_T = torch.zeros(tokens_BT.numel(), dtype=torch.int64)
    return Batch(
        tokens=tokens_BT.reshape(-1),
        labels=zeros_T,
        positions=torch.arange(num_tokens).repeat(num_sequences),
        cu_seqlens=torch.arange(0, tokens_BT.numel() + 1, num_tokens, dtype=torch.int32),
        max_seqlen=num_tokens,
        loss_mask=zeros_T.bool(),
        turn_ids=zeros_T - 1,
        trace_ids=torch.arange(num_sequences).repeat_interleave(num_tokens),
        cu_turns=torch.tensor([0, tokens_BT.numel()]),
    )
