"""What may stand at the end of the last stage instead of logits: K scalars per position, for critics and reward models, or the hidden
states, for a loss that multiplies the logits out itself, a few positions at a time."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_rema.parallel.groups import Groups


class ScalarHead(nn.Linear):
    """hidden [T, 1, hidden] -> float32 [T, 1, K]. Replicated over tensor ranks, no bias; called as megatron calls its output layer.

    Under sequence parallelism the sequence is gathered first, so that every tensor rank computes the same output and the same gradient:
    nothing is summed over the tensor group.
    """

    def __init__(self, config: TransformerConfig, num_scalars: int, groups: Groups) -> None:
        super().__init__(config.hidden_size, num_scalars, bias=False, dtype=config.params_dtype)
        self.sequence_parallel, self.tp = config.sequence_parallel, groups.tp

    def forward(self, hidden: Tensor, weight: None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp)
        return super().forward(hidden).to(torch.float32), None


def hand_over_hidden_states(output_layer: ColumnParallelLinear) -> None:
    """Megatron's output layer gives the hidden states, [T, 1, hidden] and alike on every tensor rank, and leaves the product to the loss.

    Its weight stays where it is: in checkpoints, in megatron's gradient buffers, tied to the embedding. The loss's gradient for the hidden
    states must be alike on every tensor rank too, as that of `linear_statistics` is: under sequence parallelism each rank takes its part.
    """

    def forward(hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, None]:
        if output_layer.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=output_layer.tp_group)
        return hidden, None

    output_layer.forward = forward
