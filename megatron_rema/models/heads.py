"""What may stand at the end of the last stage instead of the vocabulary: K scalars per position, for critics and reward models."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
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
